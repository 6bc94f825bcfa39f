"""Calibration of a subnet after training: closer to the teacher, no weight changed, nothing lost when it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.verify import verify_bundle
from training.evaluate import evaluate
from training.export import subnets as subnets_module
from training.export.bundle import ExportOptions, export_bundle
from training.nn.elastic import BITS
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.subnet_calibration import (
    CalibrationOptions,
    SubnetCalibrationError,
    SubnetCalibrator,
    calibrated_parameters,
)
from training.supernet_checkpoint import TrainedSupernet, load_supernet
from training.torch_engine import TorchEngine

UNEVEN = "int.1h32w4a8.4h64w8a4"  # two blocks that differ in everything
OPTIONS = CalibrationOptions(observations=32, iterations=20, batch=32, learning_rate=5e-3)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def supernet(supernet_run: Path) -> TrainedSupernet:
    return load_supernet(supernet_run)


@pytest.fixture(scope="module")
def calibrator(supernet: TrainedSupernet) -> SubnetCalibrator:
    return SubnetCalibrator(supernet, supernet.data(), OPTIONS)


def state(network: ElasticDiffusionPolicyT) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def distance(calibrator: SubnetCalibrator, network: ElasticDiffusionPolicyT) -> float:
    """To the teacher, on draws of another seed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return sum(calibrator._distance(network, calibrator._draw(generator)).item() for _ in range(4))


@pytest.mark.parametrize("name", ["w8a8", "w4a4", UNEVEN, "smallest", "fp8", "fp16"])
def test_a_calibrated_subnet_is_closer_to_the_teacher_and_keeps_its_weights(
    supernet: TrainedSupernet, calibrator: SubnetCalibrator, name: str
) -> None:
    _, network = supernet.subnet(name)
    before, shared, far, told = state(network), state(supernet.network), distance(calibrator, network), []
    calibrator.calibrate(network, told.append)
    assert distance(calibrator, network) < far
    assert sum(told) == OPTIONS.iterations
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.endswith(("bias", "log_step")) or "norm" in name for name in changed)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
    assert all(torch.equal(value, shared[name]) for name, value in supernet.network.state_dict().items())


def test_steps_of_other_bit_widths_stay(supernet: TrainedSupernet, calibrator: SubnetCalibrator) -> None:
    _, network = supernet.subnet("w8a8")
    before = state(network)
    calibrator.calibrate(network)
    moved = {name: value != before[name] for name, value in network.state_dict().items() if name.endswith("log_step")}
    rows = {row for mask in moved.values() for row in mask.reshape(len(mask), -1).any(1).nonzero().flatten().tolist()}
    assert rows == {BITS.index(8)}


def test_the_same_seed_gives_the_same_network_and_another_one_another(supernet: TrainedSupernet) -> None:
    def calibrated(seed: int) -> dict[str, torch.Tensor]:
        options = CalibrationOptions(observations=16, iterations=2, batch=8, seed=seed)
        _, network = supernet.subnet("w4a4")
        SubnetCalibrator(supernet, supernet.data(), options).calibrate(network)
        return state(network)

    first, again, other = calibrated(3), calibrated(3), calibrated(4)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_less_than_a_tenth_of_the_parameters_are_calibrated(supernet: TrainedSupernet) -> None:
    _, network = supernet.subnet("largest")
    tuned = sum(parameter.numel() for parameter in calibrated_parameters(network))
    assert 0 < tuned < 0.1 * sum(parameter.numel() for parameter in network.parameters())


