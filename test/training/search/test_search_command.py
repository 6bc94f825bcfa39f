from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcqfa_ros import cli
from dcqfa_ros.errors import UserError
from training.checkpoint import load_checkpoint, save_checkpoint
from training.conditions import Conditions
from training.config import load_config
from training.cost import cost_tensors
from training.evaluate import Scores
from training.lut import load_table
from training.sandwich import search_space
from training.search.distance import DistanceSource, TeacherDistance, spread
from training.supernet_checkpoint import load_supernet

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--population", 8, "--generations", 3, "--samples", 16, "--workers", 1, "--top", 0)


@pytest.fixture
def search(in_process: Callable[[str], Run]) -> Run:
    """``dcqfa search`` in this process."""
    return in_process("search")


@pytest.fixture
def budget(supernet_files: Any) -> float:
    """Half the way from the smallest to the largest network's latency on the first device."""
    config = load_config(supernet_files.config)
    space = search_space(config)
    costs = cost_tensors(load_table(supernet_files.tables[0]), space, config.diffusion.steps)
    return Conditions(space, {"orin": costs}, []).between("orin", 0.5).latency_ms


def document(result: tuple[int, str, str]) -> dict[str, Any]:
    code, output, errors = result
    assert code == 0, errors
    return json.loads(output)


TIMES = ("seconds", "new_distances")


def test_a_device_is_searched_and_the_result_can_be_looked_at(
    search: Run, supernet_run: Path, budget: float, tmp_path: Path
) -> None:
    arguments = (supernet_run, "--device", "orin", "--latency-ms", budget, *SMALL, "--json")
    facts = document(search(*arguments))
    assert facts["front"] and all(row["latency_ms"] <= budget * 1.000002 for row in facts["front"])
    assert facts["modelled"] and facts["predicted_from"] is None and facts["rank_correlation"] is None
    assert facts["memory_budget_mb"] is None
    assert 0.0 < facts["hypervolume"] <= 1.0 and 0.0 < facts["random_hypervolume"] <= 1.0
    folder = (tmp_path / facts["result"]).parent
    assert json.loads((folder / "result.json").read_text()) == facts
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "front.html").read_text()
    assert facts["front"][0]["subnet"] in page and "w4a4" in page and 'src="https://' not in page
    again = document(search(*arguments))
    assert again["new_distances"] == 0
    assert {k: v for k, v in again.items() if k not in TIMES} == {k: v for k, v in facts.items() if k not in TIMES}


def test_a_further_device_costs_few_distances_and_keeps_its_plan(
    search: Run, supernet_run: Path, supernet_files: Any, budget: float
) -> None:
    first = document(search(supernet_run, "--device", "orin", "--latency-ms", budget, *SMALL, "--json"))
    arguments = (supernet_run, "--device", supernet_files.tables[1], *SMALL, "--json")
    further = document(search(*arguments))
    assert further["device"] == "slower" and further["predicted_from"] >= first["measured"]
    assert further["random_hypervolume"] is None
    third = document(search(supernet_run, "--device", "orin", "--verify", 3, *SMALL, "--json"))
    assert third["new_distances"] <= 3 and third["result"] != first["result"]
    again = document(search(*arguments))  # more distances are known by now, the plan is the same
    assert again["new_distances"] == 0
    assert {k: v for k, v in again.items() if k not in TIMES} == {k: v for k, v in further.items() if k not in TIMES}
    whole = document(search(supernet_run, "--device", "slower", *SMALL, "--full", "--no-random", "--json"))
    assert whole["predicted_from"] is None and whole["random_hypervolume"] is None


def test_distances_that_were_lost_are_measured_again(search: Run, supernet_run: Path, tmp_path: Path) -> None:
    facts = document(search(supernet_run, "--device", "orin", *SMALL, "--json"))
    (path,) = tmp_path.glob("searches/*/distances-*.jsonl")
    path.write_text("")
    code, output, errors = search(supernet_run, "--device", "slower", *SMALL, "--json")
    assert code == 0 and "too few distances to predict others" in errors
    assert json.loads(output)["predicted_from"] is None
    again = document(search(supernet_run, "--device", "orin", *SMALL, "--json"))
    assert again["front"] == facts["front"]


