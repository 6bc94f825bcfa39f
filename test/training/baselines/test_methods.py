"""Methods leave the function as it is before quantization, and then lose what they promise to keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.baselines import BaselineError, Bits, find_baseline, parse_bits
from training.baselines.awq import awq_scale, quantize_awq, rounded, search_reach, search_scale
from training.baselines.calibration import Calibration, InputStatistics, statistics
from training.baselines.hadamard import largest_block, rotate
from training.baselines.network import linear_groups, plain_copy, plain_linears
from training.baselines.parts import Multiply, PerTensor
from training.baselines.smoothing import smooth
from training.baselines.smoothquant import smooth_all, smoothing_scale
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.quant.calibrate import InputGroup
from training.trained import TrainedPolicy

METHODS = ("rtn", "smoothquant", "awq", "hadamard")


def predicted(network: DiffusionPolicyT, calibration: Calibration) -> torch.Tensor:
    call = calibration.calls[1]
    return network(call.noisy, call.timesteps, call.observation)


@pytest.fixture(scope="module")
def seen(teacher: TrainedPolicy, calibration: Calibration) -> dict[str, InputStatistics]:
    return statistics(teacher.network, calibration)


@pytest.mark.parametrize("fold", [True, False])
def test_smoothing_leaves_the_function_as_it_is(
    fold: bool, teacher: TrainedPolicy, calibration: Calibration, seen: dict[str, InputStatistics]
) -> None:
    network = plain_copy(teacher.network)
    scales = smooth_all(network, seen, fold=fold)
    assert max(float(scale.max() / scale.min()) for scale in scales.values()) > 2.0
    assert torch.allclose(predicted(network, calibration), predicted(teacher.network, calibration), atol=1e-4)
    explicit = {
        n for n, linear in plain_linears(network).items() if any(isinstance(t, Multiply) for t in linear.transforms)
    }
    if fold:  # behind GELU, and the memory that the blocks share
        assert {name.rpartition(".")[2] for name in explicit} == {"fc2", "k", "v"}
        assert all("cross" in name or name.endswith("fc2") for name in explicit)
    else:
        assert explicit == set(plain_linears(network))


@settings(deadline=None, max_examples=12, derandomize=True)
@given(st.integers(0, 10_000), st.integers(0, 12), st.booleans())
def test_any_positive_scale_can_be_moved(
    teacher: TrainedPolicy, calibration: Calibration, seed: int, place: int, fold: bool
) -> None:
    groups = linear_groups(teacher.network)
    group = groups[place % len(groups)]
    network = plain_copy(teacher.network)
    width = plain_linears(network)[group.linears[0]].in_features
    smooth(network, group, torch.rand(width, generator=torch.Generator().manual_seed(seed)) * 4 + 0.1, fold)
    assert torch.allclose(predicted(network, calibration), predicted(teacher.network, calibration), atol=1e-4)


def test_smoothing_scale_balances_the_two_sides_and_leaves_silent_channels_alone() -> None:
    peak, weight = torch.tensor([16.0, 1.0, 0.0, 4.0]), torch.tensor([1.0, 4.0, 2.0, 0.0])
    scale = smoothing_scale(peak, weight)
    assert scale.tolist() == pytest.approx([4.0, 0.5, 1.0, 1.0])
    assert torch.allclose((peak / scale)[:2], (weight * scale)[:2])


@pytest.mark.parametrize("block", [None, 8])
def test_rotation_leaves_the_function_as_it_is(
    block: int | None, teacher: TrainedPolicy, calibration: Calibration
) -> None:
    network = plain_copy(teacher.network)
    rotate(network, block)
    assert torch.allclose(predicted(network, calibration), predicted(teacher.network, calibration), atol=1e-5)
    assert not torch.allclose(
        plain_linears(network)["blocks.0.fc1"].weight, plain_linears(plain_copy(teacher.network))["blocks.0.fc1"].weight
    )


@pytest.mark.parametrize("block", [0, 3, 12, 64, -8])
def test_blocks_that_fit_no_input_are_refused(block: int, teacher: TrainedPolicy) -> None:
    network = plain_copy(teacher.network)
    with pytest.raises(BaselineError, match="power of two"):
        rotate(network, block)
    assert not any(linear.transforms for linear in plain_linears(network).values())


@given(st.integers(1, 4096))
def test_largest_block_divides(features: int) -> None:
    block = largest_block(features)
    assert features % block == 0
    assert (features // block) % 2 == 1


def heavy_inputs(seed: int = 0) -> InputStatistics:
    """Inputs of 16 channels, of which one is 50 times the others."""
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 50.0
    found = InputStatistics.of(InputGroup("blocks.0.fc1", ("blocks.0.fc1",)), 16)
    found.add(x, 10)
    return found


def test_awq_protects_the_channel_with_large_inputs() -> None:
    found, weight = heavy_inputs(), torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    scale, exponent = search_scale(weight, found, 4)
    assert exponent > 0.0
    assert int(scale.argmax()) == 3
    before = found.output_error(rounded(weight, 4) - weight).sum()
    after = found.output_error(rounded(weight * scale, 4) / scale - weight).sum()
    assert after < 0.7 * before
    normalised = awq_scale(found.mean_magnitude, 0.5)
    assert float(normalised.max() * normalised.min()) == pytest.approx(1.0, rel=1e-4)


def test_clipping_never_makes_a_row_worse_and_helps_heavy_tails() -> None:
    found = heavy_inputs()
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    weight[:4, 0] = 6.0
    reach = search_reach(weight, found, torch.ones(16), 4)
    full = weight.abs().amax(1)
    clipped, plain = (found.output_error(rounded(weight, 4, r) - weight) for r in (reach, full))
    assert bool((clipped <= plain).all())
    assert bool((reach <= full).all() and (reach >= 0.4999 * full).all())
    assert bool((reach < full).any())


def test_awq_beats_rounding_at_its_own_measure(
    teacher: TrainedPolicy, calibration: Calibration, seen: dict[str, InputStatistics]
) -> None:
    network = plain_copy(teacher.network)
    quantize_awq(network, seen, 4)
    rtn = find_baseline("rtn").quantize(teacher, Bits(4, 16), calibration).network
    expected = predicted(teacher.network, calibration)
    ours, theirs = (float((predicted(n, calibration) - expected).square().mean()) for n in (network, rtn))
    assert ours < theirs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["w8a8", "w4a4", "w4a16", "fp8"])
def test_reports_say_bits_size_and_execution(
    method: str, text: str, teacher: TrainedPolicy, calibration: Calibration
) -> None:
    bits = parse_bits(text)
    if method == "awq" and bits.fp8:
        with pytest.raises(BaselineError, match="integer weights"):
            find_baseline(method).quantize(teacher, bits, calibration)
        return
    before = {name: t.clone() for name, t in teacher.network.state_dict().items()}
    quantized = find_baseline(method).quantize(teacher, bits, calibration)
    assert all(torch.equal(t, before[name]) for name, t in teacher.network.state_dict().items())
    report = quantized.report
    assert report["method"] == method
    assert report["bits"] == text
    assert set(report["weight_bits"].values()) == {bits.weights}
    assert "head" in report["excluded"]
    assert report["size_packed_mib"] > report["size_paper_mib"] > 0.0
    sentence = report["executes_as"]
    assert ("FP8" in sentence) == bits.fp8
    assert ("weight-only" in sentence) == (text == "w4a16")
    assert ("dynamic" in sentence) == (text in ("w8a8", "w4a4"))
    assert ("no INT4 activations" in sentence) == (text == "w4a4")
    assert ("Hadamard" in sentence) == (method == "hadamard")
    assert ("explicit multiplications" in sentence) == (method in ("smoothquant", "awq"))
    if method == "awq":
        assert report["label"] == ("AWQ" if text == "w4a16" else "AWQ weights + RTN activations")
    assert bool(torch.isfinite(predicted(quantized.network, calibration)).all())


@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
def test_static_scales_cover_the_calibration_and_cost_accuracy(
    method: str, teacher: TrainedPolicy, calibration: Calibration
) -> None:
    dynamic, static = (
        find_baseline(method).quantize(teacher, Bits(8, 8), calibration, static=static) for static in (False, True)
    )
    expected = predicted(teacher.network, calibration)
    errors = [float((predicted(q.network, calibration) - expected).square().mean()) for q in (dynamic, static)]
    assert errors[0] < errors[1]
    assert "static activation scales" in static.report["executes_as"]
    for seen in statistics(static.network, calibration).values():
        activation = plain_linears(static.network)[seen.group.linears[0]].activation
        assert isinstance(activation, PerTensor)
        assert float(seen.peak.max()) <= 1.05 * float(activation.step * activation.high)


@pytest.mark.parametrize("method", METHODS)
def test_options_that_a_method_does_not_have_are_refused(
    method: str, teacher: TrainedPolicy, calibration: Calibration
) -> None:
    with pytest.raises(BaselineError, match="takes no option beta"):
        find_baseline(method).quantize(teacher, Bits(8, 8), calibration, beta=1)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_smoothing_strength_outside_its_range_is_refused(
    alpha: float, teacher: TrainedPolicy, calibration: Calibration
) -> None:
    with pytest.raises(BaselineError, match="alpha"):
        find_baseline("smoothquant").quantize(teacher, Bits(8, 8), calibration, alpha=alpha)
