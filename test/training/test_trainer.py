from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcqfa_ros import atomic
from test.training.conftest import EPISODE_LENGTHS
from training import checkpoint as checkpoint_module
from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from training.config import ConfigError, TrainConfig, override
from training.data.episodes import DataError
from training.identity import CHANGEABLE
from training.log import TensorBoardLog
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


def test_samples_that_are_not_finite_are_named_by_window_and_episode(tiny_config: Config, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(), tmp_path)
    batch = trainer.data.draw(trainer.windows, step_seed(42, 0), 8)
    window = int(batch.index[3])
    trainer.windows.action[window, 2] = float("inf")
    episode = trainer.windows.episodes[window]
    with pytest.raises(TrainingError) as caught:
        trainer.train_step()
    assert "step 0: loss is " in str(caught.value) and "no checkpoint had been written yet" in str(caught.value)
    assert str(caught.value).endswith(
        f"Observations or actions are not finite in window {window} (episode {episode}). Mend these data and give "
        "another --out"
    )


def test_windows_know_their_episode(tiny_config: Config, tmp_path: Path) -> None:
    data = Trainer(tiny_config(), tmp_path).data
    assert set(data.windows.episodes) | set(data.held_out.episodes) == set(range(len(EPISODE_LENGTHS)))
    for windows in (data.windows, data.held_out):
        horizon, before, after = 16, 1, 7
        found = {int(episode): int((windows.episodes == episode).sum()) for episode in set(windows.episodes)}
        assert found == {episode: EPISODE_LENGTHS[episode] - horizon + 1 + before + after for episode in found}


def test_a_batch_of_finite_samples_is_named_by_its_draw_with_a_rate_that_can_be_lowered(
    tiny_config: Config, tmp_path: Path
) -> None:
    trainer = Trainer(tiny_config(), tmp_path)
    with torch.no_grad():
        trainer.weights[0].fill_(float("inf"))
    first = sorted(set(trainer.data.draw(trainer.windows, step_seed(42, 0), 8).index.tolist()))[0]
    with pytest.raises(
        TrainingError, match=rf"finite numbers: windows {first} \(episode .*run\.seed 42 .* step 0"
    ) as it:
        trainer.train_step()
    assert "Lower optimizer.learning_rate: train anew with it and another --out" in str(it.value)
    assert "--change-optimizer" not in str(it.value)
    Trainer(tiny_config(), tmp_path).save()
    with pytest.raises(TrainingError, match="go on from the checkpoint with it and --change-optimizer"):
        trainer.train_step()


@pytest.mark.parametrize("rate", [1e8, 1e30])
def test_weights_that_have_diverged_never_replace_a_checkpoint(
    tiny_config: Config, tmp_path: Path, rate: float
) -> None:
    config = override(tiny_config(checkpoint_every=1), optimizer={"learning_rate": rate, "warmup_steps": 0})
    trainer = Trainer(config, tmp_path)
    trainer.save()
    kept = trainer.checkpoint_path.read_bytes()
    with pytest.raises(
        TrainingError, match=r"step 1: the weights have diverged, up to .*; they were not .*is kept\. Lower"
    ):
        trainer.run()
    assert trainer.checkpoint_path.read_bytes() == kept
    with torch.no_grad():
        for weight in trainer.weights:
            weight.fill_(0.1)
        trainer.averaged[0].view(-1)[0] = float("nan")
    with pytest.raises(TrainingError, match="have diverged, up to nan"):
        trainer.save()


