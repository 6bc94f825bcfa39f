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
from dcqfa_ros.devices.detect import detect
from training.checkpoint import load_checkpoint, save_checkpoint
from training.conditions import Conditions
from training.config import load_config
from training.cost import cost_tensors
from training.evaluate import Scores
from training.lut import load_table, save_table
from training.modelled_tables import ORIN_NX_16GB, modelled_table
from training.sandwich import search_space
from training.space import SearchSpace
from training.supernet_checkpoint import load_supernet
from training.warm_start import state_sha256

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


TIMES = ("seconds", "new_distances", "closed_loop_seconds")


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
    best = facts["ranked"][0]
    assert facts["chosen"]["name"] == best["subnet"] and facts["chosen"]["closed_loop"] == best["score"]
    front = json.loads(Path(facts["result"]).with_name("front.json").read_text())
    scores = {row["name"]: row["closed_loop"] for row in front["subnets"]}
    assert {row["subnet"]: row["score"] for row in facts["ranked"]}.items() <= scores.items()
    assert [row["name"] for row in front["subnets"] if row["chosen"]] == [best["subnet"]]


def test_the_front_says_what_an_exporter_has_to_know(
    search: Run, supernet_run: Path, supernet_files: Any, budget: float
) -> None:
    facts = document(search(supernet_run, "--device", "orin", "--latency-ms", budget, *SMALL, "--json"))
    front = json.loads(Path(facts["result"]).with_name("front.json").read_text())
    table, supernet = load_table(supernet_files.tables[0]), load_supernet(supernet_run)
    assert (front["table"], front["fingerprint"]) == (table.name, table.device.fingerprint)
    assert front["network_sha256"] == state_sha256(supernet.network.state_dict())
    assert front["steps"] == 4 and front["latency_budget_ms"] == budget and front["memory_budget_bytes"] is None
    assert [row["name"] for row in front["subnets"]] == [row["subnet"] for row in facts["front"]]
    (chosen,) = (row for row in front["subnets"] if row["chosen"])
    assert facts["chosen"] == {key: chosen[key] for key in facts["chosen"]} and chosen["closed_loop"] is None
    assert chosen["distance"] == min(row["distance"] for row in front["subnets"])
    assert supernet.space.parse(chosen["name"])


