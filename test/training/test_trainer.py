from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training import checkpoint as checkpoint_module
from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from training.config import ConfigError, TrainConfig, override
from training.data.episodes import DataError
from training.schedules import ema_decay, learning_rate_factor, step_seed
from training.trainer import Trainer, TrainingError

Config = Callable[..., TrainConfig]


def assert_equal(first: Any, second: Any, where: str = "") -> None:
    """Compare nested checkpoints bit for bit."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}.{key}")
    else:
        assert first == second, where


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    tiny_config: Config, tmp_path: Path, precision: str
) -> None:
    config = tiny_config(precision=precision)
    whole = Trainer(config, tmp_path / "whole")
    assert whole.run()
    first = Trainer(config, tmp_path / "parts")
    for _ in range(4):
        first.train_step()
    first.save()
    second = Trainer(config, tmp_path / "parts")
    assert second.step == 4
    assert second.run()
    one, other = (load_checkpoint(trainer.checkpoint_path) for trainer in (whole, second))
    assert [entry["step"] for entry in one.pop("history")] == [0]
    assert [entry["step"] for entry in other.pop("history")] == [4]
    assert_equal(one, other)


def test_training_lowers_the_loss(tiny_config: Config, tmp_path: Path) -> None:
    config = override(tiny_config(steps=40, batch=32, log_every=5), optimizer={"learning_rate": 3e-3})
    losses: list[float] = []
    assert Trainer(config, tmp_path).run(
        lambda record: losses.append(record.get("loss", losses[-1] if losses else 1.0))
    )
    assert losses[-1] < 0.6 * losses[0]


def test_records_are_logged_with_step_and_validation_loss(tiny_config: Config, tmp_path: Path) -> None:
    records: list[dict[str, float]] = []
    Trainer(tiny_config(), tmp_path).run(records.append)
    assert [record["step"] for record in records] == [2, 4, 6]
    assert [record["step"] for record in records if "validation_loss" in record] == [4]


def test_a_loss_that_is_not_finite_stops_by_step_and_keeps_the_checkpoint(tiny_config: Config, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(), tmp_path)
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    kept = trainer.checkpoint_path.read_bytes()
    trainer.windows.action[:] = float("nan")
    with pytest.raises(TrainingError, match=r"step 3: loss is nan.*checkpoint\.pt, is kept"):
        trainer.run()
    assert trainer.checkpoint_path.read_bytes() == kept


def test_a_gradient_that_is_not_finite_updates_nothing(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_config(), tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    original = trainer.loss

    def with_infinite_gradient(*args: Any) -> torch.Tensor:
        loss = original(*args)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(trainer, "loss", with_infinite_gradient)
    with pytest.raises(TrainingError, match="step 0: gradient norm"):
        trainer.run()
    assert_equal(trainer.model.state_dict(), before)
    assert not trainer.checkpoint_path.exists()


def test_a_checkpoint_of_another_configuration_is_refused_by_field(tiny_config: Config, tmp_path: Path) -> None:
    Trainer(tiny_config(), tmp_path).run()
    with pytest.raises(CheckpointError, match=r"differs in run\.batch\)"):
        Trainer(tiny_config(batch=4), tmp_path)
    with pytest.raises(CheckpointError, match=r"differs in run\.batch\)"):
        Trainer(tiny_config(batch=4), tmp_path, change=["run.steps"])
    moved = override(tiny_config(), data={"path": tiny_config().data.path}, run={"log_every": 1})
    assert Trainer(moved, tmp_path).step == 6  # bookkeeping may differ


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no checkpoint"])
def test_a_damaged_checkpoint_is_refused_by_name(
    tiny_config: Config, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    trainer = Trainer(tiny_config(), tmp_path)
    trainer.save()
    trainer.checkpoint_path.write_bytes(damage(trainer.checkpoint_path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        Trainer(tiny_config(), tmp_path)


def test_a_failure_while_writing_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def full_disk(payload: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_data_that_does_not_fit_the_policy_is_refused_before_training(tiny_config: Config, tmp_path: Path) -> None:
    config = override(tiny_config(), policy={"observation_dim": 21})
    with pytest.raises(DataError, match="observation_dim 20, the policy declares 21"):
        Trainer(config, tmp_path)


def test_what_a_bundle_would_refuse_is_refused_before_training(tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exceeds horizon 16"):
        Trainer(tiny_config().model_copy(update={"executed_actions": 16}), tmp_path)


def test_the_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    factors = [learning_rate_factor(step, 10, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.1)


def test_averaging_starts_at_once_and_reaches_its_maximum() -> None:
    assert ema_decay(0, 0.75, 0.9995) == 0.0
    assert ema_decay(10**9, 0.75, 0.9995) == 0.9995


def test_every_step_has_its_own_seed() -> None:
    assert len({step_seed(seed, step) for seed in range(3) for step in range(500)}) == 1500


def test_another_length_is_continued_only_when_that_is_said(tiny_config: Config, tmp_path: Path) -> None:
    Trainer(tiny_config(), tmp_path).run()
    with pytest.raises(CheckpointError, match=r"differs in run\.steps\).*--change-length permits"):
        Trainer(tiny_config(steps=8), tmp_path)
    longer = Trainer(tiny_config(steps=8), tmp_path, change=["run.steps"])
    assert longer.run()
    planned = [(entry["step"], entry["planned_steps"]) for entry in load_checkpoint(longer.checkpoint_path)["history"]]
    assert planned == [(0, 6), (6, 8)]
    Trainer(tiny_config(steps=8), tmp_path).run()  # nothing is left to do: no start to record
    assert len(load_checkpoint(longer.checkpoint_path)["history"]) == 2


def test_other_data_behind_the_same_configuration_are_refused(
    tiny_config: Config, tmp_path: Path, npz: Path, arrays: dict[str, np.ndarray]
) -> None:
    trainer = Trainer(tiny_config(), tmp_path / "run")
    trainer.save()
    arrays["action"][5] += 1.0
    np.savez(npz, **arrays)
    with pytest.raises(CheckpointError, match=r"trained on other data than .*differs in data_sha256"):
        Trainer(tiny_config(), tmp_path / "run")
    payload = load_checkpoint(trainer.checkpoint_path)
    for key in ("data_sha256", "history", "config_file"):
        del payload[key]
    save_checkpoint(trainer.checkpoint_path, payload)  # as older versions wrote it
    assert Trainer(tiny_config(), tmp_path / "run").step == 0
    arrays["action"][:, 0] *= 0.5
    np.savez(npz, **arrays)
    with pytest.raises(CheckpointError, match="differs in action_norm"):
        Trainer(tiny_config(), tmp_path / "run")


def test_a_history_that_is_none_is_refused_by_file(tiny_config: Config, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(), tmp_path)
    save_checkpoint(trainer.checkpoint_path, trainer.payload() | {"history": [{"step": "first"}]})
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        Trainer(tiny_config(), tmp_path)


def test_conditions_that_break_the_repetition_are_told(tiny_config: Config, tmp_path: Path) -> None:
    Trainer(tiny_config(), tmp_path).save()
    assert Trainer(tiny_config(), tmp_path).changed == ()
    assert Trainer(tiny_config(threads=2), tmp_path).changed == ("threads 1 -> 2",)


def test_validation_does_not_wait_for_a_log_step_and_the_last_window_is_logged(
    tiny_config: Config, tmp_path: Path
) -> None:
    records: list[dict[str, float]] = []
    Trainer(tiny_config(steps=5, log_every=3, validate_every=2), tmp_path).run(records.append)
    assert [record["step"] for record in records if "validation_loss" in record] == [2, 4]
    assert [record["step"] for record in records if "loss" in record] == [3, 5]


@pytest.mark.parametrize("kind", ["mean_std", "identity"])
def test_actions_beyond_what_the_sampler_keeps_are_refused_before_training(
    tiny_config: Config, tmp_path: Path, kind: str
) -> None:
    config = tiny_config()
    document = config.data.action.model_dump(mode="json") | {"normalizer": kind}
    with pytest.raises(ConfigError, match=rf"normalizer {kind} .*clip_sample cuts at 1"):
        Trainer(override(config, data={"action": document}), tmp_path)
    wide = override(config, data={"action": document}, diffusion={"clip_sample": 600.0})
    assert Trainer(wide, tmp_path).step == 0
