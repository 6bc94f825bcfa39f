from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from training.export.graph import GraphBuilder
from training.export.weights import LinearWeights
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import input_groups
from training.quant.calibrate import observed_inputs, quantized_copy
from training.quant.linear import LinearBits, QuantizedLinear
from training.quant.quantizer import absmax_scale, code_range, mse_scale, quantize, round_to_nearest

values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 20)),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)
bits = st.sampled_from([4, 8])


def error(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return (quantize(x, scale, bits) * scale - x).square()


@settings(deadline=None)
@given(array=values, bits=bits)
def test_codes_are_whole_numbers_in_range_and_at_most_half_a_step_off(array: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(array)
    scale = absmax_scale(x, bits)
    codes = quantize(x, scale, bits)
    low, high = code_range(bits)
    assert torch.equal(codes, codes.round())
    assert low <= codes.min()
    assert codes.max() <= high
    assert ((codes * scale - x).abs() <= scale * 0.5001).all()


@settings(deadline=None)
@given(array=values, bits=bits)
def test_the_searched_scale_is_never_worse_than_the_absolute_maximum(array: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(array)
    assert error(x, mse_scale(x, bits), bits).mean() <= error(x, absmax_scale(x, bits), bits).mean()
    searched, reaching = (error(x, f(x, bits, dim=1), bits).mean(dim=1) for f in (mse_scale, absmax_scale))
    assert (searched <= reaching).all()


def test_the_searched_scale_clips_an_outlier_at_four_bits() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert mse_scale(x, 4) < 0.9 * absmax_scale(x, 4)


def test_a_scale_can_be_searched_for_fewer_codes_than_the_bits_have() -> None:
    x = torch.tensor([-1.0, 0.875])
    reach = torch.tensor(1 / 6.25)
    assert mse_scale(x, 4, reach=reach) == pytest.approx(1 / 8, abs=1e-3)  # codes -8 and 7
    assert mse_scale(x, 4, reach=reach, codes=(-7, 7)) > 0.13


def test_a_heavy_tail_is_clipped_far_below_the_maximum_at_four_bits() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x[0] = 15.0
    best = min((error(x, absmax_scale(x, 4) * i / 1000, 4).mean().item(), i) for i in range(1, 1001))[1] / 1000
    assert mse_scale(x, 4) / absmax_scale(x, 4) == pytest.approx(best, abs=0.011)
    assert best < 0.5


@settings(deadline=None)
@given(array=values, bits=bits)
def test_round_to_nearest_needs_one_scale_per_row_and_errs_by_half_a_step(array: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(array)
    for dim, shape in ((None, ()), (1, (len(x), 1)), (-1, (len(x), 1))):
        codes, scale = round_to_nearest(x, bits, dim)
        assert scale.shape == shape
        assert ((codes * scale - x).abs() <= scale * 0.5001).all()
        again, same = round_to_nearest(codes * scale, bits, dim)
        assert torch.equal(again, codes)
        torch.testing.assert_close(same, scale)


def test_other_bit_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="4 or 8, got 2"):
        LinearBits(weight=2)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), inputs=st.sampled_from([8, 64, 1024]), scale=st.floats(0.001, 0.2))
def test_a_quantized_linear_equals_the_integer_sum_exactly(seed: int, inputs: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, 5)
    layer = QuantizedLinear(linear, torch.tensor(scale), LinearBits())
    x = torch.randn(3, inputs, generator=generator)
    codes = quantize(x, torch.tensor(scale, dtype=torch.float32), 8).long()
    exact = (codes @ layer.codes.long().t()).float()
    torch.testing.assert_close(
        layer(x), exact * (layer.input_scale * layer.weight_scale) + layer.bias, rtol=0.0, atol=0.0
    )


@settings(deadline=None, max_examples=25)
@given(array=values, scale=st.floats(0.001, 1.0))
def test_codes_agree_with_onnx_runtime_bit_for_bit(array: np.ndarray, scale: float) -> None:
    step = np.float32(scale)
    g = GraphBuilder("codes")
    x = g.input("x", ("N", array.shape[1]))
    zero, name = g.constant("zero", np.array(0, np.int8)), g.constant("scale", step)
    codes = g.node("QuantizeLinear", [x, name, zero], "codes")
    g.output(g.node("DequantizeLinear", [codes, name, zero], "y"), ("N", array.shape[1]))
    session = ort.InferenceSession(g.serialize(), providers=["CPUExecutionProvider"])
    ours = quantize(torch.from_numpy(array), torch.tensor(step), 8) * torch.tensor(step)
    np.testing.assert_array_equal(session.run(None, {"x": array})[0], ours.numpy())


def test_linears_with_one_input_share_one_quantizer_and_the_rest_stays_float() -> None:
    network = DiffusionPolicyT(DiffusionPolicyTConfig(depth=2, heads=2, dim=32, ffn_ratio=2)).eval()
    groups = input_groups(network)
    with observed_inputs(network, groups) as statistics, torch.no_grad():
        network(torch.randn(4, 16, 2), torch.arange(4), torch.randn(4, 2, 20))
    quantized = quantized_copy(network, groups, statistics, LinearBits())
    block, other = quantized.decoder_blocks()
    scales = {float(m.input_scale) for m in (block.self_attn.q, block.self_attn.k, block.self_attn.v)}
    memory = {float(m.input_scale) for b in (block, other) for m in (b.cross_attn.k, b.cross_attn.v)}
    assert len(scales) == len(memory) == 1
    floating = {name for name, module in quantized.named_modules() if isinstance(module, nn.Linear)}
    assert floating == {"action_embedding", "observation_embedding", "memory_fc1", "memory_fc2", "head"}
    assert all(isinstance(b.fc1, nn.Linear) for b in network.decoder_blocks())  # the original is untouched


def test_calibration_that_missed_a_layer_is_refused_by_name() -> None:
    network = DiffusionPolicyT(DiffusionPolicyTConfig(depth=1, heads=2, dim=32, ffn_ratio=2)).eval()
    groups = input_groups(network)
    with observed_inputs(network, groups) as statistics, torch.no_grad():
        network.observation_keys_values(torch.randn(4, 2, 20))
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attn\.qkv"):
        quantized_copy(network, groups, statistics, LinearBits())


def test_only_eight_bit_codes_are_exported() -> None:
    layer = QuantizedLinear(nn.Linear(8, 4), torch.tensor(0.1), LinearBits(4, 4))
    with pytest.raises(ValueError, match="only 8-bit"):
        LinearWeights.of(layer)
