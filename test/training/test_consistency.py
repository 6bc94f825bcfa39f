"""Consistency distillation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcqfa_ros.runtime.denoising import DenoisingLoop, SamplerCoefficients
from training.checkpoint import load_checkpoint
from training.config import ConfigError, TrainConfig, load_config, override
from training.consistency import ConsistencyTrainer
from training.trained import load_trained
from training.trainer import Trainer

SKIP = 25


def changed(config: TrainConfig, **fields: Any) -> TrainConfig:
    """``config`` with other top-level fields."""
    return TrainConfig.model_validate(config.model_dump() | fields)


@pytest.fixture(scope="module")
def config(trained_run: Path) -> TrainConfig:
    """The tiny policy distilled; levels 25 time steps apart."""
    plain = load_config(trained_run.parent / "tiny.yaml")
    return changed(
        override(plain, policy={"attention_dropout": 0.0}, run={"precision": "fp32"}),
        warm_start=str(trained_run),
        diffusion=plain.diffusion.model_copy(update={"sampler": "consistency", "steps": 4}).model_dump(),
        consistency={"skip": SKIP},
    )


@pytest.fixture
def trainer(config: TrainConfig, tmp_path: Path) -> ConsistencyTrainer:
    return ConsistencyTrainer(config, tmp_path / "run")


def test_training_stays_at_the_levels_that_the_sampler_visits(trainer: ConsistencyTrainer) -> None:
    batch = trainer.data.draw(trainer.windows, 0, 3000)
    assert sorted(batch.timesteps.unique().tolist()) == list(range(90))


def test_the_trained_function_is_the_one_that_the_sampler_applies(trainer: ConsistencyTrainer) -> None:
    spec = load_specification(trainer)
    c = SamplerCoefficients.of(spec.diffusion, 4)
    batch = trainer.data.draw(trainer.windows, 0, 4)
    timesteps = torch.from_numpy(c.timesteps)
    eps = torch.randn(batch.action.shape, generator=torch.Generator().manual_seed(1))
    ours = trainer.consistency(lambda *_: eps, batch.noise, timesteps, batch)
    from_sample, from_noise = (torch.from_numpy(v)[:, None, None] for v in (c.from_sample, c.from_noise))
    torch.testing.assert_close(ours, from_sample * batch.noise + from_noise * eps, rtol=1e-4, atol=1e-4)


def load_specification(trainer: ConsistencyTrainer) -> Any:
    trainer.save()
    return load_trained(trainer.folder).meaning.specification()


def test_the_teacher_steps_down_as_ddim_does(trainer: ConsistencyTrainer) -> None:
    diffusion = load_specification(trainer).diffusion.model_copy(update={"sampler": "ddim"})
    batch = trainer.data.draw(trainer.windows, 0, 4)
    batch = replace(batch, timesteps=torch.tensor([75, 50, 25, 0]))
    sample = batch.noise.clone()
    lower, timesteps = trainer.lower(sample, batch)
    assert timesteps.tolist() == [50, 25, 0, -1]
    loop = DenoisingLoop(diffusion, *sample.shape[1:], steps=4, batch=4)
    with torch.no_grad():
        noise = trainer.teacher(sample, batch.timesteps, batch.observation)
    for row in range(4):
        np.copyto(loop.sample, sample.numpy())
        np.copyto(loop.prediction, noise.numpy())
        loop.step(row)
        np.testing.assert_allclose(lower[row].numpy(), loop.sample[row], atol=1e-5)


def test_below_the_least_level_the_target_is_the_clean_sample_itself(trainer: ConsistencyTrainer) -> None:
    batch = trainer.data.draw(trainer.windows, 0, 8)
    batch = replace(batch, timesteps=torch.arange(8))
    signal, sigma = (share[batch.timesteps][:, None, None] for share in (trainer.signal, trainer.sigma))
    clean, timesteps = trainer.lower(signal * batch.action + sigma * batch.noise, batch)
    assert timesteps.tolist() == [-1] * 8
    expected = trainer.consistency(trainer.teacher, signal * batch.action + sigma * batch.noise, batch.timesteps, batch)
    torch.testing.assert_close(clean, expected.clamp(-1, 1), atol=0.02, rtol=0.0)
    trainer.target.head.bias.data += 100.0  # not asked there
    assert trainer.batch_loss(trainer.model, batch).item() < 1.0


def test_distillation_brings_the_levels_together_and_leaves_the_teacher(config: TrainConfig, tmp_path: Path) -> None:
    longer = override(config, run={"steps": 60, "batch": 16}, optimizer={"learning_rate": 1e-3})
    trainer = ConsistencyTrainer(longer, tmp_path)
    teacher = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    before = trainer.validate()
    for _ in range(60):
        trainer.train_step()
    assert trainer.validate() < 0.8 * before
    assert all(torch.equal(value, teacher[name]) for name, value in trainer.teacher.state_dict().items())
    weight, target = trainer.model.head.weight, trainer.target.head.weight
    assert not torch.equal(weight, target)  # a moving average, close behind
    assert float((weight - target).norm()) < float((weight - trainer.teacher.head.weight).norm())


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    whole, first = (ConsistencyTrainer(config, tmp_path / name) for name in ("whole", "parts"))
    assert whole.run()
    for _ in range(3):
        first.train_step()
    first.save()
    second = ConsistencyTrainer(config, tmp_path / "parts")
    assert second.step == 3 and second.run()
    one, other = (load_checkpoint(trainer.checkpoint_path) for trainer in (whole, second))
    for part in ("model", "ema", "target"):
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items()), part


def test_known_tokens_need_a_policy_that_takes_them(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.prefix is 8, but the policy of warm_start"):
        ConsistencyTrainer(override(config, policy={"prefix": 8}), tmp_path / "refused")
    plain = changed(override(config, policy={"prefix": 8}), consistency=None, diffusion={"sampler": "ddim", "steps": 4})
    Trainer(plain, tmp_path / "prefixed").save()
    both = changed(override(config, policy={"prefix": 8}), warm_start=str(tmp_path / "prefixed"))
    trainer = ConsistencyTrainer(both, tmp_path / "both")
    batch = trainer.data.draw(trainer.windows, 0, 6)
    batch = replace(batch, prefix=torch.full((6,), 8))
    trainer.target.head.bias.data += 1.0
    trainer.batch_loss(trainer.model, batch).backward()
    assert batch.prefix is not None and trainer.model.head.weight.grad is not None
    moved = replace(batch, noise=batch.noise.clone())
    moved.noise[:, :8] += 1.0  # of tokens that are known
    assert torch.equal(trainer.batch_loss(trainer.model, moved), trainer.batch_loss(trainer.model, batch))
