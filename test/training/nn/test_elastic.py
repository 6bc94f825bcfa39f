from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.nn.blocks import DecoderBlock
from training.nn.elastic import Arithmetic, ElasticDecoderBlock, ElasticLinear, InputQuantizer, Width, integer_bits
from training.policies.diffusion_policy_t import additive_mask
from training.quant.fp8 import E4M3_MAX
from training.quant.lsq import weight_range
from training.quant.quantizer import BITS, code_range

DIM, HEADS, HEAD_DIM, MLP, TOKENS, MEMORY = 16, 4, 4, 24, 5, 3
bit_widths = st.sampled_from(BITS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights of order 1 and quantizer steps between 0.02 and 0.2, where codes are neither all 0 nor all clamped."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            uniform = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(-4.0 + 2.3 * uniform if name.endswith("log_step") else uniform - 0.5)


def linear(inputs: int = DIM, outputs: int = 12, seed: int = 0) -> ElasticLinear:
    module = ElasticLinear(inputs, outputs)
    randomise(module, seed)
    return module


def block(seed: int = 0) -> ElasticDecoderBlock:
    module = ElasticDecoderBlock(DIM, HEADS, HEAD_DIM, MLP, attention_dropout=0.0)
    randomise(module, seed)
    return module.eval()


def block_inputs(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    self_mask = additive_mask(torch.tril(torch.ones(TOKENS, TOKENS, dtype=torch.bool)))
    cross_mask = additive_mask(torch.arange(MEMORY)[None] <= torch.arange(TOKENS)[:, None] + 1)
    return random(2, TOKENS, DIM, seed=seed), random(2, MEMORY, DIM, seed=seed + 1), self_mask, cross_mask


# Input quantizers ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(bits=bit_widths, log_step=st.floats(-6, 2), low=st.integers(-15, 0), seed=st.integers(0, 99))
def test_an_integer_input_has_the_levels_of_its_bit_width(bits: int, log_step: float, low: int, seed: int) -> None:
    quantizer, index = InputQuantizer(), BITS.index(bits)
    with torch.no_grad():
        quantizer.log_step[index] = log_step
        if bits == 4:  # any place of the sixteen levels
            quantizer.low[index], quantizer.high[index] = low, low + 15
    x = random(64, 32, seed=seed)
    codes, scale = quantizer(x, Arithmetic.INTEGER, integer_bits(8, bits))
    assert scale is not None
    assert torch.equal(codes, codes.round())
    assert quantizer.low[index] <= codes.min() and codes.max() <= quantizer.high[index]
    assert len(codes.unique()) <= 2**bits
    assert torch.equal(codes, codes.to(torch.int8).to(torch.float32))  # what an integer engine holds
    torch.testing.assert_close(scale, torch.tensor(log_step).exp())
    inside = (codes > quantizer.low[index]) & (codes < quantizer.high[index])
    assert bool(((x - codes * scale).abs()[inside] <= 0.5001 * scale).all())


def test_an_uncalibrated_quantizer_has_signed_codes() -> None:
    quantizer = InputQuantizer()
    ends = [(int(low), int(high)) for low, high in zip(quantizer.low, quantizer.high, strict=True)]
    assert ends == [code_range(bits) for bits in BITS]


def test_float_inputs_pass_as_they_are_and_half_and_fp8_are_rounded_to_their_formats() -> None:
    quantizer, bits, x = InputQuantizer(), integer_bits(8, 8), random(32, 8)
    quantizer.fp8_scale.fill_(0.01)
    passed, scale = quantizer(x, Arithmetic.FLOAT, bits)
    assert passed is x and scale is None
    half, scale = quantizer(x, Arithmetic.HALF, bits)
    assert torch.equal(half, x.half().float()) and scale is None
    codes, scale = quantizer(x, Arithmetic.FP8, bits)
    assert torch.equal(codes, codes.to(torch.float8_e4m3fn).to(torch.float32))
    assert torch.equal(codes, (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32))


# Linear layers -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@settings(deadline=None, max_examples=40)
@given(
    weight=bit_widths,
    activation=bit_widths,
    rows=st.integers(1, 12),
    columns=st.integers(1, DIM),
    seed=st.integers(0, 99),
)
def test_an_integer_layer_multiplies_codes_of_its_bit_width_and_scales_after(
    weight: int, activation: int, rows: int, columns: int, seed: int
) -> None:
    layer, bits = linear(seed=seed), integer_bits(weight, activation)
    index, (low, high) = BITS.index(weight), weight_range(weight)
    x = random(7, columns, seed=seed).mul(20).round().clamp(*code_range(activation))
    y = layer.apply_to(x, torch.tensor(0.03), Arithmetic.INTEGER, bits, rows, columns)
    steps = layer.log_step[index, :rows].exp()
    codes = torch.round(layer.weight[:rows, :columns] / steps[:, None]).clamp(low, high)
    assert max(len(row.unique()) for row in codes) <= 2**weight - 1
    exact = (x.double() @ codes.double().t()) * (0.03 * steps.double()) + layer.bias[:rows].double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("weight", BITS)
@pytest.mark.parametrize("activation", BITS)
def test_a_frozen_layer_holds_few_integers_and_gives_the_same_bits(weight: int, activation: int) -> None:
    layer, bits = linear(), integer_bits(weight, activation)
    x = random(3, 7, DIM).mul(20).round().clamp(*code_range(activation))
    before = layer.apply_to(x, torch.tensor(0.03), Arithmetic.INTEGER, bits, 12, DIM)
    layer.freeze(bits)
    assert layer.frozen is not None
    codes = layer.frozen[0].t()
    assert codes.dtype == torch.int8
    assert max(len(row.unique()) for row in codes) <= 2**weight - 1
    assert int(codes.abs().max()) <= weight_range(weight)[1]
    assert torch.equal(layer.apply_to(x, torch.tensor(0.03), Arithmetic.INTEGER, bits, 12, DIM), before)


@torch.no_grad()
def test_the_exact_sums_reach_a_thousand_inputs() -> None:
    layer, bits = ElasticLinear(1024, 2), integer_bits(8, 8)
    layer.weight.copy_(torch.tensor([127.0, -127.0])[:, None].expand(2, 1024))  # with step 1: the largest codes
    layer.bias.zero_()
    x = torch.full((1, 1024), -128.0)
    x[0, 0] = -127.0
    expected = torch.tensor([[-127.0 * (1023 * 128 + 127)]]) * torch.tensor([1.0, -1.0])
    assert torch.equal(layer.apply_to(x, torch.tensor(1.0), Arithmetic.INTEGER, bits, 2, 1024), expected)
    layer.freeze(bits)
    assert torch.equal(layer.apply_to(x, torch.tensor(1.0), Arithmetic.INTEGER, bits, 2, 1024), expected)


@torch.no_grad()
def test_the_fp8_scale_of_a_row_is_that_of_the_full_row() -> None:
    layer = linear()
    layer.weight[:, -1] = 9.0  # the greatest magnitude lies in a column that a narrow layer leaves out
    torch.testing.assert_close(layer.fp8_row_steps(3), torch.full((3,), 9.0 / E4M3_MAX))
    x, bits = random(4, 6), integer_bits(8, 8)
    narrow = layer.apply_to(x, torch.tensor(0.5), Arithmetic.FP8, bits, 3, 6)
    padded = torch.cat([x, torch.zeros(4, DIM - 6)], dim=1)
    whole = layer.apply_to(padded, torch.tensor(0.5), Arithmetic.FP8, bits, 12, DIM)
    torch.testing.assert_close(narrow, whole[:, :3])


@pytest.mark.parametrize("arithmetic", list(Arithmetic))
def test_only_the_parameters_that_ran_get_gradients(arithmetic: Arithmetic) -> None:
    layer, rows, columns = linear(), 5, 7
    scale = None if arithmetic in (Arithmetic.FLOAT, Arithmetic.HALF) else torch.tensor(0.05)
    x = random(9, columns).round() if arithmetic is Arithmetic.INTEGER else random(9, columns)
    layer.apply_to(x, scale, arithmetic, integer_bits(4, 8), rows, columns).square().sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None
    assert bool((layer.weight.grad[:rows, :columns] != 0).any())
    for unused in (layer.weight.grad[rows:], layer.weight.grad[:, columns:], layer.bias.grad[rows:]):
        assert not bool(unused.any())
    if arithmetic is Arithmetic.INTEGER:
        assert layer.log_step.grad is not None
        used, other = layer.log_step.grad[BITS.index(4)], layer.log_step.grad[BITS.index(8)]
        assert bool((used[:rows] != 0).all()) and not bool(used[rows:].any())
        assert not bool(other.any())
    else:
        assert layer.log_step.grad is None


def test_a_float_layer_reads_its_weight_as_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = linear(), []
    original = torch.nn.functional.linear

    def record(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((weight.data_ptr(), bias.data_ptr() if bias is not None else None, tuple(weight.shape)))
        return original(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    layer.apply_to(random(2, 7), None, Arithmetic.FLOAT, integer_bits(8, 8), 5, 7)
    assert seen == [(layer.weight.data_ptr(), layer.bias.data_ptr(), (5, 7))]


def test_unknown_bits_are_refused() -> None:
    with pytest.raises(ValueError):
        integer_bits(3, 8)


# Blocks --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_full_float_block_is_the_plain_block_bit_for_bit() -> None:
    elastic, plain = block(), DecoderBlock(DIM, HEADS, MLP, 0.0).eval()
    plain.load_state_dict({k: v for k, v in elastic.state_dict().items() if k in plain.state_dict()})
    x, memory, self_mask, cross_mask = block_inputs()
    width = Width(HEADS, MLP, Arithmetic.FLOAT)
    expected = plain(x, *plain.cross_attn.keys_values(memory), self_mask, cross_mask)
    assert torch.equal(elastic(x, memory, self_mask, cross_mask, width, integer_bits(8, 8)), expected)


@torch.no_grad()
@settings(deadline=None, max_examples=30)
@given(heads=st.integers(1, HEADS), mlp=st.integers(1, MLP), seed=st.integers(0, 99))
def test_a_narrow_float_block_is_the_full_one_with_the_rest_removed(heads: int, mlp: int, seed: int) -> None:
    elastic = block(seed)
    inputs, bits = block_inputs(seed), integer_bits(8, 8)
    narrow = elastic(*inputs, Width(heads, mlp, Arithmetic.FLOAT), bits)
    for attention in (elastic.self_attn, elastic.cross_attn):
        attention.o.weight[:, heads * HEAD_DIM :] = 0.0  # what the removed heads say is not heard
    elastic.fc2.weight[:, mlp:] = 0.0
    torch.testing.assert_close(
        narrow, elastic(*inputs, Width(HEADS, MLP, Arithmetic.FLOAT), bits), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("arithmetic", list(Arithmetic))
def test_keys_and_values_computed_ahead_give_the_same_block(arithmetic: Arithmetic) -> None:
    elastic, (x, memory, self_mask, cross_mask) = block(), block_inputs()
    width, bits = Width(3, 10, arithmetic), integer_bits(4, 8)
    keys, values = elastic.keys_values(memory, width, bits)
    assert keys.shape == values.shape == (2, 3, MEMORY, HEAD_DIM)
    ahead = elastic.decode(x, keys, values, self_mask, cross_mask, width, bits)
    assert torch.equal(ahead, elastic(x, memory, self_mask, cross_mask, width, bits))


@torch.no_grad()
def test_later_tokens_change_nothing_in_earlier_ones() -> None:
    elastic, (x, memory, self_mask, cross_mask) = block(), block_inputs()
    width, bits = Width(2, 8, Arithmetic.INTEGER), integer_bits(4, 4)
    whole = elastic(x, memory, self_mask, cross_mask, width, bits)
    first = elastic(x[:, :2], memory, self_mask[:2, :2], cross_mask[:2], width, bits)
    torch.testing.assert_close(first, whole[:, :2])
