from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from dcqfa_ros.errors import UserError
from training import commands
from training.checkpoint import CheckpointError, load_checkpoint
from training.commands import ArgumentError
from training.compact import pack
from training.config import ConfigError, TrainConfig, load_config
from training.distill import DistillTrainer
from training.distill_config import DistillConfig
from training.evaluate import evaluate
from training.rollouts_group import RolloutError, Visited
from training.rollouts_workers import OwnProcess
from training.run import TrainingError
from training.supernet import SupernetTrainer
from training.supernet_checkpoint import load_supernet
from training.world import WorldError

from .conftest import SupernetFiles

Make = Callable[..., DistillTrainer]
ROUND = {"worlds": 4, "groups": 2, "calls": 2, "horizons": [1, 2], "collect_every": 2, "buffer": 24}


@pytest.fixture(scope="module")
def document(supernet_files: SupernetFiles, supernet_run: Path) -> dict[str, Any]:
    """A distillation of the tiny supernet for six steps."""
    found = yaml.safe_load(supernet_files.config.read_text())
    found["supernet"].update(width_from=0.0, depth_from=0.0)
    found["distill"] = {"start": str(supernet_run), "denoising_steps": 2, "warmup_steps": 3, "workers": 1, **ROUND}
    return dict(found)


@pytest.fixture
def configured(document: dict[str, Any], tmp_path: Path) -> Callable[..., TrainConfig]:
    """Return a factory of configurations; its arguments replace fields of ``distill``, ``sections`` of others."""

    def make(sections: dict[str, dict[str, Any]] | None = None, **distill: Any) -> TrainConfig:
        changed = document | {name: document[name] | fields for name, fields in (sections or {}).items()}
        path = tmp_path / "distill.yaml"
        path.write_text(yaml.safe_dump(changed | {"distill": document["distill"] | distill}, sort_keys=False))
        return load_config(path)

    return make


@pytest.fixture
def make(configured: Callable[..., TrainConfig], tmp_path: Path) -> Make:
    """Return a factory of trainers; see ``configured``."""
    return lambda folder="run", **fields: DistillTrainer(configured(**fields), tmp_path / folder)


