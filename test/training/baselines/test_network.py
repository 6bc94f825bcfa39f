"""Plain linears compute what their codes say, and a copy without quantization computes what the policy computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.baselines import BASELINES, BaselineError, Bits, find_baseline, parse_bits
from training.baselines.calibration import Calibration, calibrate, statistics
from training.baselines.network import (
    ROW_BITS,
    PlainLinear,
    linear_names,
    observed,
    plain_copy,
    plain_linears,
    weight_codes,
)
from training.baselines.parts import PerToken, hadamard
from training.data.policy_data import PolicyData
from training.trained import TrainedPolicy


def test_copy_without_quantization_computes_what_the_policy_computes(
    teacher: TrainedPolicy, calibration: Calibration
) -> None:
    copy = plain_copy(teacher.network)
    call = calibration.calls[1]
    expected = teacher.network(call.noisy, call.timesteps, call.observation)
    assert torch.allclose(copy(call.noisy, call.timesteps, call.observation), expected, atol=1e-6)
    assert set(plain_linears(copy)) == set(linear_names(teacher.network))
    assert len(plain_linears(copy)) == 10 * len(teacher.network.blocks)


@given(st.sampled_from(ROW_BITS), st.integers(0, 10_000))
def test_weight_codes_fit_their_bits_and_err_by_half_a_step(bits: int, seed: int) -> None:
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
    codes, scale = weight_codes(weight, torch.full((3,), bits))
    error = (codes * scale[:, None] - weight).abs()
    if bits == 16:
        assert float(error.max()) < 2e-3
    elif bits == 0:
        assert not codes.any()
    else:
        assert float(codes.abs().max()) <= 2 ** (bits - 1) - 1
        assert torch.equal(codes, codes.round())
        assert bool((error <= scale[:, None] * 0.5001).all())


@given(st.sampled_from((4, 8)), st.integers(0, 10_000))
def test_tokens_are_quantized_each_at_its_own_maximum(bits: int, seed: int) -> None:
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 3, 5)[:, None]
    codes, scale = PerToken(bits)(x)
    assert scale.shape == (2, 5, 1)
    assert bool(((codes * scale - x).abs() <= scale * 0.5001).all())
    assert bool((codes.abs().amax(-1) == 2 ** (bits - 1) - 1).all())


def test_rows_take_bits_of_their_own() -> None:
    linear = PlainLinear.of(torch.nn.Linear(6, 5))
    weight = linear.weight.clone()
    linear.quantize_weight(torch.tensor([0, 2, 4, 8, 16]))
    error = (linear.weight - weight).abs().amax(1)
    assert error[1] > error[3] > 0.0
    assert not linear.weight[0].any()
    assert linear.row_bits.tolist() == [0, 2, 4, 8, 16]


@pytest.mark.parametrize("bits", [1, torch.tensor([4, 4]), torch.tensor([4, 4, 4, 4, 9])])
def test_bits_that_rows_cannot_have_are_refused_and_change_nothing(bits: int | torch.Tensor) -> None:
    linear = PlainLinear.of(torch.nn.Linear(6, 5))
    before = linear.codes.clone()
    with pytest.raises(BaselineError, match="expected 5 values"):
        linear.quantize_weight(bits)
    assert torch.equal(linear.codes, before)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_hadamard_matrix_is_its_own_inverse(size: int) -> None:
    assert torch.allclose(hadamard(size) @ hadamard(size), torch.eye(size), atol=1e-6)


def test_statistics_pool_every_step_and_give_output_errors_exactly(
    teacher: TrainedPolicy, calibration: Calibration
) -> None:
    found = statistics(teacher.network, calibration)
    inputs: list[torch.Tensor] = []
    with observed(teacher.network, lambda group, x: inputs.append(x) if group.name == "blocks.1.fc2" else None):
        calibration.run(teacher.network)
    x = torch.cat(inputs)
    seen = found["blocks.1.fc2"]
    assert seen.count == len(x) == 8 * 9 * 4
    difference = torch.randn(5, x.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.allclose(seen.output_error(difference), (x @ difference.t()).square().mean(0), rtol=1e-4)
    assert torch.equal(seen.peak, x.abs().amax(0))
    assert torch.allclose(seen.mean_magnitude, x.abs().mean(0), rtol=1e-5)


def test_calibration_is_the_path_of_the_policys_own_chunks(teacher: TrainedPolicy, teacher_data: PolicyData) -> None:
    one, again = (calibrate(teacher, teacher_data, 3) for _ in range(2))
    assert torch.equal(one.chunk, again.chunk)
    assert [int(call.timesteps[0]) for call in one.calls] == sorted(
        (int(call.timesteps[0]) for call in one.calls), reverse=True
    )
    assert torch.equal(one.calls[0].noisy, one.noise)
    assert one.chunk.shape == (3, 9, 2)
    with pytest.raises(BaselineError, match="expected 1 to the"):
        calibrate(teacher, teacher_data, 10_000)


@pytest.mark.parametrize("text", ["w8a8", "w4a4", "w4a16", "fp8", "w2a8"])
def test_bits_are_read_as_they_are_written(text: str) -> None:
    assert str(parse_bits(text)) == text


@pytest.mark.parametrize("text", ["w5a8", "8/8", "", "w8", "w8a3", "int8", "w8a8 "])
def test_other_bits_are_refused(text: str) -> None:
    with pytest.raises(BaselineError, match="bits"):
        parse_bits(text)


def test_unknown_methods_are_refused_with_those_there_are() -> None:
    with pytest.raises(BaselineError, match="rtn"):
        find_baseline("gptq")
    assert all(BASELINES[name].name == name for name in BASELINES)


def test_rtn_at_eight_bits_is_closer_than_at_four(teacher: TrainedPolicy, calibration: Calibration) -> None:
    call, errors = calibration.calls[1], []
    expected = teacher.network(call.noisy, call.timesteps, call.observation)
    for bits in (Bits(8, 8), Bits(4, 16), Bits(4, 4)):
        quantized = find_baseline("rtn").quantize(teacher, bits, calibration)
        predicted = quantized.network(call.noisy, call.timesteps, call.observation)
        errors.append(float((predicted - expected).square().mean()))
    assert 0.0 < errors[0] < errors[1] < errors[2]
