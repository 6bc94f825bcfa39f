"""``dcqfa baseline``: what it prints and stores, and what it refuses before it computes anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from training.evaluate import evaluate
from training.export.bundle import ExportOptions, export_bundle

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(in_process: Callable[[str], Run], supernet_files: Any) -> Run:
    """The command on the tiny policy."""
    command = in_process("baseline")
    return lambda *arguments: command(*arguments, "--checkpoint", supernet_files.teacher, "--observations", 4)


def test_command_reports_and_stores_what_evaluation_runs(run: Run, tmp_path: Path) -> None:
    code, output, errors = run("awq", "--bits", "w4a4", "--out", tmp_path / "out", "--json")
    assert code == 0, errors
    facts = json.loads(output)
    assert facts["label"] == "AWQ weights + RTN activations"
    assert facts["bits"] == "w4a4"
    assert facts["distance"] > 0.0
    assert facts["calibration_observations"] == 4
    assert len(facts["layer_error"]) == 20
    assert facts["artifact_mib"] > facts["size_packed_mib"] > facts["size_paper_mib"]
    assert evaluate(str(tmp_path / "out"), None, [200_000], steps=1)["variant"] == "awq-w4a4"


def test_command_names_its_folder_and_prints_text(run: Run, tmp_path: Path) -> None:
    code, output, errors = run("rtn")
    assert code == 0, errors
    assert (tmp_path / "runs/baselines/pusht_keypoints.rtn.w8a8/checkpoint.pt").is_file()
    assert "executes as  INT8 products; activation scales per token" in output
    assert "by the paper's convention" in output


@pytest.fixture
def bundle(supernet_files: Any, tmp_path: Path) -> tuple[Path, Path]:
    """The tiny policy as a bundle that does not know its data's hash, and the configuration of its training."""
    payload = load_checkpoint(supernet_files.teacher / CHECKPOINT)
    save_checkpoint(tmp_path / "teacher" / CHECKPOINT, payload | {"data_sha256": None})
    export_bundle(tmp_path / "teacher", tmp_path / "policy", ExportOptions(variants=("fp32",)))
    document = yaml.safe_load(supernet_files.config.read_text())
    del document["supernet"]
    config = tmp_path / "policy.yaml"
    config.write_text(yaml.safe_dump(document, sort_keys=False))
    return tmp_path / "policy", config


def test_a_bundle_is_quantized_like_the_run_it_was_exported_from(
    run: Run, bundle: tuple[Path, Path], in_process: Callable[[str], Run], tmp_path: Path
) -> None:
    code, output, errors = run("rtn", "--bits", "w4a4", "--out", tmp_path / "of_run", "--json")
    assert code == 0, errors
    folder, config = bundle
    arguments = ("--checkpoint", folder, "--config", config, "--observations", 4, "--out", tmp_path / "of_bundle")
    code, output_of_bundle, errors = in_process("baseline")("rtn", "--bits", "w4a4", *arguments, "--json")
    assert code == 0, errors
    one, other = json.loads(output), json.loads(output_of_bundle)
    assert other["distance"] == pytest.approx(one["distance"], rel=1e-2)
    assert other["artifact_mib"] == pytest.approx(one["artifact_mib"], rel=1e-2)
    played = [evaluate(str(tmp_path / name), None, [200_000], steps=1)["variant"] for name in ("of_run", "of_bundle")]
    assert played == ["rtn-w4a4"] * 2


def test_a_bundle_of_another_size_than_the_configuration_is_refused(
    bundle: tuple[Path, Path], in_process: Callable[[str], Run]
) -> None:
    code, _, errors = in_process("baseline")("rtn", "--checkpoint", bundle[0], "--observations", 4)
    assert code not in (0, None)
    assert "depth" in errors


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("diffusion", {"steps": 3}, "its diffusion is not that of the training configuration"),
        (None, {"executed_actions": 4}, "its action is not that of the training configuration"),
    ],
)
def test_a_configuration_that_would_run_the_bundle_in_another_way_is_refused(
    section: str | None,
    values: dict[str, Any],
    message: str,
    bundle: tuple[Path, Path],
    in_process: Callable[[str], Run],
) -> None:
    folder, config = bundle
    document = yaml.safe_load(config.read_text())
    (document if section is None else document[section]).update(values)
    config.write_text(yaml.safe_dump(document, sort_keys=False))
    code, _, errors = in_process("baseline")("rtn", "--checkpoint", folder, "--config", config, "--observations", 4)
    assert code not in (0, None)
    assert message in errors and "--config" in errors