def weights_of(trainer: DistillTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# Configuration -------------------------------------------------------------------------------------------------------


def test_horizon_grows_in_equal_parts_and_the_teacher_fades_out_by_half() -> None:
    config = DistillConfig(start="somewhere")
    assert [config.horizon(p) for p in (0.0, 0.19, 0.2, 0.4, 0.6, 0.8, 0.99, 1.0)] == [1, 1, 2, 4, 8, 16, 16, 16]
    assert [config.teacher_acts(p) for p in (0.0, 0.25, 0.5, 0.9)] == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"worlds": 5}, "do not divide"),
        ({"horizons": (1, 4)}, "exceeds the calls"),
        ({"buffer": 7}, "does not hold one round"),
        ({"path_share": 1.5}, "less than or equal to 1"),
        ({"horizons": ()}, "at least 1"),
        ({"weight": 0.0}, "greater than 0"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_impossible_rounds_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DistillConfig(**({"start": "s", **ROUND, "horizons": (1, 2)} | fields))


def test_the_section_needs_a_supernet_of_key_points_and_ddim(document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for change, message in (
        ({"supernet": None}, "distill needs section supernet"),
        ({"diffusion": document["diffusion"] | {"sampler": "ddpm"}}, "sampler ddim"),
        ({"distill": document["distill"] | {"denoising_steps": 101}}, "denoising_steps: expected 1 to 100"),
    ):
        path.write_text(yaml.safe_dump(document | change))
        with pytest.raises(ConfigError, match=message):
            load_config(path)


def test_the_shipped_files_differ_in_the_states_alone() -> None:
    folder = Path(__file__).parents[2] / "config/training"
    method, control = (
        load_config(folder / f"{name}.yaml").model_dump(exclude={"name"})
        for name in ("pusht_keypoints_opd", "pusht_keypoints_opd_control")
    )
    assert (method["distill"].pop("states"), control["distill"].pop("states")) == ("rollouts", "demonstrations")
    assert method == control


# Training ------------------------------------------------------------------------------------------------------------


def test_it_starts_from_the_averaged_supernet_and_its_sampler(make: Make, supernet_run: Path) -> None:
    trainer, start = make(), load_supernet(supernet_run)
    for name, value in start.network.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    expected = start.sampler(trainer.sampler.state_dict())["network"]
    assert all(torch.equal(trainer.sampler.state_dict()["network"][name], expected[name]) for name in expected)


def test_a_resumed_run_repeats_the_uninterrupted_one_with_its_buffer(make: Make, tmp_path: Path) -> None:
    whole = make("whole")
    assert whole.run()
    part = make("part")
    for _ in range(3):
        part.train_step()
    part.save()
    again = make("part")
    assert again.step == 3 and again.buffer.count == part.buffer.count == 16
    assert again.run()
    assert torch.equal(weights_of(whole), weights_of(again)) and whole.teacher_calls == again.teacher_calls
    ours, theirs = (trainer.buffer.state_dict()["arrays"] for trainer in (whole, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [json.loads(line)["step"] for line in (tmp_path / "part/log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 6


def test_the_control_makes_as_many_teacher_calls_and_differs_in_states_alone(make: Make) -> None:
    method, control = make("method"), make("control", states="demonstrations")
    for step, acting in ((0, 8), (4, 0)):  # of the 8 calls of a round
        method.step = control.step = step
        for ours, theirs in zip(method.jobs(), control.jobs(), strict=True):
            assert (ours.closed, theirs.closed) == (True, False)
            assert ours.subnet == theirs.subnet and ours.seeds == theirs.seeds
            assert (ours.horizon, ours.first_call) == (theirs.horizon, theirs.first_call) == (1 + step // 4, 2 * step)
            for name in ("starts", "teacher_acts", "teacher_asked"):
                assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
        assert sum(int(job.teacher_acts.sum()) for job in method.jobs()) == acting
        before = method.teacher_calls
        records = [trainer.train_step() for trainer in (method, control)]
        asked = method.teacher_calls - before
        assert method.teacher_calls == control.teacher_calls and (asked == 8 if acting else 0 < asked < 8)
        assert method.buffer.count == control.buffer.count == (8 if step == 0 else 16)
        assert records[0].keys() == records[1].keys()
    control_states = control.buffer.state_dict()["arrays"]["observation"]
    demonstrations = control.windows.observation
    assert isinstance(demonstrations, torch.Tensor)
    assert all(any(torch.equal(state, window) for window in demonstrations) for state in control_states)


def test_the_loss_on_visited_states_moves_the_weights_by_its_weight(make: Make) -> None:
    heavy, light = make("heavy", weight=1000.0, warmup_steps=0), make("light", weight=1e-9, warmup_steps=0)
    records = [trainer.train_step() for trainer in (heavy, light)]
    low = next(name for name in records[0] if name.startswith("opd/"))
    assert records[0][low] == pytest.approx(records[1][low]) and records[0][low] > 0.0
    assert records[0]["loss"] > records[1]["loss"]
    assert not torch.equal(weights_of(heavy), weights_of(light))


def test_weight_warms_up(make: Make) -> None:
    trainer, found = make(weight=2.0), []
    for trainer.step in range(4):
        found.append(trainer.weight())
    assert found == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])


def test_one_subnet_alone_drives_and_is_trained(make: Make) -> None:
    trainer = make(sections={"supernet": {**yaml_supernet(make), "only": "w4a4"}})
    assert {job.subnet for job in trainer.jobs()} == {trainer.space.parse("w4a4")}
    assert "opd/only" in trainer.train_step()


def yaml_supernet(make: Make) -> dict[str, Any]:
    options = make("options").config.model_dump(mode="json")["supernet"]
    return {name: value for name, value in options.items() if value is not None}


def test_drivers_are_biased_to_few_bits(make: Make) -> None:
    trainer = make(low_share=0.0, candidates=4)
    plain = make("plain", low_share=0.0, candidates=1)
    bits = []
    for owner in (trainer, plain):
        generator = torch.Generator().manual_seed(0)
        drawn = [owner.driver(generator) for _ in range(40)]
        layers = [layer for subnet in drawn for layer in subnet.layers if layer is not None]
        bits.append(float(np.mean([layer.w + layer.a for layer in layers])))
    assert bits[0] < bits[1]
    always = make("low", low_share=1.0)
    assert always.driver(torch.Generator().manual_seed(1)) == always.space.parse("w4a4")


def test_a_start_of_another_teacher_or_space_is_refused(make: Make, configured: Callable[..., TrainConfig]) -> None:
    options = configured().model_dump(mode="json")["supernet"]
    space = {**options["space"], "head_ratios": [0.5, 1.0]}
    with pytest.raises(ConfigError, match=r"supernet\.space is another one"):
        make(sections={"supernet": {"space": space}})
    with pytest.raises(ConfigError, match="executed_actions is another one"):
        DistillTrainer(configured().model_copy(update={"executed_actions": 4}), Path("nowhere"))
    with pytest.raises(ConfigError, match=r"distill\.low: "):
        make(low="w2a2")
    with pytest.raises(ConfigError, match=r"supernet\.activations: batchquant estimates ranges"):
        make(sections={"supernet": {"activations": "batchquant"}})


def test_a_packed_distillation_is_evaluated_and_started_from_but_not_continued(make: Make, tmp_path: Path) -> None:
    trainer = make("whole")
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    whole, packed = trainer.checkpoint_path, tmp_path / "packed/checkpoint.pt"
    pack(whole, packed)
    assert {"buffer", "teacher_calls"} <= load_checkpoint(whole).keys()
    assert "buffer" not in load_checkpoint(packed) and "teacher_calls" in load_checkpoint(packed)
    scores = [evaluate(str(path), "w4a4", range(2), steps=1)["scores"] for path in (whole, packed)]
    assert len(scores[0]) == len(scores[1]) == 2
    assert make("further", start=str(packed)).step == 0
    with pytest.raises(CheckpointError, match=r"packed/checkpoint\.pt: is packed, without the visited states"):
        make("packed")


def test_a_start_that_changed_and_checkpoints_of_other_runs_are_refused(
    make: Make, supernet_run: Path, tmp_path: Path
) -> None:
    trainer = make()
    trainer.train_step()
    trainer.save()
    payload = load_checkpoint(supernet_run / "checkpoint.pt")
    name = next(iter(payload["ema"]))
    payload["ema"][name] = payload["ema"][name] + 1.0
    other = tmp_path / "other.pt"
    torch.save(payload, other)
    with pytest.raises(CheckpointError, match=r"other files than distill\.start"):
        make(start=str(other))
    with pytest.raises(CheckpointError, match=r"differs in distill\.states"):
        make(states="demonstrations")


def test_several_training_processes_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.world.World.__init__", lambda self: self.__dict__.update(size=2, rank=0))
    with pytest.raises(WorldError, match="one process"):
        make()


def test_a_diverged_step_updates_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    before = weights_of(trainer)
    monkeypatch.setattr(trainer, "weight", lambda: float("nan"))
    with pytest.raises(TrainingError, match="is nan"):
        trainer.train_step()
    assert trainer.step == 0 and torch.equal(weights_of(trainer), before)


def test_a_signal_keeps_a_checkpoint_and_ends_the_workers(make: Make) -> None:
    trainer = make(workers=2)
    original, processes = trainer.collect, []

    def collect() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        found = original()
        processes.extend(multiprocessing.active_children())
        return found

    trainer.collect = collect  # type: ignore[method-assign]
    assert not trainer.run()
    assert trainer.checkpoint_path.exists() and trainer.step == 1 and trainer._workers is None
    assert len(processes) == 2 and not multiprocessing.active_children()


def test_a_round_that_fails_keeps_the_steps_before_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, whole = make(sections={"run": {"checkpoint_every": 100}}), make("whole")
    assert whole.run()
    original = OwnProcess.run

    def run(workers: OwnProcess, *given: Any) -> list[Visited]:
        if trainer.step == 2:
            raise RolloutError("a process was killed")
        return original(workers, *given)

    monkeypatch.setattr(OwnProcess, "run", run)
    with pytest.raises(RolloutError, match="was killed"):
        trainer.run()
    monkeypatch.undo()
    again = make()
    assert again.step == 2 and again.run() and torch.equal(weights_of(whole), weights_of(again))


def test_where_rollouts_run_is_checked_before_anything_is_written(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    with pytest.raises(RolloutError, match="--ray somewhere: expected auto"):
        make(ray="somewhere").run()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"requirements/ray\.txt"):
        make(ray="auto").run()
    assert not (tmp_path / "run").exists()


def test_the_log_is_only_written_anew_where_lines_are_dropped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    for _ in range(2):
        trainer.train_step()
    trainer.save()
    log, kept = trainer.folder / "log.jsonl", ['{"step": 1.0, "loss": 3.0}', '{"step": 2.0, "loss": 2.0}']
    log.write_text("\n".join([*kept, '{"step": 3.0, "loss": 1.0}', '{"step": 4.0, "lo']))
    monkeypatch.setattr(SupernetTrainer, "run", lambda run, log: True)
    before = log.stat().st_ino
    assert make().run() and log.read_text().splitlines() == kept
    after = log.stat().st_ino  # replaced, not truncated
    assert before != after and make().run() and log.stat().st_ino == after


def test_a_log_that_cannot_be_written_ends_with_a_warning_and_training_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, path_open, records = make(), Path.open, [{"step": 1.0}, {"step": 2.0}]
    log = trainer.folder / "log.jsonl"

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        return path_open(Path("/dev/full") if path == log else path, *arguments, **options)

    seen: list[dict[str, float]] = []
    monkeypatch.setattr(SupernetTrainer, "run", lambda run, log: [log(record) for record in records] != [])
    monkeypatch.setattr(Path, "open", full)
    assert trainer.run(seen.append) and seen == records
    errors = capsys.readouterr().err
    assert errors.count("warning") == 1 and f"{log}: cannot be written (No space left on device); training" in errors


# Command -------------------------------------------------------------------------------------------------------------


def test_the_command_trains_on_another_start_and_refuses_rollouts_without_a_section(
    configured: Callable[..., TrainConfig],
    supernet_files: SupernetFiles,
    supernet_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    commands.train(parser.add_subparsers())

    def command(*arguments: object) -> int:
        args = parser.parse_args(["train", *map(str, arguments)])
        return int(args.func(args))

    configured(start="nowhere")
    out = tmp_path / "out"
    config = tmp_path / "distill.yaml"
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint"):
        command("--config", config, "--out", out)
    assert command("--config", config, "--out", out, "--start", supernet_run, "--workers", 1, "--json") == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["complete"] and outcome["step"] == 6 and "w4a4" in outcome["held_out"]
    assert load_supernet(out).space.name(load_supernet(out).space.parse("w4a4")) == "d2-h1-m2-w4a4"
    for option, value in (("--start", supernet_run), ("--ray", "local"), ("--workers", 1)):
        with pytest.raises(ArgumentError, match=f"{option}: .* has no distill section"):
            command("--config", supernet_files.config, option, value)
