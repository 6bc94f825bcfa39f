"""The training benchmark measures whole steps in turn, pairs them within a round, and finds what a switch allocates."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from dcqfa_ros.commands import bench as bench_command
from test.training.conftest import SupernetFiles
from training import bench_train as module
from training.bench_contenders import PlainContender, SupernetContender, random_batch
from training.bench_train import (
    NewTensors,
    Options,
    Stopwatch,
    TrainBenchError,
    TrainReport,
    bench_train,
    sampled_subnets,
    switching,
)
from training.config import ConfigError, TrainConfig
from training.objective import Objective
from training.sandwich import Member, search_space
from training.schedules import step_seed
from training.subnet import Precision, Subnet
from training.supernet import SupernetTrainer
from training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few draws and repeats."""
    for name, value in {
        "DRAWS": 2,
        "FORWARD_REPEATS": 2,
        "FORWARD_BATCH": 4,
        "SWITCHES": 50,
        "WARM_UP_ROUNDS": 1,
    }.items():
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def config(supernet_config: Callable[..., TrainConfig]) -> TrainConfig:
    return supernet_config()


@pytest.fixture
def report(quick: None, config: TrainConfig) -> TrainReport:
    return bench_train(config, Options(batch=4, threads=1, rounds=3, compile=False))


# -- the report -------------------------------------------------------------------------------------------------------


def test_every_figure_is_there_and_hangs_together(report: TrainReport, config: TrainConfig) -> None:
    for field in dataclasses.fields(report):
        value = getattr(report, field.name)
        if isinstance(value, float) and field.name != "warm_up_s":
            assert value > 0.0, field.name
    assert report.set_with_teacher_ratio > report.set_ratio > 1.0  # four networks against one
    labels = [part.label for part in report.parts]
    assert labels == ["largest", "w4a4", "smallest", "sampled 0", "sampled 1", "stem", "update"]
    space = search_space(config)
    assert [space.parse(p.subnet).precision for p in report.parts[:3] if p.subnet] == [
        Precision.FP32, Precision.INT, Precision.INT,
    ]  # fmt: skip
    low = {"largest w4a4", "smallest w4a4", "largest w4a4 as trained", "smallest w4a4 as trained"}
    assert set(report.forward_ms) == low | {"largest fp32", "smallest fp32"}
    assert report.supernet_parameters > report.plain_parameters
    assert (report.batch, report.rounds, report.threads, report.compile) == (4, 3, 1, False)
    assert json.loads(json.dumps(dataclasses.asdict(report)))["switch_parameter_bytes"] == 0