def test_the_configuration_of_a_supernet_is_refused_for_a_bundle(
    bundle: tuple[Path, Path], in_process: Callable[[str], Run], supernet_files: Any
) -> None:
    code, _, errors = in_process("baseline")("rtn", "--checkpoint", bundle[0], "--config", supernet_files.config)
    assert code not in (0, None)
    assert "is of a supernet" in errors


def test_demonstrations_in_other_units_than_the_bundle_are_refused(
    bundle: tuple[Path, Path], in_process: Callable[[str], Run], supernet_files: Any, tmp_path: Path
) -> None:
    arrays = dict(np.load(supernet_files.data))
    arrays["keypoint"] = arrays["keypoint"] * 1.5
    np.savez(tmp_path / "other.npz", **arrays)
    code, _, errors = in_process("baseline")(
        "rtn", "--checkpoint", bundle[0], "--config", bundle[1], "--observations", 4, "--data", tmp_path / "other.npz"
    )
    assert code not in (0, None)
    assert "the normalizer of observations.keypoints differs" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gptq",), "method 'gptq': expected one of rtn"),
        (("rtn", "--bits", "w5a5"), "bits w5a5: expected weights of 2"),
        (("rtn", "--bits", "int8"), "bits 'int8': expected fp8 or"),
        (("rtn", "--trained", "somewhere"), "--trained somewhere: rtn does not train"),
        (("rtn", "--option", "alpha"), "--option alpha: expected NAME=VALUE"),
        (("rtn", "--option", "a=1", "--option", "a=2"), "--option a: given twice"),
        (("rtn", "--option", "alpha=1"), "rtn: takes no option alpha"),
        (("smoothquant", "--option", "alpha=2"), "alpha: expected a number from 0 to 1"),
        (("smoothquant", "--option", "alpha=high"), "alpha: expected a number from 0 to 1"),
        (("smoothquant", "--option", "fold=7"), "fold: expected true or false"),
        (("awq", "--option", "clip=maybe"), "clip: expected true or false"),
        (("hadamard", "--option", "block=wide"), "block: expected a power of two"),
        (("hadamard", "--option", "block=24"), "block: expected a power of two"),
        (("rtn", "--threads", "0"), "--threads: expected at least 1"),
        (("rtn", "--observations", "0"), "--observations: expected at least 1"),
        (("rtn", "--observations", "100000"), "calibration observations: expected 1 to"),
        (("rtn", "--data", "nowhere.npz"), "nowhere.npz"),
    ],
)
def test_what_cannot_be_done_is_refused(
    arguments: tuple[str, ...], message: str, in_process: Callable[[str], Run], supernet_files: Any, tmp_path: Path
) -> None:
    code, output, errors = in_process("baseline")(
        arguments[0], "--observations", 4, "--checkpoint", supernet_files.teacher, *arguments[1:]
    )
    assert code not in (0, None)
    assert message in errors
    assert not output
    assert not (tmp_path / "runs").exists()


def test_training_runs_and_stored_policies_are_not_overwritten(
    run: Run, trained_run: Path, supernet_run: Path, in_process: Callable[[str], Run]
) -> None:
    before = (trained_run / "checkpoint.pt").read_bytes()
    for more in ((), ("--overwrite",)):
        code, _, errors = run("rtn", "--out", trained_run, *more)
        assert code != 0
        assert "holds the checkpoint of a training run" in errors
    assert (trained_run / "checkpoint.pt").read_bytes() == before
    assert run("rtn", "--bits", "w4a16")[0] == 0
    code, _, errors = run("rtn", "--bits", "w4a16")
    assert code != 0
    assert "--overwrite" in errors
    assert run("rtn", "--bits", "w4a16", "--overwrite")[0] == 0
    code, _, errors = in_process("baseline")("rtn", "--checkpoint", supernet_run)
    assert code != 0
    assert "holds a supernet" in errors
