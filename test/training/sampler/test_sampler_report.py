from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training import commands_sampler
from training.commands import ArgumentError
from training.conditions import Conditions
from training.sampler import ConfigurationSampler, SamplerConfig
from training.sampler_plot import check_plot, plot_report
from training.sampler_report import Contestant, ReportError, sampler_report, summarize, train_samplers
from training.space import SearchSpace
from training.subnet import Subnet
from training.supernet_config import SandwichConfig


@pytest.fixture
def contestants(space: SearchSpace, conditions: Conditions, true_loss: Callable[[Subnet], float]) -> list[Contestant]:
    return [
        Contestant(kind, seed, ConfigurationSampler(space, conditions, SamplerConfig(kind=kind), seed), true_loss)
        for kind in ("learned", "uniform")
        for seed in (0, 1)
    ]


def test_every_device_budget_and_seed_has_a_row_and_each_subnet_is_evaluated_once(
    space: SearchSpace, conditions: Conditions
) -> None:
    evaluated: list[Subnet] = []

    def loss(subnet: Subnet) -> float:
        evaluated.append(subnet)
        return float(subnet.depth)

    one = ConfigurationSampler(space, conditions, SamplerConfig(kind="uniform"))
    report = sampler_report([Contestant("uniform", 0, one, loss)], budgets=(0.8, 0.2), draws=10, losses=4)
    assert [(row.device, row.budget) for row in report.rows] == [
        (device, budget) for device in ("orin", "first", "unseen") for budget in (0.2, 0.8)
    ]
    assert len(evaluated) == len(set(evaluated)) == 4  # the uniform sampler draws alike in every cell
    assert all(2.0 <= (row.loss or 0.0) <= 8.0 for row in report.rows)
    assert report.holds is None and report.least_share is None


def test_the_document_is_json_and_averages_over_seeds(contestants: list[Contestant]) -> None:
    report = sampler_report(contestants, budgets=(0.5,), draws=20, losses=5)
    document = json.loads(json.dumps(report.document(), allow_nan=False))
    assert len(document["rows"]) == 12 and len(document["means"]) == 6
    mean = next(m for m in document["means"] if m["device"] == "unseen" and m["kind"] == "uniform")
    shares = [r["share_within"] for r in document["rows"] if r["device"] == "unseen" and r["kind"] == "uniform"]
    assert mean["share_within"] == pytest.approx(sum(shares) / 2) and mean["held_out"] and mean["seeds"] == 2
    assert document["learned"]["holds"] in (True, False)


def test_the_plot_is_written_and_a_place_that_cannot_be_is_named(contestants: list[Contestant], tmp_path: Path) -> None:
    report = sampler_report(contestants, draws=5, losses=2)
    plot_report(report, tmp_path / "new" / "report.png")
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ReportError, match=r"report\.nonsense: the plot cannot be written"):
        plot_report(report, tmp_path / "report.nonsense")


def test_a_plot_that_could_not_be_written_is_refused_before_the_work_and_its_folder_made(tmp_path: Path) -> None:
    check_plot(tmp_path / "new" / "report.SVG")
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path, message in (
        ("report.xyz", r"report\.xyz: the plot cannot be written: expected one of the suffixes .*\.png"),
        ("report", "expected one of the suffixes"),
        ("file/report.png", r"file/report\.png: the plot cannot be written \("),
        ("folder.png", r"folder\.png: the plot cannot be written there"),
    ):
        with pytest.raises(ReportError, match=message):
            check_plot(tmp_path / path)


def test_a_sampler_of_other_tables_is_marked_and_does_not_count_in_what_is_said_of_the_learned_one(
    contestants: list[Contestant],
) -> None:
    own = contestants[0]
    other = Contestant("in_run", 42, own.sampler, own.loss, other_tables=True)
    report, alone = (sampler_report(c, budgets=(0.5,), draws=5, losses=0) for c in ([own, other], [own]))
    assert report.document()["learned"] == alone.document()["learned"]
    for entries in (report.document()["rows"], report.document()["means"]):
        assert {(entry["kind"], entry["other_tables"]) for entry in entries} == {("learned", False), ("in_run", True)}
    assert sampler_report([other], budgets=(0.5,), draws=5, losses=0).holds is None


def test_a_cell_without_losses_has_none(contestants: list[Contestant]) -> None:
    report = sampler_report(contestants, budgets=(0.5,), draws=3, losses=0)
    assert all(mean["loss"] is None and mean["loss_within"] is None for mean in summarize(report.rows))


def test_nothing_to_compare_is_refused(space: SearchSpace, conditions: Conditions) -> None:
    with pytest.raises(ReportError, match="at least one sampler, budget and draw"):
        sampler_report([])
    with pytest.raises(ReportError, match="logged none yet"):
        train_samplers(space, conditions.measured, (), ([], []), SamplerConfig(), held_out=None)


