from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros import cli
from training.evaluate import Scores
from training.supernet_checkpoint import load_supernet

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--population", 8, "--generations", 3, "--samples", 16, "--workers", 1)


@pytest.fixture
def mixed(in_process: Callable[[str], Run]) -> Run:
    """``dcqfa mixed`` in this process."""
    return in_process("mixed")


def test_both_figures_are_drawn_from_measurements(
    mixed: Run, supernet_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    played: list[int] = []

    def roll_out(policy: object, seeds: list[int], history: int) -> Scores:
        played.append(len(seeds))
        return Scores(tuple(seeds), tuple(0.1 * (index + 1) for index in range(len(seeds))), (1,) * len(seeds))

    monkeypatch.setattr("training.evaluate.roll_out", roll_out)
    arguments = (supernet_run, *SMALL, "--seeds", 4, "--out", tmp_path / "out", "--json")
    code, output, errors = mixed(*arguments)
    assert code == 0, errors
    facts = json.loads(output)
    space = load_supernet(supernet_run).space
    assert [row["bits"] for row in facts["rows"]] == [4.0, 5.0, 6.0, 7.0, 8.0]
    for row in facts["rows"]:
        for method in ("searched", "greedy", "uniform"):
            subnet = space.parse(row[method]["subnet"])
            assert subnet.depth == 2 and row[method]["bits"] <= row["bits"] + 1e-6
            assert row[method]["score"] == pytest.approx(0.25) and row[method]["ci95"] > 0.0
    names = {row[method]["subnet"] for row in facts["rows"] for method in ("searched", "greedy", "uniform")}
    assert played == [4] * len(names)
    assert len(facts["greedy"]) == 5 and len(facts["uniform"]) == 4
    for name in ("mixed_distance.png", "mixed_score.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "mixed.json").read_text()) == facts
    again = json.loads(mixed(*arguments)[1])
    assert again["new_distances"] == 0 and again["rows"] == facts["rows"] and len(played) == len(names)


def test_people_read_a_table(mixed: Run, supernet_run: Path) -> None:
    code, output, errors = mixed(supernet_run, *SMALL, "--seeds", 0)
    assert code == 0, errors
    assert output.splitlines()[0].split()[3:] == ["searched", "greedy", "uniform"]
    assert "score" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", -1], "--seeds: expected at least 0, got -1"),
        (["--generations", 0], "--generations: expected at least 1, got 0"),
        (["--data", "elsewhere.npz"], "elsewhere.npz"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    mixed: Run, supernet_run: Path, options: list[Any], message: str
) -> None:
    code, output, errors = mixed(supernet_run, *SMALL, *options)
    assert code == cli.EXIT_USER_ERROR and output == "" and message in errors
