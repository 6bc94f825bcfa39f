"""Training with leading action tokens that are already known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.checkpoint import CheckpointError, load_checkpoint
from training.config import TrainConfig, load_config, override
from training.data.policy_data import Batch, PolicyData
from training.objective import Objective, conditioned, known_tokens
from training.policies.diffusion_policy_t import DiffusionPolicyT, parameter_count
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.trained import load_trained
from training.trainer import Trainer
from training.warm_start import WarmStartError, read_policy_weights

LONGEST = 8


def changed(config: TrainConfig, **fields: Any) -> TrainConfig:
    """``config`` with other top-level fields."""
    return TrainConfig.model_validate_json(json.dumps(config.model_dump(mode="json") | fields))


@pytest.fixture(scope="module")
def plain(trained_run: Path) -> TrainConfig:
    return load_config(trained_run.parent / "tiny.yaml")


@pytest.fixture(scope="module")
def config(plain: TrainConfig, trained_run: Path) -> TrainConfig:
    """The tiny policy fine-tuned with known tokens."""
    return changed(override(plain, policy={"prefix": LONGEST}), warm_start=str(trained_run))


@pytest.fixture(scope="module")
def data(config: TrainConfig) -> PolicyData:
    return PolicyData(config)


@pytest.fixture(scope="module")
def objective(config: TrainConfig) -> Objective:
    return Objective(override(config, run={"precision": "fp32"}), torch.device("cpu"))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**62), count=st.integers(1, 40))
def test_known_tokens_stay_clean_and_flagged_and_the_others_are_as_ever(
    data: PolicyData, objective: Objective, plain: TrainConfig, seed: int, count: int
) -> None:
    batch = data.draw(data.windows, seed, count)
    assert batch.prefix is not None and bool(((batch.prefix >= 0) & (batch.prefix <= LONGEST)).all())
    noisy = objective.noisy(batch)
    assert noisy.shape == (count, 16, 3)
    known = known_tokens(batch)
    assert torch.equal(known.sum(1), batch.prefix)
    assert all(bool(known[row, : int(n)].all()) for row, n in enumerate(batch.prefix))
    assert torch.equal(noisy[..., 2], known.float())
    assert torch.equal(noisy[..., :2][known], batch.action[known])
    without = replace(batch, prefix=None)
    assert torch.equal(noisy[..., :2][~known], objective.noisy(without)[~known])
    again = data.draw(data.windows, seed, count)
    assert torch.equal(again.prefix, batch.prefix) and torch.equal(again.noise, batch.noise)


def test_every_length_is_drawn_alike_and_changes_no_other_draw(data: PolicyData, plain: TrainConfig) -> None:
    batch, other = (d.draw(d.windows, 3, 4000) for d in (data, PolicyData(plain)))
    assert batch.prefix is not None and other.prefix is None
    shares = torch.bincount(batch.prefix, minlength=LONGEST + 1) / len(batch.prefix)
    torch.testing.assert_close(shares, torch.full((LONGEST + 1,), 1 / (LONGEST + 1)), atol=0.03, rtol=0.0)
    for name in ("observation", "action", "timesteps", "noise", "index"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**62))
def test_the_loss_is_the_mean_over_unknown_tokens_and_known_ones_get_no_gradient(
    data: PolicyData, objective: Objective, seed: int
) -> None:
    batch = data.draw(data.windows, seed, 12)
    known = known_tokens(batch)
    predicted = torch.randn(batch.action.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def loss(drawn: Batch) -> Tensor:
        return objective.loss(lambda *_: predicted, drawn)

    value = loss(batch)
    value.backward()
    assert predicted.grad is not None
    assert not predicted.grad[known].any() and bool(predicted.grad[~known].all())
    expected = torch.stack(
        [(predicted[row, n:] - batch.noise[row, n:]).square().mean() for row, n in enumerate(batch.prefix.tolist())]
    ).mean()
    torch.testing.assert_close(value, expected)
    elsewhere = batch.noise + known[..., None]
    assert torch.equal(loss(replace(batch, noise=elsewhere)), value)


def test_a_network_learns_nothing_from_its_outputs_for_known_tokens(data: PolicyData, objective: Objective) -> None:
    torch.manual_seed(0)
    network = DiffusionPolicyT(data.config.policy)
    batch = replace(data.draw(data.windows, 0, 4), prefix=torch.full((4,), LONGEST))
    outputs: list[Tensor] = []
    network.head.register_forward_hook(lambda *call: (call[2].retain_grad(), outputs.append(call[2]))[-1])
    objective.loss(network, batch).backward()
    gradient = outputs[0].grad
    assert gradient is not None
    assert not gradient[:, :LONGEST].any() and bool(gradient[:, LONGEST:].any())


def test_a_warm_start_is_the_plain_policy_bit_for_bit_where_nothing_is_known(
    config: TrainConfig, trained_run: Path, tmp_path: Path
) -> None:
    trainer, trained = Trainer(config, tmp_path), load_trained(trained_run)
    assert parameter_count(trainer.model) == parameter_count(trained.network) + config.policy.dim
    weight = trainer.model.state_dict()["action_embedding.weight"]
    assert not weight[:, 2].any() and bool(weight[:, :2].all())
    batch = replace(trainer.data.draw(trainer.windows, 1, 8), prefix=torch.zeros(8, dtype=torch.int64))
    without = replace(batch, prefix=None)
    with torch.no_grad():
        inputs = (trainer.objective.noisy(drawn) for drawn in (batch, without))
        ours, theirs = (
            network(noisy, batch.timesteps, batch.observation)
            for network, noisy in zip((trainer.ema, trained.network), inputs, strict=True)
        )
    assert torch.equal(ours, theirs)


def test_the_counts_know_the_flag(config: TrainConfig, plain: TrainConfig) -> None:
    for policy in (config.policy, plain.policy):
        shape = diffusion_policy_t_shape(policy)
        blocks = sum(block.float_parameters for block in shape.blocks) + sum(
            (linear.in_features + linear.bias) * linear.out_features
            for block in shape.blocks
            for linear in block.linears
        )
        assert shape.fixed_parameters + blocks == parameter_count(DiffusionPolicyT(policy))


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    whole, first = Trainer(config, tmp_path / "whole"), Trainer(config, tmp_path / "parts")
    records: list[dict[str, float]] = []
    assert whole.run(records.append)
    for _ in range(3):
        first.train_step()
    first.save()
    second = Trainer(config, tmp_path / "parts")
    assert second.step == 3 and second.run()
    one, other = (load_checkpoint(trainer.checkpoint_path) for trainer in (whole, second))
    for part in ("model", "ema"):
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())
    assert bool(one["ema"]["action_embedding.weight"][:, 2].any())  # the flag is learned
    held_out = next(record for record in records if "validation_loss" in record)
    assert {f"held_out/prefix_{n}" for n in (0, 1, 3, 5, 8)} < held_out.keys()


def test_known_tokens_make_the_others_easier_to_tell(config: TrainConfig, tmp_path: Path) -> None:
    longer = override(config, run={"steps": 60, "batch": 32}, optimizer={"learning_rate": 3e-3})
    trainer = Trainer(changed(longer, warm_start=None), tmp_path)
    for _ in range(60):
        trainer.train_step()
    losses = trainer.validate_prefixes()
    assert list(losses) == [0, 1, 3, 5, 8]
    assert losses[8] < losses[0]


def test_another_policy_to_start_from_is_refused_on_resuming(config: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(config, tmp_path / "run")
    trainer.save()
    teacher = Trainer(changed(override(config, policy={"prefix": 0}), warm_start=None), tmp_path / "other")
    teacher.save()
    with pytest.raises(CheckpointError, match="other files than warm_start names now"):
        Trainer(changed(config, warm_start=str(tmp_path / "other")), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"differs in warm_start\)"):
        Trainer(changed(config, warm_start=None), tmp_path / "run")


def test_a_policy_with_known_tokens_goes_on_with_them_or_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(config, tmp_path)
    trainer.save()
    weights = read_policy_weights(tmp_path, config.policy.model_copy(update={"prefix": 4}))
    assert weights.prefix == LONGEST and weights.state["action_embedding.weight"].shape[1] == 3
    with pytest.raises(WarmStartError, match=r"prefix 8 \(this run: 0\)"):
        read_policy_weights(tmp_path, config.policy.model_copy(update={"prefix": 0}))


def test_a_sample_without_known_tokens_is_read_as_it_is(plain: TrainConfig) -> None:
    data: Callable[..., Batch] = PolicyData(plain).draw
    batch = data(PolicyData(plain).windows, 0, 2)
    assert conditioned(batch.noise, batch) is batch.noise and not known_tokens(batch).any()