def arguments(run: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands_sampler.sampler(parser.add_subparsers())
    return parser.parse_args(["sampler", "report", str(run), *options])


@pytest.fixture
def opened(
    space: SearchSpace,
    conditions: Conditions,
    pairs: tuple[list[Subnet], list[float]],
    true_loss: Callable[[Subnet], float],
    monkeypatch: pytest.MonkeyPatch,
) -> list[Path]:
    """Runs that the command opened; each is a stand-in for a supernet run."""
    paths: list[Path] = []

    def open_run(folder: Path, data: str | None, losses: int) -> Any:
        paths.append(folder)
        kind: Any = next((kind for kind in ("uniform", "rejection") if folder.name.startswith(kind)), "learned")
        seed = int(folder.name.partition("-")[2]) if kind != "learned" and "-" in folder.name else 42
        sampler = ConfigurationSampler(space, conditions, SamplerConfig())
        sampler.observe(*pairs)
        active: list[Subnet] = []
        run = SimpleNamespace(
            space=space,
            conditions=conditions,
            sampler=sampler,
            step=7,
            options=SimpleNamespace(
                sampler=SamplerConfig(kind=kind), sandwich=SandwichConfig(), space=space.config, only=None
            ),
            tables=SimpleNamespace(files={"orin": Path("orin.json")}),
            folder=folder,
            held_out=[0],
            config=SimpleNamespace(run=SimpleNamespace(seed=seed)),
            ema=SimpleNamespace(activate=lambda subnet: active.__setitem__(slice(None), [subnet])),
            held_out_loss=lambda network, batches, size: true_loss(active[0]) + seed,
        )
        return run, {"orin": True}

    monkeypatch.setattr(commands_sampler, "_open", open_run)
    return paths


def test_the_command_compares_all_kinds_on_all_devices(
    opened: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(
        tmp_path,
        "--json",
        "--seeds",
        "1",
        "--updates",
        "2",
        "--draws",
        "5",
        "--losses",
        "2",
        "--network",
        "uniform=uniform",
    )
    assert args.func(args) == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["kind"] for row in document["rows"]} == {"learned", "in_run", "rejection", "uniform"}
    assert {row["device"] for row in document["rows"] if row["held_out"]} == {"unseen"}
    names = {kind: [(run["run"], run["sampler"]) for run in runs] for kind, runs in document["networks"].items()}
    mine = [(str(tmp_path), "learned")]
    assert names == {"learned": mine, "rejection": mine, "uniform": [("uniform", "uniform")]}
    assert document["networks"]["uniform"][0] == {
        "run": "uniform",
        "sampler": "uniform",
        "seed": 42,
        "steps": 7,
        "batches": {"largest": 32, "low": 64, "smallest": 64, "sampled": 64},
        "sampled": 2,
        "teacher_calls": 7,
        "teacher_batch": 64,
    }
    assert opened == [tmp_path, Path("uniform")]
    assert Path(document["plot"]).exists()


def test_a_network_for_each_sampler_measures_that_sampler_alone(
    opened: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--json", "--seeds", "2", "--updates", "1", "--draws", "2", "--losses", "2", "--budgets", "0.5"]
    networks = ["--network", "uniform=uniform-1000", "--network", "uniform=uniform-5000"]
    args = arguments(tmp_path, *options, *networks)
    assert args.func(args) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["seed"] for run in document["networks"]["uniform"]] == [1000, 5000]
    of = {
        kind: {row["seed"]: row["loss"] for row in document["rows"] if row["kind"] == kind}
        for kind in ("uniform", "rejection")
    }
    assert {seed: round(loss, -3) for seed, loss in of["uniform"].items()} == {0: 1000, 1: 5000}
    assert all(round(loss, -2) == 0 for loss in of["rejection"].values())  # the run's own network, whose seed is 42


def test_the_command_prints_a_line_per_cell(
    opened: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(
        tmp_path, "--seeds", "1", "--updates", "1", "--draws", "2", "--budgets", "0.5", "--held-out", "orin"
    )
    assert args.func(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 3 + 1 and any(line.startswith("orin (held out), budget 0.5, learned: ") for line in lines)
    assert lines[-1].startswith("learned: least share within budget")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budgets", "0.3,x"], "--budgets 0.3,x: expected shares above 0"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--network", "uniform=rejection"], r"--network uniform=rejection: .*expected uniform, the run has rejection"),
        (
            ["--network", "uniform=uniform-1", "--network", "uniform=uniform-2"],
            r"--network uniform=\.\.\.: expected one run, or one for each of the 3 samplers \(--seeds\), got 2",
        ),
        (
            ["--seeds", "2", "--network", "uniform=uniform-1", "--network", "uniform=uniform_again-1"],
            r"--network uniform=uniform_again-1: run.seed 1 is that of uniform-1, too; give runs that differ in it",
        ),
        (["--network", "best=run"], "--network best=run: expected KIND=RUN with one of learned, rejection, uniform"),
        (
            ["--held-out", "abacus"],
            r"--held-out: expected one of the run's devices \(first, orin, unseen\), got abacus",
        ),
    ],
)
def test_options_that_cannot_be_used_are_named(
    opened: list[Path], tmp_path: Path, options: list[str], message: str
) -> None:
    args = arguments(tmp_path, *options)
    with pytest.raises(ArgumentError, match=message):
        args.func(args)