def test_a_distance_that_is_not_finite_leaves_the_network_as_it_was(
    supernet: TrainedSupernet, calibrator: SubnetCalibrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, network = supernet.subnet("w4a4")
    before, drawn = state(network), []
    draw = calibrator._draw

    def broken(generator: torch.Generator) -> Any:
        batch = draw(generator)
        drawn.append(batch)
        if len(drawn) == 3:
            batch.noise[0, 0, 0] = torch.nan
        return batch

    monkeypatch.setattr(calibrator, "_draw", broken)
    with pytest.raises(SubnetCalibrationError, match="not finite"):
        calibrator.calibrate(network)
    assert len(drawn) == 3
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_gradient_that_is_not_finite_in_the_last_iteration_leaves_it_too(
    supernet: TrainedSupernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrator = SubnetCalibrator(supernet, supernet.data(), CalibrationOptions(observations=8, iterations=1, batch=8))
    _, network = supernet.subnet("w8a8")
    before, measured = state(network), calibrator._distance
    # The square root of 0 has no slope, and 0 times that is not a number.
    monkeypatch.setattr(calibrator, "_distance", lambda *given: (d := measured(*given)) + torch.sqrt(d - d))
    with pytest.raises(SubnetCalibrationError, match="not finite"):
        calibrator.calibrate(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_another_teacher_than_that_of_the_run_is_refused(supernet: TrainedSupernet) -> None:
    other = replace(supernet, teacher_sha256="0" * 64)
    with pytest.raises(SubnetCalibrationError, match="trained from another full-precision policy"):
        SubnetCalibrator(other, supernet.data(), OPTIONS)


def test_a_calibrated_network_can_be_played_against_the_one_it_was_made_of(
    supernet: TrainedSupernet, calibrator: SubnetCalibrator
) -> None:
    _, network = supernet.subnet("w4a4")
    calibrator.calibrate(network)
    engine = partial(TorchEngine, network, 1)
    result = evaluate(str(supernet.path), "w4a4", (1, 2), steps=2, against="w4a4", engine=engine)
    assert result["weights"] is None and result["paired"]["other"] == "w4a4"
    assert result["paired"]["other_scores"] == evaluate(str(supernet.path), "w4a4", (1, 2), steps=2)["scores"]


@pytest.mark.parametrize(
    ("field", "value"), [("observations", 0), ("iterations", 0), ("batch", -1), ("learning_rate", 0.0)]
)
def test_a_number_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(SubnetCalibrationError, match=field):
        CalibrationOptions(**{field: value})


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration of the commands in a few iterations."""
    monkeypatch.setattr("training.subnet_calibration.CalibrationOptions", lambda: OPTIONS)
    monkeypatch.setattr(subnets_module, "PARITY_SAMPLES", 8)


def test_the_command_tells_the_loss_before_and_after_and_scores_the_calibrated_network(
    in_process: Callable[[str], Run], supernet: TrainedSupernet, calibrator: SubnetCalibrator, short: None
) -> None:
    subnet = in_process("subnet")
    arguments = ("w4a4", "--run", supernet.path, "--eval", "--seeds", 1, "--steps", 2, "--json")
    plain, tuned = (subnet(*arguments, *more) for more in ((), ("--calibrate",)))
    assert plain[0] == tuned[0] == 0, tuned[2]
    plain, tuned = json.loads(plain[1]), json.loads(tuned[1])
    assert "uncalibrated_held_out_loss" not in plain and (plain["calibrated"], tuned["calibrated"]) == (False, True)
    assert tuned["uncalibrated_held_out_loss"] == plain["held_out_loss"] != tuned["held_out_loss"]
    assert len(tuned["closed_loop"]["scores"]) == 1
    code, output, _ = subnet("w4a4", "--run", supernet.path, "--eval", "--seeds", 0, "--calibrate")
    assert code == 0 and ", calibrated" in output and f"{plain['held_out_loss']:.4f} before its calibration" in output


def test_an_exported_variant_is_the_calibrated_network_and_says_so(
    in_process: Callable[[str], Run], supernet: TrainedSupernet, supernet_files: Any, tmp_path: Path, short: None
) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(supernet_files.teacher, bundle, ExportOptions(variants=("fp32",), calibration=8))
    export = in_process("export")
    for name, more in (("plain", ()), ("tuned", ("--calibrate",))):
        code, _, errors = export(supernet.path, "--out", bundle, "--subnet", f"{name}=w4a4", *more)
        assert code == 0, errors
    assert verify_bundle(bundle).ok
    variants = {variant.name: variant for variant in load_bundle(bundle).spec.variants}
    assert variants["plain"].calibration is None
    record = variants["tuned"].calibration
    assert record is not None
    assert (record.samples, record.seed, record.data_sha256) == (32, 0, supernet.data().sha256)
    assert record.method is not None and "20 iterations of 32" in record.method
    assert variants["plain"].weights != variants["tuned"].weights
    assert variants["plain"].size == variants["tuned"].size


def test_calibration_without_a_subnet_or_without_measuring_is_refused(
    in_process: Callable[[str], Run], supernet: TrainedSupernet, supernet_files: Any, tmp_path: Path
) -> None:
    code, _, errors = in_process("subnet")("w4a4", "--run", supernet.path, "--calibrate")
    assert code == 2 and "--calibrate: has no effect without --eval" in errors
    export = in_process("export")
    code, _, errors = export(supernet_files.teacher, "--out", tmp_path / "b", "--calibrate")
    assert code == 2 and "--calibrate: " in errors and "single policy" in errors
    code, _, errors = export(supernet.path, "--out", tmp_path / "b", "--default", "w4a4", "--calibrate")
    assert code == 2 and "--calibrate: no subnet is named" in errors
    assert not (tmp_path / "b").exists()