def test_a_checkpoint_that_changes_while_it_is_searched_is_noticed(supernet_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(supernet_run, folder)
    supernet = load_supernet(folder)
    source = DistanceSource(supernet.path, supernet.meaning.config, 8)
    distance = TeacherDistance(source, supernet)
    payload = load_checkpoint(folder / "checkpoint.pt")
    payload["ema"]["head.weight"] += 1.0
    save_checkpoint(folder / "checkpoint.pt", payload)
    with pytest.raises(UserError, match="changed while it was searched"), spread(distance, source, 2) as measure:
        list(measure([supernet.space.parse("w4a4")]))


def test_the_best_networks_are_ranked_by_closed_loop_score(
    search: Run, supernet_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[list[int]] = []

    def roll_out(policy: object, seeds: list[int], history: int) -> Scores:
        played.append(list(seeds))
        return Scores(tuple(seeds), (0.1 * len(played),) * len(seeds), (1,) * len(seeds))

    monkeypatch.setattr("training.evaluate.roll_out", roll_out)
    arguments = (supernet_run, "--device", "orin", *SMALL[:-2], "--top", 2, "--seeds", 3, "--json")
    facts = document(search(*arguments))
    assert [row["score"] for row in facts["ranked"]] == [pytest.approx(0.2), pytest.approx(0.1)]
    nearest = sorted(facts["front"], key=lambda row: row["distance"])[:2]
    assert {row["subnet"] for row in facts["ranked"]} == {row["subnet"] for row in nearest}
    assert played == [list(range(300_000, 300_003))] * 2
    assert document(search(*arguments))["ranked"] == facts["ranked"] and len(played) == 2


def test_people_read_a_table(search: Run, supernet_run: Path) -> None:
    code, output, _ = search(supernet_run, "--device", "orin", *SMALL)
    assert code == 0 and "hypervolume" in output and "random search" in output
    assert output.startswith("orin, modelled table")
    assert output.splitlines()[1].split() == ["subnet", "distance", "ms", "MB", "bits"]


def test_the_budget_that_is_said_to_be_enough_is_enough(search: Run, supernet_run: Path) -> None:
    for option in ("--latency-ms", "--memory-mb"):
        _, _, errors = search(supernet_run, "--device", "orin", *SMALL, option, 1e-6)
        enough = errors.split()[-1]
        assert document(search(supernet_run, "--device", "orin", *SMALL, option, enough, "--json"))["front"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "jetson"], "--device jetson: no table of that device; at hand: orin, slower"),
        (["--device", ""], "--device : no table of that device; at hand: orin, slower"),
        (
            ["--device", "orin", "--latency-ms", 1e-6],
            r"--latency-ms 1e-06: the smallest .* takes .* ms on orin",
        ),
        (
            ["--device", "orin", "--memory-mb", 1e-6],
            r"--memory-mb 1e-06: the smallest .* takes .* MB on orin",
        ),
        (["--device", "orin", "--seed", 2**33], "--seed: expected at most 4294967295"),
        (["--device", "orin", "--top", 1, "--first-seed", 2**33], "--first-seed: .* start seeds are 0 to"),
        (["--device", "orin", "--latency-ms", "nan"], "--latency-ms: expected a number above 0, got nan"),
        (["--device", "orin", "--population", 3], "--population: expected at least 4, got 3"),
        (["--device", "orin", "--verify", 5], "--verify: .* holds fewer than 20 distances to predict others from"),
        (["--device", "orin", "--data", "elsewhere.npz"], "elsewhere.npz"),
        (["--device", "orin", "--out", "/dev/null"], "/dev/null/distances-.*make room, or give another --out"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(
    search: Run, supernet_run: Path, tmp_path: Path, options: list[Any], message: str
) -> None:
    code, output, errors = search(supernet_run, *SMALL, *options)
    assert code == cli.EXIT_USER_ERROR and output == "" and not list(tmp_path.glob("searches"))
    assert re.search(message, errors), errors


def test_a_run_that_is_missing_or_no_supernet_is_refused(search: Run, trained_run: Path) -> None:
    code, _, errors = search("nowhere", "--device", "orin")
    assert code == cli.EXIT_USER_ERROR and "nowhere" in errors
    code, _, errors = search(trained_run, "--device", "orin")
    assert code == cli.EXIT_USER_ERROR and "no supernet" in errors


def test_demonstrations_of_another_run_are_refused(
    search: Run, supernet_run: Path, npz: Path, arrays: dict[str, Any]
) -> None:
    np.savez(npz, **{**arrays, "action": arrays["action"] + 1.0})
    code, _, errors = search(supernet_run, "--device", "orin", "--data", npz, *SMALL)
    assert code == cli.EXIT_USER_ERROR and "not the demonstrations" in errors


def test_distances_do_not_depend_on_the_number_of_processes(supernet_run: Path) -> None:
    supernet = load_supernet(supernet_run)
    source = DistanceSource(supernet.path, supernet.meaning.config, 8)
    distance = TeacherDistance(source, supernet)
    subnets = [supernet.space.parse(name) for name in ("largest", "w8a8", "w4a4", "smallest")]
    alone = list(distance(subnets))
    with spread(distance, source, 2) as measure:
        assert list(measure(subnets)) == pytest.approx(alone, rel=1e-6)
    assert min(alone) > 0.0 and len(set(alone)) == 4


def test_a_teacher_that_was_exchanged_is_refused(search: Run, supernet_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(supernet_run, folder)
    payload = load_checkpoint(folder / "checkpoint.pt")
    save_checkpoint(folder / "checkpoint.pt", payload | {"teacher_sha256": "0" * 64})
    code, _, errors = search(folder, "--device", "orin", *SMALL)
    assert code == cli.EXIT_USER_ERROR and "another teacher" in errors