def test_another_optimizer_is_continued_with_only_when_that_is_said_and_then_used(
    tiny_config: Config, tmp_path: Path
) -> None:
    Trainer(tiny_config(), tmp_path).run()
    other = {"learning_rate": 1e-5, "betas": (0.5, 0.6), "weight_decay": 0.0}
    config = override(tiny_config(steps=8), optimizer=other)
    with pytest.raises(
        CheckpointError,
        match=r"differs in optimizer\.betas, .*--change-optimizer permits another optimizer\.betas",
    ):
        Trainer(config, tmp_path)
    continued = Trainer(config, tmp_path, change=[*CHANGEABLE])
    assert continued.changed == (
        "optimizer.betas [0.9, 0.95] -> [0.5, 0.6]",
        "optimizer.learning_rate 0.0003 -> 1e-05",
        "optimizer.weight_decay 0.1 -> 0.0",
    )
    assert all(group["betas"] == (0.5, 0.6) and not group["weight_decay"] for group in continued.optimizer.param_groups)
    assert continued.optimizer.state_dict()["state"]
    continued.train_step()
    assert continued.optimizer.param_groups[0]["lr"] <= 1e-5


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
    moved = moved.model_copy(update={"name": "another", "task": "Another text"})
    assert Trainer(moved, tmp_path).step == 6  # bookkeeping may differ


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], r"PytorchStreamReader failed.*"),
        (lambda data: b"no checkpoint", ".*"),
        (lambda data: b"", "it is empty"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_with_what_to_do(
    tiny_config: Config, tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    trainer = Trainer(tiny_config(), tmp_path)
    trainer.save()
    trainer.checkpoint_path.write_bytes(damage(trainer.checkpoint_path.read_bytes()))
    advice = "restore a copy of it, or remove it and train again, or give another folder"
    with pytest.raises(
        CheckpointError, match=rf"checkpoint\.pt: not a readable checkpoint \({reason}\); {advice}"
    ) as it:
        Trainer(tiny_config(), tmp_path)
    assert "\n" not in str(it.value)


def full_disk_from_now_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make temporary files of checkpoints ones that take no byte."""

    def full(path: Path, _: int) -> int:
        path.touch()
        return os.open("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(atomic, "_new", full)


@pytest.mark.parametrize("megabytes", [0, 3])
def test_a_full_disk_is_told_with_what_to_free_and_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, megabytes: int
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    full_disk_from_now_on(monkeypatch)
    payload = {"step": 2, "weights": [torch.zeros(250_000)] * megabytes}
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(path, payload)
    assert str(caught.value) == (
        f"{path}: cannot be written (No space left on device); the previous file is untouched; free "
        f"{max(1, megabytes)} MB and run the same command again"
    )
    assert isinstance(caught.value.__cause__, OSError)
    assert load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_an_error_of_torch_behind_a_full_disk_is_told_as_one_and_a_defect_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes(payload: Any, file: Any) -> None:
        try:
            file.write(bytes(1 << 20))
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0") from None

    def defect(payload: Any, file: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(checkpoint_module.torch, "save", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        save_checkpoint(tmp_path / "checkpoint.pt", {"step": 2})
    monkeypatch.setattr(checkpoint_module.torch, "save", writes)
    full_disk_from_now_on(monkeypatch)
    with pytest.raises(CheckpointError, match=r"written \(No space left on device\); free 1 MB"):
        save_checkpoint(tmp_path / "checkpoint.pt", {"step": 2})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/checkpoint\.pt: cannot be written \(.*\); let .*file be written"):
        save_checkpoint(tmp_path / "file" / "checkpoint.pt", {"step": 1})


def test_others_may_read_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1})
    assert stat.S_IMODE((tmp_path / "checkpoint.pt").stat().st_mode) == 0o644


def test_a_log_that_cannot_be_written_is_told_once_and_training_goes_on(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path_open = Path.open

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        return path_open(Path("/dev/full") if "tfevents" in path.name else path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    trainer = Trainer(tiny_config(log_every=1), tmp_path)
    with closing(TensorBoardLog(tmp_path)) as log:
        assert trainer.run(log)
    errors = capsys.readouterr().err
    assert errors.count("warning: ") == 1 and "Traceback" not in errors
    assert f"{tmp_path}: TensorBoard events cannot be written (No space left on device); training goes on" in errors
    assert load_checkpoint(trainer.checkpoint_path)["step"] == 6


def test_a_continued_log_hides_what_the_run_before_logged_beyond_its_checkpoint(tmp_path: Path) -> None:
    for first, steps in ((0, (1, 2, 3, 4)), (3, (3, 4))):
        with closing(TensorBoardLog(tmp_path, first)) as log:
            for step in steps:
                log({"step": float(step), "loss": first + step / 10, "a/b": 1.0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "a/b"}
    scalars = [(entry.step, entry.value) for entry in events.Scalars("train/loss")]
    assert scalars == [(step, pytest.approx(value)) for step, value in ((1, 0.1), (2, 0.2), (3, 3.3), (4, 3.4))]


def test_data_that_does_not_fit_the_policy_is_refused_before_training(tiny_config: Config, tmp_path: Path) -> None:
    config = override(tiny_config(), policy={"observation_dim": 21})
    with pytest.raises(DataError, match="observation_dim 20, the policy declares 21"):
        Trainer(config, tmp_path)


def test_a_device_that_is_not_there_is_refused_before_training(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"run\.device: cuda .* no CUDA device; use cpu \(--device cpu\)"):
        Trainer(tiny_config(device="cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


def test_a_checkpoint_is_written_only_where_a_step_was_done(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda trainer: (saved.append(trainer.step), save(trainer)))
    trainer = Trainer(tiny_config(), tmp_path)
    assert trainer.run() and saved == [3, 6]
    before = trainer.checkpoint_path.stat()
    assert trainer.run() and Trainer(tiny_config(), tmp_path).run()
    assert (saved, trainer.checkpoint_path.stat().st_ino) == ([3, 6], before.st_ino)
    assert Trainer(tiny_config(steps=8), tmp_path, change=["run.steps"]).run() and saved == [3, 6, 8]


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