def copied_run(supernet_run: Path, folder: Path, space: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A copy of the run whose section ``supernet``, or the space in it, has other fields."""
    shutil.copytree(supernet_run, folder)
    payload = load_checkpoint(folder / "checkpoint.pt")
    payload["config"]["supernet"] |= changes
    payload["config"]["supernet"]["space"] |= space or {}
    save_checkpoint(folder / "checkpoint.pt", payload)
    return folder


def test_a_table_under_the_name_of_another_device_is_refused(
    search: Run, supernet_run: Path, supernet_files: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "tables" / "orin.json"
    save_table(copy, load_table(supernet_files.tables[1]))
    run = copied_run(supernet_run, tmp_path / "run", tables=[str(copy)])
    code, _, errors = search(run, "--device", "orin", *SMALL)
    assert code == cli.EXIT_USER_ERROR and "orin.json: is the table of slower" in errors


@pytest.mark.parametrize("installed", ["1.0.0", "1.1.0", None])
def test_a_table_of_this_machine_is_for_the_versions_it_was_measured_with(
    search: Run,
    supernet_run: Path,
    supernet_files: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: str | None,
) -> None:
    copy = measured_here(supernet_files, tmp_path, "mine", "1.0.0-build")
    run = copied_run(supernet_run, tmp_path / "run", tables=[*map(str, supernet_files.tables), str(copy)])
    known = {"onnxruntime": installed, "numpy": "1"}
    monkeypatch.setattr("training.profile_runtime.distribution_version", known.get)
    code, output, errors = search(run, "--device", "here", *SMALL, "--json")
    if installed == "1.0.0":
        assert code == 0 and json.loads(output)["device"] == "mine" and "another machine" not in errors
        return
    assert code == cli.EXIT_USER_ERROR and not list(tmp_path.glob("searches"))
    gone = "mine.json: measured on this computer with onnxruntime, which cannot run now: .* is not installed"
    changed = "mine.json: measured with onnxruntime 1.0.0-build, installed is 1.1.0"
    assert re.search(gone if installed is None else changed, errors), errors


def measured_here(supernet_files: Any, tmp_path: Path, name: str, version: str) -> Path:
    """File of a table as if it had been measured on this machine."""
    table = load_table(supernet_files.tables[0])
    facts = {
        "name": name,
        "modelled": False,
        "device": table.device.model_copy(update={"fingerprint": detect().fingerprint}),
        "runtime": "onnxruntime",
        "versions": {"onnxruntime": version, "numpy": "0"},
    }
    file = tmp_path / "tables" / f"{name}.json"
    save_table(file, table.model_copy(update=facts))
    return file


def test_several_tables_of_this_machine_are_listed(
    search: Run, supernet_run: Path, supernet_files: Any, tmp_path: Path
) -> None:
    tables = [str(measured_here(supernet_files, tmp_path, name, "1.0.0")) for name in ("mine", "other")]
    run = copied_run(supernet_run, tmp_path / "run", tables=tables)
    code, _, errors = search(run, "--device", "here", *SMALL)
    assert code == cli.EXIT_USER_ERROR and not list(tmp_path.glob("searches"))
    listed = r"--device here: 2 tables were measured on this machine: mine \(onnxruntime, threads: 1\), other \(onnx"
    assert re.search(listed, errors), errors


def test_budgets_that_exclude_each_other_are_refused_before_the_search(
    search: Run, supernet_run: Path, supernet_files: Any, tmp_path: Path
) -> None:
    """Blocks that are either fast or small: each budget can be kept alone."""
    table = load_table(supernet_files.tables[0])
    fast = max(entry.heads for entry in table.blocks)
    blocks = [e.model_copy(update={"step_ms": 0.01 if e.heads == fast else 1.0}) for e in table.blocks]
    save_table(tmp_path / "odd.json", table.model_copy(update={"blocks": tuple(blocks)}))
    arguments = (supernet_run, "--device", tmp_path / "odd.json", *SMALL)
    enough = []
    for option in ("--latency-ms", "--memory-mb"):
        _, _, errors = search(*arguments, option, 1e-6)
        enough += [option, errors.split()[-1]]
    code, output, errors = search(*arguments, *enough)
    assert code == cli.EXIT_USER_ERROR and output == "" and not list(tmp_path.glob("searches"))
    assert "no network keeps both on odd; the closest (" in errors


def test_a_table_measured_elsewhere_is_searched_and_told_of(
    search: Run, supernet_run: Path, supernet_files: Any, tmp_path: Path
) -> None:
    save_table(tmp_path / "robot.json", load_table(supernet_files.tables[0]).model_copy(update={"modelled": False}))
    code, _, errors = search(supernet_run, "--device", tmp_path / "robot.json", *SMALL)
    assert code == 0 and "robot.json: measured on another machine than this one" in errors


def test_a_table_of_another_space_is_refused(
    search: Run, supernet_run: Path, supernet_files: Any, tmp_path: Path
) -> None:
    table = load_table(supernet_files.tables[0])
    save_table(tmp_path / "part.json", table.model_copy(update={"blocks": table.blocks[:3]}))
    code, _, errors = search(supernet_run, "--device", tmp_path / "part.json", *SMALL)
    assert code == cli.EXIT_USER_ERROR and "no entry for block type 'decoder'" in errors and "dcqfa profile" in errors


def test_a_space_that_the_checkpoint_was_not_trained_with_is_refused(
    search: Run, supernet_run: Path, tmp_path: Path
) -> None:
    run = copied_run(supernet_run, tmp_path / "run", space={"mlp_ratios": [1.0]})
    code, _, errors = search(run, "--device", "orin", *SMALL)
    assert code == cli.EXIT_USER_ERROR and not list(tmp_path.glob("searches"))
    assert "checkpoint.pt: supernet.space in its configuration is not the space that it was trained with" in errors


def test_distances_of_another_space_do_not_disturb(
    search: Run, supernet_run: Path, supernet_files: Any, tmp_path: Path
) -> None:
    document(search(supernet_run, "--device", "orin", *SMALL, "--json"))
    config = load_config(supernet_files.config)
    assert config.supernet is not None
    space = config.supernet.space.model_copy(update={"head_ratios": (0.25, 0.75, 1.0)})
    other = SearchSpace(search_space(config).shape, space)
    save_table(tmp_path / "orin.json", modelled_table(ORIN_NX_16GB, other))
    run = copied_run(supernet_run, tmp_path / "run", space={"head_ratios": [0.25, 0.75, 1.0]})
    facts = document(search(run, "--device", tmp_path / "orin.json", *SMALL, "--verify", 3, "--json"))
    assert facts["predicted_from"] > 0 and all(other.parse(row["subnet"]) for row in facts["front"])


def test_people_read_a_table(search: Run, supernet_run: Path) -> None:
    code, output, _ = search(supernet_run, "--device", "orin", *SMALL)
    assert output.splitlines()[-2].startswith("chosen  ")
    assert re.fullmatch(r"export it  dcqfa export \S+ --out BUNDLE --front \S+/front\.json", output.splitlines()[-1])
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
        (
            ["--device", "here"],
            r"--device here: no table was measured on this machine .*orin \(modelled, Jetson Orin NX",
        ),
        (["--device", "orin", "--ray", "somewhere"], "--ray somewhere: expected auto, local, host:port or ray://"),
        (["--device", ""], "--device : no table of that device; at hand: orin, slower"),
        (
            ["--device", "orin", "--latency-ms", 1e-6],
            r"--latency-ms 1e-06: the closest network \(\S+\) takes .* ms on orin, .* % more; give at least",
        ),
        (
            ["--device", "orin", "--memory-mb", 1e-6],
            r"--memory-mb 1e-06: the closest network \(\S+\) takes .* MB on orin, .* % more; give at least",
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


def test_a_teacher_that_was_exchanged_is_refused(search: Run, supernet_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(supernet_run, folder)
    payload = load_checkpoint(folder / "checkpoint.pt")
    save_checkpoint(folder / "checkpoint.pt", payload | {"teacher_sha256": "0" * 64})
    code, _, errors = search(folder, "--device", "orin", *SMALL)
    assert code == cli.EXIT_USER_ERROR and "another teacher" in errors