def test_ratios_are_paired_within_a_round(quick: None, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def time(self: Stopwatch, name: str, work: Callable[[], object]) -> None:
        slowness = 10.0 ** len(self.rounds)  # every round ten times as slow as the one before
        named = {
            "plain": 2.0,
            "low step": 3.0,
            "update": 0.5,
            "teacher": 1.0,
            "stem forward": 0.1,
            "stem backward": 0.4,
        }
        self.rounds[-1][name] = slowness * named.get(name, 2.5)

    monkeypatch.setattr(Stopwatch, "time", time)
    report = bench_train(config, Options(batch=2, rounds=3, compile=False))
    assert report.w4a4_step_ratio == 1.5
    assert report.set_ratio == (4 * 2.5 + 0.5 + 0.5) / 2.0
    assert report.set_with_teacher_ratio == report.set_ratio + 0.5
    assert report.smallest_forward_ratio == report.smallest_forward_fp32_ratio == 1.0
    assert report.smallest_forward_training_ratio == 1.0
    assert report.plain_step_ms == 2e3 * 10.0**2  # the middle round


def test_contenders_take_turns(quick: None, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(
        Stopwatch, "time", lambda self, name, work: (self.rounds[-1].update({name: 1.0}), order.append(name))
    )
    bench_train(config, Options(batch=2, rounds=4, compile=False))
    places = [order.index("plain", start) - start for start in range(0, len(order), len(order) // 5)]
    assert len(set(places)) == 4


def test_sampled_networks_are_the_same_every_time_and_differ(config: TrainConfig) -> None:
    space = search_space(config)
    drawn = sampled_subnets(space, 8)
    assert drawn == sampled_subnets(space, 8)
    assert len(set(drawn)) > 4


# -- the steps --------------------------------------------------------------------------------------------------------


def test_both_steps_train(config: TrainConfig) -> None:
    objective, batch = Objective(config, CPU), random_batch(config, 8, CPU)
    plain = PlainContender(config, objective, False)
    supernet = SupernetContender(config, objective, False, batch)
    space = search_space(config)
    low, alpha = space.largest(Precision.INT, 4, 4), torch.ones(8)
    target = supernet.teach(batch)
    before = objective.loss(plain.model, batch).item()
    supernet.model.activate(low)
    low_before = objective.loss(supernet.model, batch).item()
    for _ in range(12):
        plain.step(batch)
        stem = supernet.begin(batch)
        supernet.learn(low, stem, batch, target, alpha)
        stem.backward()
        supernet.update()
    assert objective.loss(plain.model.eval(), batch).item() < before
    assert objective.loss(supernet.model, batch).item() < low_before
    averaged, weights = supernet._averaged, supernet._weights
    assert any(not torch.equal(a, w) for a, w in zip(averaged, weights, strict=True))
    assert all(w.grad is None for w in weights)


def test_plain_step_is_that_of_the_trainer(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(batch=8)
    trainer = Trainer(config, tmp_path / "run", resume=False)
    batch = random_batch(config, 8, CPU)
    monkeypatch.setattr(trainer.data, "draw", lambda *_: batch)
    monkeypatch.setattr(trainer, "learning_rate_factor", lambda: 1.0)
    plain = PlainContender(config, Objective(config, CPU), False)
    plain.model.load_state_dict(trainer.model.state_dict())
    torch.manual_seed(step_seed(config.run.seed, 0))  # dropout
    plain.step(batch)
    trainer.train_step()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, plain.model.get_parameter(name)), name


def test_supernet_step_is_that_of_the_trainer(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = SupernetTrainer(config, tmp_path / "run", resume=False)
    low = trainer.space.largest(Precision.INT, 4, 4)
    batch, alpha = random_batch(config, 8, CPU), torch.ones(len(trainer.windows))
    monkeypatch.setattr(trainer, "members", lambda _: ([Member("w4a4", low, 8)], "orin"))
    monkeypatch.setattr(trainer.data, "draw", lambda *_: batch)
    monkeypatch.setattr(trainer, "saliency", lambda: alpha)
    monkeypatch.setattr(trainer, "learning_rate_factor", lambda: 1.0)
    supernet = SupernetContender(config, Objective(config, CPU), False, batch)
    supernet.model.load_state_dict(trainer.model.state_dict())
    target = trainer.predict(trainer.teacher, trainer.noisy(batch), batch).float()
    stem = supernet.begin(batch)
    supernet.learn(low, stem, batch, target, alpha[:8])
    stem.backward()
    supernet.update()
    trainer.train_step()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, supernet.model.get_parameter(name)), name


def test_batch_has_the_policys_shapes(config: TrainConfig) -> None:
    policy = config.policy
    batch = random_batch(config, 5, CPU)
    assert batch.observation.shape == (5, policy.observation_horizon, policy.observation_dim)
    assert batch.action.shape == batch.noise.shape == (5, policy.horizon, policy.action_dim)
    assert 0 <= int(batch.timesteps.min()) <= int(batch.timesteps.max()) < config.diffusion.train_timesteps
    again = random_batch(config, 5, CPU)
    assert torch.equal(batch.noise, again.noise)


# -- switching --------------------------------------------------------------------------------------------------------


def test_a_switch_makes_no_tensor(config: TrainConfig) -> None:
    objective = Objective(config, CPU)
    supernet = SupernetContender(config, objective, False, random_batch(config, 4, CPU))
    microseconds, made = switching(supernet.model.activate, sampled_subnets(search_space(config), 8), 100)
    assert made == 0
    assert microseconds > 0.0


def test_a_switch_that_copies_parameters_is_found_out() -> None:
    parameter = torch.nn.Parameter(torch.zeros(10, 30))
    subnets = [Subnet((None,), Precision.FP32)] * 3
    _, made = switching(lambda _: parameter.detach()[:5].clone(), subnets, 3)
    assert made == 3 * 5 * 30 * 4


def test_views_and_changes_in_place_are_no_new_tensors() -> None:
    x = torch.zeros(100)
    with NewTensors() as made:
        x[:50].view(5, 10).t()
        x.add_(1.0)
    assert made.bytes == 0
    with NewTensors() as made:
        y = x + 1.0
        y.mul_(2.0)
        x.expand(4, 100).contiguous()
    assert made.bytes == 400 + 1600


# -- what cannot be measured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text"),
    [({"batch": 0}, "--batch: expected at least 1, got 0"), ({"threads": 0}, "--threads"), ({"rounds": 1}, "--rounds")],
)
def test_options_out_of_range_are_refused_by_name(values: dict[str, int], text: str) -> None:
    with pytest.raises(TrainBenchError, match=text):
        Options(**values)


def test_configuration_of_a_plain_policy_is_refused(tiny_config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="supernet: the section is missing"):
        bench_train(tiny_config(), Options())


def test_a_device_that_is_not_there_is_refused(
    supernet_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainBenchError, match="finds no CUDA device"):
        bench_train(supernet_config(run={"device": "cuda"}), Options())


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], argparse.ArgumentParser]:
    """Return a factory of the parser of ``dcqfa`` with ``bench`` alone, with or without the training package."""

    def make(installed: bool) -> argparse.ArgumentParser:
        entry = EntryPoint("train", "training.commands_bench:train", bench_command.ENTRY_POINT_GROUP)
        monkeypatch.setattr(bench_command, "entry_points", lambda group: [entry] if installed else [])
        parser = argparse.ArgumentParser()
        bench_command.register(parser.add_subparsers())
        return parser

    return make


def test_command_prints_figures_as_json(
    quick: None,
    parser: Callable[[bool], argparse.ArgumentParser],
    supernet_files: SupernetFiles,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "bench",
        "train",
        "--config",
        str(supernet_files.config),
        "--batch",
        "2",
        "--threads",
        "1",
        "--rounds",
        "2",
    ]
    args = parser(True).parse_args([*words, "--no-compile", "--json"])
    assert args.func(args) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert figures["batch"] == 2 and figures["config"] == "pusht_keypoints"
    wanted = {"plain_step_ms", "w4a4_step_ratio", "set_ratio", "set_with_teacher_ratio", "switch_us"}
    assert wanted <= set(figures)
    assert "round 2 of 2" in printed.err


def test_command_prints_a_table(
    quick: None,
    parser: Callable[[bool], argparse.ArgumentParser],
    supernet_files: SupernetFiles,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["bench", "train", "--config", str(supernet_files.config), "--batch", "2", "--rounds", "2", "--no-compile"]
    args = parser(True).parse_args(words)
    assert args.func(args) == 0
    text = capsys.readouterr().out
    assert "of a plain step" in text and "0 bytes of new tensors" in text


def test_without_the_training_package_the_command_says_what_to_install(
    parser: Callable[[bool], argparse.ArgumentParser],
) -> None:
    args = parser(False).parse_args(["bench", "train", "--batch", "32", "--json"])
    with pytest.raises(bench_command.MissingBenchmarkError, match=r"pip install -r requirements/train\.txt"):
        args.func(args)


def test_inference_runs_in_float32_unless_the_precision_of_training_is_asked_for(config: TrainConfig) -> None:
    objective, batch = Objective(config, CPU), random_batch(config, 4, CPU)
    supernet, space = SupernetContender(config, objective, False, batch), search_space(config)
    seen: list[torch.dtype] = []
    supernet.model.head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    supernet.infer(space.largest(), batch)
    supernet.infer(space.largest(), batch, autocast=True)
    assert seen == [torch.float32, torch.bfloat16]
