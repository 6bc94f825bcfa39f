from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import shipped
from training.config import load_config
from training.cost import cost
from training.evaluate import evaluate
from training.lut import load_table
from training.sandwich import search_space
from training.shipped import DEFAULT_RUN
from training.space_counts import flops, mean_bits, paper_bytes, parameters, real_bytes
from training.supernet import SupernetTrainer

UNEVEN = "int.1h32w4a8.4h64w8a4"  # a network whose two blocks differ in everything
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def subnet(in_process: Callable[[str], Run]) -> Run:
    """``dcqfa subnet`` in this process."""
    return in_process("subnet")


def document(result: tuple[int, str, str]) -> dict[str, Any]:
    code, output, errors = result
    assert code == 0, errors
    return json.loads(output)


@pytest.mark.parametrize("name", ["largest", "w4a4", "smallest", "d1-h.5-m1-w4a8", UNEVEN])
def test_counts_and_costs_are_those_of_the_space(subnet: Run, supernet_files: Any, name: str) -> None:
    facts = document(subnet(name, "--config", supernet_files.config, "--json"))
    space = search_space(load_config(supernet_files.config))
    chosen = space.parse(name)
    assert space.parse(facts["subnet"]) == chosen
    assert space.decode(facts["genes"]) == chosen
    assert facts["parameters"] == parameters(space.shape, chosen)
    assert facts["mean_bits"] == mean_bits(space.shape, chosen)
    assert (facts["flops_per_chunk"], facts["flops_per_step"]) == flops(space.shape, chosen)
    assert facts["paper_bytes"] == paper_bytes(space.shape, chosen)
    assert facts["real_bytes"] == real_bytes(space.shape, chosen)
    assert facts["run"] is None and facts["denoising_steps"] == 4
    assert [row["file"] for row in facts["costs"]] == [str(path) for path in supernet_files.tables]
    for row, path in zip(facts["costs"], supernet_files.tables, strict=True):
        predicted = cost(load_table(path), space.shape, chosen, 4)
        assert (row["latency_ms"], row["memory_bytes"]) == (predicted.latency_ms, predicted.memory_bytes)
        assert row["modelled"]


def test_a_chosen_table_and_number_of_steps_take_the_place_of_the_configured_ones(
    subnet: Run, supernet_files: Any
) -> None:
    arguments = ("w8a8", "--config", supernet_files.config, "--table", supernet_files.tables[1])
    few, many = (document(subnet(*arguments, "--steps", steps, "--json")) for steps in (2, 8))
    assert [row["table"] for row in few["costs"]] == ["slower"]
    assert few["costs"][0]["latency_ms"] < many["costs"][0]["latency_ms"]
    code, output, _ = subnet(*arguments)
    assert code == 0
    assert "d2-h1-m2-w8a8" in output and "slower (modelled table)" in output


def test_a_configured_table_that_is_not_there_is_named_and_the_others_are_used(
    subnet: Run, supernet_files: Any, tmp_path: Path
) -> None:
    text = supernet_files.config.read_text().replace(str(supernet_files.tables[0]), "absent.json")
    config = tmp_path / "moved.yaml"
    config.write_text(text)
    facts = document(subnet("fp8", "--config", config, "--json"))
    assert facts["missing_tables"] == ["absent.json"]
    assert len(facts["costs"]) == 1
    assert "absent.json: no such table" in subnet("fp8", "--config", config)[1]


@pytest.mark.parametrize("name", ["w4a4", UNEVEN])
def test_the_measured_loss_and_score_are_those_of_training_and_evaluation(
    subnet: Run, supernet_files: Any, supernet_run: Path, name: str
) -> None:
    options = ("--eval", "--seeds", 2, "--first-seed", 200_001, "--steps", 2)
    facts = document(subnet(name, "--run", supernet_run, *options, "--json"))
    trainer = SupernetTrainer(load_config(supernet_files.config), supernet_run)
    assert facts["step"] == trainer.step == 6
    assert facts["held_out_loss"] == trainer.validate([name])[name]
    score = evaluate(str(supernet_run), name, (200_001, 200_002), steps=2)
    assert facts["closed_loop"]["scores"] == score["scores"]
    assert facts["closed_loop"]["subnet"] == facts["subnet"] == score["subnet"]
    code, output, _ = subnet(name, "--run", supernet_run, "--eval", "--seeds", 0)
    assert code == 0
    assert "denoising loss" in output and "closed loop" not in output


