"""Entries that cannot be played here, and what is found out before anything is played."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcqfa_ros.errors import UserError
from training.compare import workers
from training.compare.config import load_compare
from training.compare.page import render
from training.compare.report import markdown
from training.compare.session import Session

SHORT = {"name": "short", "seeds": ["some"], "stress": {"episode_steps": 16}}
MADE_BY = "dcqfa train --config config/training/absent.yaml"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(in_process: Callable[[str], Command]) -> Command:
    return in_process("compare")


@pytest.fixture
def partly(tiny_comparison: Callable[..., Path]) -> Callable[..., Path]:
    """A factory of comparisons one entry of which is of a run that is not there; arguments replace its fields."""

    def write(**fields: Any) -> Path:
        full, dcqfa = yaml.safe_load(tiny_comparison().read_text())["entries"]
        absent = dcqfa | {"name": "absent", "supernet": "runs/absent", "made_by": MADE_BY} | fields
        claim = {"text": "t", "source": "s", "kind": "above", "first": "absent", "second": "full", "task": "short"}
        return tiny_comparison(
            entries=[full, dcqfa, absent],
            tasks=[SHORT],
            pairs=[{"first": "absent", "second": "dcqfa"}, {"first": "dcqfa", "second": "full"}],
            claims=[claim | {"seeds": "some"}],
        )

    return write


def test_an_entry_whose_source_is_not_there_is_left_out_and_told_with_the_command_that_makes_it(
    partly: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    code, out, err = command("--config", partly(), "--workers", 1, "--json")
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "absent" in line]
    assert line == f"absent: not played, runs/absent is not there; made by: {MADE_BY}"
    document = json.loads(out)
    assert document["not_played"] == [{"name": "absent", "missing": "runs/absent", "made_by": MADE_BY}]
    assert {row["entry"] for row in document["rows"]} == {"full", "dcqfa"}
    assert [pair["first"] for pair in document["pairs"]] == ["dcqfa"]
    assert document["claims"][0]["verdict"] == "not measured"
    assert all(MADE_BY in text for text in (markdown(document), render(document)))
    code, out, _ = command("--config", partly(), "--workers", 1)
    assert code == 0 and f"absent: not played, runs/absent is not there; made by: {MADE_BY}" in out
    without = {entry.name for entry in load_compare(partly()).playable()[0].entries}
    assert without == {"full", "dcqfa"}
    made = tmp_path / "runs/absent"
    made.mkdir(parents=True)
    config, left_out = load_compare(partly()).playable()
    assert len(config.entries) == 3 and not left_out  # it is there now


def test_what_makes_an_entry_may_be_said_later_without_opening_it_anew(
    partly: Callable[..., Path], supernet_run: Path, tmp_path: Path
) -> None:
    asked = [
        Session(config, tmp_path)._asked(config.entry("absent"))
        for config in (load_compare(partly(supernet=str(supernet_run), made_by=said)) for said in (None, MADE_BY))
    ]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"supernet": None, "subnet": None, "checkpoint": "runs/absent", "bits": "fp32"},
        {"supernet": None, "subnet": None, "bundle": "runs/absent"},
        {"supernet": None, "subnet": None, "baseline": "batchquant", "trained": "runs/absent"},
    ],
)
def test_every_kind_of_source_may_have_to_be_made(partly: Callable[..., Path], fields: dict[str, Any]) -> None:
    _, left_out = load_compare(partly(**fields)).playable()
    assert [(entry.name, entry.missing) for entry in left_out] == [("absent", "runs/absent")]


def test_an_entry_that_is_not_there_is_refused_where_it_is_asked_for_or_nobody_says_how_to_make_it(
    partly: Callable[..., Path], tiny_comparison: Callable[..., Path], command: Command
) -> None:
    code, _, err = command("--config", partly(), "--workers", 1, "--only", "absent")
    assert code == 2 and f"--only absent: runs/absent is not there; make it with: {MADE_BY}" in err
    code, _, err = command("--config", partly(made_by=None), "--workers", 1)
    assert code == 2 and "entry absent: supernet runs/absent: no such run or checkpoint" in err and "made_by" in err
    full, dcqfa = yaml.safe_load(tiny_comparison().read_text())["entries"]
    path = tiny_comparison(entries=[full | {"checkpoint": "runs/absent", "made_by": MADE_BY}, dcqfa])
    code, _, err = command("--config", path, "--workers", 1)
    assert code == 2 and f"reference full: runs/absent is not there; make it with: {MADE_BY}" in err


def test_committed_cells_of_an_entry_that_is_left_out_are_not_lost(
    partly: Callable[..., Path], command: Command, tmp_path: Path, supernet_run: Path
) -> None:
    whole = partly(supernet=str(supernet_run))
    code, _, err = command("--config", whole, "--workers", 1, "--save-results")
    assert code == 0, err
    committed = tmp_path / "committed.json"
    before = json.loads(committed.read_bytes())
    part = ("--config", partly(), "--workers", 1, "--save-results")
    code, _, err = command(*part)
    assert code == 2 and "holds absent on short, some, which is not played" in err and "--merge" in err
    assert json.loads(committed.read_bytes()) == before
    code, out, err = command(*part, "--merge", committed, "--json")
    assert code == 0, err
    assert json.loads(committed.read_bytes())["cells"] == before["cells"] and json.loads(out)["not_played"] == []


def test_demonstrations_are_read_before_the_first_block_where_a_baseline_has_to_play(
    tiny_comparison: Callable[..., Path],
    supernet_files: Any,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from training.baselines import calibration

    def play(*_arguments: Any) -> None:
        raise UserError("a block is played")

    monkeypatch.setattr(workers, "play", play)
    full = yaml.safe_load(tiny_comparison().read_text())["entries"][0]
    rtn = {"name": "rtn", "method": "RTN", "bits": "w4a4", "baseline": "rtn"}
    config = tiny_comparison(entries=[full, rtn], tasks=[SHORT], claims=[], pairs=[])
    code, _, err = command("--config", config, "--workers", 1, "--data", tmp_path / "nowhere.npz")
    assert code == 2 and "nowhere.npz" in err
    assert "a block is played" in command("--config", config, "--workers", 1, "--data", supernet_files.data)[2]
    without = ("--only", "full", "--data", tmp_path / "nowhere.npz")
    assert "a block is played" in command("--config", config, "--workers", 1, *without)[2]  # none is needed

    class Other:
        sha256 = "c" * 64

    monkeypatch.setattr(calibration, "calibration_data", lambda *_arguments: Other)
    code, _, err = command("--config", config, "--workers", 1, "--data", supernet_files.data)
    assert code == 2 and f"field data_sha256 is {'c' * 64}" in err and "--data" in err
