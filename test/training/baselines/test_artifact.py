"""A stored quantized policy runs as it ran before it was stored; what is damaged is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.baselines import BaselineError, find_baseline, parse_bits
from training.baselines.artifact import load_artifact, pack_codes, save_artifact, unpack_codes
from training.baselines.calibration import Calibration
from training.baselines.network import linear_names, plain_linears
from training.baselines.quality import held_out, quality
from training.baselines.report import finish, packed_bytes, paper_bits
from training.checkpoint import BASELINE, CheckpointError, load_checkpoint, save_checkpoint
from training.checkpoint_engine import VariantError, find_variant
from training.data.policy_data import PolicyData
from training.evaluate import evaluate
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.space_counts import paper_bytes, real_bytes
from training.subnet import Layer, Precision, Subnet
from training.trained import TrainedPolicy, load_trained


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 33), st.integers(0, 1000))
def test_packed_codes_come_back(bits: int, rows: int, count: int, seed: int) -> None:
    high = 2 ** (bits - 1) - 1
    codes = torch.from_numpy(np.random.default_rng(seed).integers(-high, high + 1, (rows, count))).float()
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, count), codes)


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BaselineError, match="up to 7 at 4 bits"):
        pack_codes(torch.tensor([[8.0]]), 4)
    with pytest.raises(BaselineError, match="rows of 2 bytes"):
        unpack_codes(torch.zeros(1, 3, dtype=torch.uint8), 4, 4)


@pytest.mark.parametrize(
    ("method", "bits"),
    [("rtn", "w8a8"), ("smoothquant", "w4a4"), ("awq", "w4a16"), ("hadamard", "w4a4"), ("smoothquant", "fp8")],
)
def test_stored_policy_runs_as_before(
    method: str, bits: str, teacher: TrainedPolicy, calibration: Calibration, tmp_path: Path
) -> None:
    quantized = find_baseline(method).quantize(teacher, parse_bits(bits), calibration)
    path = save_artifact(tmp_path / "artifact", teacher, quantized)
    loaded, report = load_artifact(path.parent)
    call = calibration.calls[0]
    arguments = (call.noisy, call.timesteps, call.observation)
    assert torch.equal(loaded.network(*arguments), quantized.network(*arguments))
    assert report == quantized.report
    assert loaded.meaning == teacher.meaning


def test_rows_of_many_bits_are_stored(teacher: TrainedPolicy, calibration: Calibration, tmp_path: Path) -> None:
    quantized = find_baseline("rtn").quantize(teacher, parse_bits("w4a8"), calibration)
    linear = plain_linears(quantized.network)["blocks.0.fc1"]
    linear.set_weight(teacher.network.get_submodule("blocks.0.fc1").weight)  # type: ignore[arg-type]
    linear.quantize_weight(torch.arange(linear.out_features) % 3 * 8)  # 0, 8 and 16 bits
    finish(quantized.network)
    loaded, _ = load_artifact(save_artifact(tmp_path / "artifact", teacher, quantized))
    assert torch.equal(plain_linears(loaded.network)["blocks.0.fc1"].weight, linear.weight)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_sizes_are_those_of_subnets_of_equal_bits(bits: str, teacher: TrainedPolicy, calibration: Calibration) -> None:
    network = find_baseline("rtn").quantize(teacher, parse_bits(bits), calibration).network
    config = teacher.config.policy
    width = int(bits[1])
    layers = (Layer(config.heads, config.ffn_ratio * config.dim, width, width),) * config.depth
    subnet = Subnet(layers, Precision.INT)
    shape = diffusion_policy_t_shape(config)
    assert paper_bits(network) / 8 == pytest.approx(paper_bytes(shape, subnet), abs=1)
    assert packed_bytes(network) == real_bytes(shape, subnet)


def test_quality_tells_bits_apart_layer_by_layer(
    teacher: TrainedPolicy, teacher_data: PolicyData, calibration: Calibration
) -> None:
    measure = held_out(teacher, teacher_data, 16)
    assert measure.distance(teacher.network) == 0.0
    figures = {
        bits: quality(measure, find_baseline("smoothquant").quantize(teacher, parse_bits(bits), calibration).network)
        for bits in ("w8a8", "w4a4")
    }
    assert 0.0 < figures["w8a8"]["distance"] < figures["w4a4"]["distance"]
    assert set(figures["w8a8"]["layer_error"]) == set(linear_names(teacher.network))
    for name, error in figures["w8a8"]["layer_error"].items():
        assert 0.0 < error < 1e-2, name
        assert error < figures["w4a4"]["layer_error"][name]
    assert len(figures["w8a8"]["block_error"]) == len(teacher.network.blocks)


@pytest.fixture
def artifact(teacher: TrainedPolicy, calibration: Calibration, tmp_path: Path) -> Path:
    quantized = find_baseline("rtn").quantize(teacher, parse_bits("w4a4"), calibration)
    return save_artifact(tmp_path / "stored", teacher, quantized).parent


def test_evaluation_runs_a_stored_policy_like_a_checkpoint(artifact: Path, teacher: TrainedPolicy) -> None:
    result = evaluate(str(artifact), None, [200_000], steps=2)
    assert result["variant"] == "rtn-w4a4"
    assert 0.0 <= result["mean"] <= 1.0
    assert find_variant(artifact, "rtn-w4a4").specification == find_variant(teacher.path, None).specification
    with pytest.raises(VariantError, match="holds one quantized policy, rtn-w4a4"):
        find_variant(artifact, "w8a8")


def test_quantized_policy_is_not_taken_for_a_full_precision_one(artifact: Path, trained_run: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a quantized policy"):
        load_trained(artifact)
    with pytest.raises(CheckpointError, match="holds no quantized policy"):
        load_artifact(trained_run)


def _drop_linear(document: dict[str, Any]) -> None:
    del document["linears"]["blocks.0.fc1"]


def _wrong_rows(document: dict[str, Any]) -> None:
    document["linears"]["blocks.0.fc1"]["rows"]["4"] = torch.zeros(3, 3, dtype=torch.uint8)


def _unknown_part(document: dict[str, Any]) -> None:
    document["linears"]["blocks.0.fc1"]["activation"] = {"kind": "per_day"}


def _not_finite(document: dict[str, Any]) -> None:
    document["linears"]["blocks.0.fc1"]["scale"][0] = float("nan")


def _drop_parameter(document: dict[str, Any]) -> None:
    del document["others"]["head.weight"]


@pytest.mark.parametrize("damage", [_drop_linear, _wrong_rows, _unknown_part, _not_finite, _drop_parameter])
def test_damaged_policy_is_refused(damage: Callable[[dict[str, Any]], None], artifact: Path) -> None:
    payload = load_checkpoint(artifact / "checkpoint.pt")
    damage(payload[BASELINE])
    save_checkpoint(artifact / "checkpoint.pt", {key: value for key, value in payload.items() if key != "format"})
    with pytest.raises(CheckpointError, match="cannot be rebuilt"):
        load_artifact(artifact)


def test_cut_file_is_refused(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    data = (copy / "checkpoint.pt").read_bytes()
    (copy / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_artifact(copy)