def test_without_a_choice_the_default_run_is_used_where_there_is_one(
    subnet: Run, supernet_run: Path, tmp_path: Path
) -> None:
    before = document(subnet("w4a4", "--json"))
    assert (before["run"], before["blocks"]) == (None, 8)
    shutil.copytree(supernet_run, tmp_path / DEFAULT_RUN)
    found = document(subnet("w4a4", "--json"))
    assert (found["run"], found["blocks"]) == (str(DEFAULT_RUN / "checkpoint.pt"), 2)


def test_measuring_without_a_run_takes_the_shipped_supernet_from_any_folder_and_says_so(
    subnet: Run, published_data: Path
) -> None:
    code, output, errors = subnet("w4a4", "--eval", "--seeds", 0, "--data", published_data, "--json")
    assert code == 0, errors
    facts = json.loads(output)
    assert errors.startswith(f"{DEFAULT_RUN}: no such run; taking the shipped supernet ")
    assert Path(facts["run"]).parent.name == DEFAULT_RUN.name and facts["step"] == 15_000
    assert facts["held_out_loss"] < 0.045


def test_other_demonstrations_than_those_of_the_run_are_refused(
    subnet: Run, supernet_run: Path, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    other = tmp_path / "other.npz"
    arrays["action"] = arrays["action"][::-1].copy()
    np.savez(other, **arrays)
    code, _, errors = subnet("w4a4", "--run", supernet_run, "--eval", "--data", other)
    assert code == 2
    assert "not the demonstrations" in errors and "--data" in errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("w3a3",), "weight bits: expected one of 4, 8, got 3"),
        (("d9-h1-m2-w4a4",), "depth"),
        (("no_such_name",), "expected a uniform network"),
        (("w4a4", "--steps", 0), "--steps: expected at least 1"),
        (("w4a4", "--steps", 101), "--steps: expected at most the 100 time steps"),
        (("w4a4", "--seeds", 2), "--seeds: has no effect without --eval"),
        (("w4a4", "--compile"), "--compile: has no effect without --eval"),
        (("w4a4", "--eval"), "--eval: a configuration has no weights"),
        (("w4a4", "--eval", "--first-seed", -1), "--first-seed: expected at least 0"),
        (("w4a4", "--table", "absent.json"), "absent.json: cannot be read"),
    ],
)
def test_a_wrong_argument_is_one_named_line_and_exit_code_2(
    subnet: Run, supernet_files: Any, arguments: tuple[Any, ...], expected: str
) -> None:
    code, output, errors = subnet(*arguments, "--config", supernet_files.config)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("dcqfa: error: ") and expected in errors


def test_runs_and_configurations_without_a_supernet_are_refused_by_name(
    subnet: Run, trained_run: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    for source, expected in (
        (("--run", trained_run), "holds a single policy, no supernet"),
        (("--run", tmp_path), "no such checkpoint"),
        (("--config", write_config()), "supernet: the section is missing"),
        (("--config", "absent.yaml"), "absent.yaml: no such configuration"),
    ):
        code, _, errors = subnet("w4a4", *source)
        assert code == 2 and errors.count("\n") == 1
        assert expected in errors


def test_a_seed_out_of_range_is_refused_before_anything_is_measured(subnet: Run, supernet_run: Path) -> None:
    code, output, errors = subnet("w4a4", "--run", supernet_run, "--eval", "--first-seed", 5_000_000_000)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert "start seeds are 0 to" in errors


def test_measuring_without_any_run_is_refused(subnet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "shipped_run", lambda: None)
    code, _, errors = subnet("w4a4", "--eval")
    assert code == 2
    assert "give --run" in errors
