from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from training.quant.lsq import lsq_codes, lsq_product_codes, rescale, weight_range
from training.quant.quantizer import BITS, code_range

values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 20)),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)
log_steps = st.floats(-7, 3, width=32)
GELU_RANGE = (-1, 14)
ranges = st.sampled_from([*map(weight_range, BITS), *map(code_range, BITS), GELU_RANGE])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clear_of_jumps(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Values neither near a rounding tie nor between the last code and half a step beyond it.

    Only there does it matter whether x is divided or multiplied, and whether the clamp acts before rounding or after.
    """
    u = x / step
    tie = ((u - torch.floor(u)) - 0.5).abs() < 1e-3
    edge = ((u > high - 1e-3) & (u < high + 0.501)) | ((u < low + 1e-3) & (u > low - 0.501))
    return ~(tie | edge)


def test_there_are_fifteen_weights_and_sixteen_activations_at_four_bits() -> None:
    assert weight_range(4) == (-7, 7)
    assert weight_range(8) == (-127, 127)
    assert [code_range(bits) for bits in BITS] == [code_range(bits) for bits in BITS]


@settings(deadline=None)
@given(
    array=values,
    log_step=log_steps,
    ends=ranges,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_codes_are_whole_numbers_in_range(
    array: np.ndarray, log_step: float, ends: tuple[int, int], dtype: torch.dtype
) -> None:
    codes = lsq_codes(torch.from_numpy(array).to(dtype), torch.tensor(log_step), *ends)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, codes.round())
    assert ends[0] <= codes.min()
    assert codes.max() <= ends[1]


@settings(deadline=None)
@given(array=values, log_step=log_steps, bits=st.sampled_from(BITS))
def test_weights_are_quantized_symmetrically(array: np.ndarray, log_step: float, bits: int) -> None:
    x, step = torch.from_numpy(array), torch.tensor(log_step)
    assert torch.equal(lsq_codes(-x, step, *weight_range(bits)), -lsq_codes(x, step, *weight_range(bits)))


@settings(deadline=None)
@given(array=values, log_step=log_steps, ends=ranges)
def test_quantizing_twice_changes_nothing(array: np.ndarray, log_step: float, ends: tuple[int, int]) -> None:
    step = torch.tensor(log_step)
    codes = lsq_codes(torch.from_numpy(array), step, *ends)
    assert torch.equal(lsq_codes(codes * torch.exp(step), step, *ends), codes)


@settings(deadline=None)
@given(array=values, ends=ranges, rows=st.integers(1, 6), columns=st.integers(1, 20), seed=st.integers(0, 1000))
def test_slicing_before_and_after_quantizing_is_the_same(
    array: np.ndarray, ends: tuple[int, int], rows: int, columns: int, seed: int
) -> None:
    x = torch.from_numpy(array)
    steps = random(len(x), 1, seed=seed)
    after = lsq_codes(x, steps, *ends)[:rows, :columns]
    assert torch.equal(lsq_codes(x[:rows, :columns], steps[:rows], *ends), after)


@settings(deadline=None)
@given(array=values, log_step=log_steps, ends=ranges)
def test_limits_may_be_tensors(array: np.ndarray, log_step: float, ends: tuple[int, int]) -> None:
    x, step = torch.from_numpy(array), torch.tensor(log_step)
    low, high = (torch.tensor(float(end)) for end in ends)
    assert torch.equal(lsq_codes(x, step, low, high), lsq_codes(x, step, *ends))


@pytest.mark.parametrize("ends", [(-7, 7), (-8, 7), (-127, 127), GELU_RANGE])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_are_the_finite_differences_of_all_but_the_rounding(ends: tuple[int, int], per_channel: bool) -> None:
    x = (random(5, 400) * 2).double()
    log_step = (torch.full((5, 1), math.log(2 / ends[1])) + 0.3 * random(5, 1, seed=1)).double()
    if not per_channel:
        log_step = log_step[:1, 0].reshape(())
    x = torch.where(clear_of_jumps(x, log_step.exp(), *ends), x, 0.3 * log_step.exp())
    weights = random(5, 400, seed=2).double()
    a, b = x.clone().requires_grad_(), log_step.clone().requires_grad_()
    (weights * lsq_codes(a, b, *ends) * b.exp()).sum().backward()

    codes = lsq_codes(x, log_step, *ends).double()
    rounding = codes - (x / log_step.exp()).clamp(*ends)  # held fixed: what straight-through means

    def smooth(x: Tensor, log_step: Tensor) -> Tensor:
        return weights * ((x / log_step.exp()).clamp(*ends) + rounding) * log_step.exp()

    assert (rounding.abs() > 0.1).any() and (codes == ends[1]).any()
    small = 1e-6
    by_x = (smooth(x + small, log_step) - smooth(x - small, log_step)) / (2 * small)
    by_step = (smooth(x, log_step + small) - smooth(x, log_step - small)) / (2 * small)
    torch.testing.assert_close(a.grad, by_x, rtol=1e-4, atol=1e-4)
    expected = by_step.sum(dim=1, keepdim=True) if per_channel else by_step.sum()
    torch.testing.assert_close(b.grad, expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(array=values, log_step=log_steps, ends=ranges)
def test_values_and_gradients_agree_with_fake_quantize(
    array: np.ndarray, log_step: float, ends: tuple[int, int]
) -> None:
    step = torch.tensor(log_step).exp()
    x = torch.from_numpy(array)
    x = torch.where(clear_of_jumps(x, step, *ends), x, 0.0).requires_grad_()
    ours = lsq_codes(x, step.log(), *ends) * step
    theirs = torch.fake_quantize_per_tensor_affine(x, step.item(), 0, *ends)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(y.square().sum() + y.sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    ends=ranges,
    factor=st.sampled_from([1.0, 0.25]),
)
def test_step_gradients_agree_with_learnable_fake_quantize_per_tensor(
    seed: int, ends: tuple[int, int], factor: float
) -> None:
    step = torch.tensor([1.5 / ends[1]], requires_grad=True)
    log_step = step.detach().log().requires_grad_()
    x = random(300, seed=seed)
    x = torch.where(clear_of_jumps(x, step.detach(), *ends), x, 0.0)
    ours = lsq_codes(x, log_step, *ends) * log_step.exp()
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, step, torch.zeros(1), *ends, factor)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    weights = random(300, seed=seed + 1)
    (by_log,) = torch.autograd.grad((weights * ours).sum(), log_step)
    (by_step,) = torch.autograd.grad((weights * theirs).sum(), step)
    torch.testing.assert_close(by_log * factor, by_step * step.detach(), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), bits=st.sampled_from(BITS))
def test_step_gradients_agree_with_learnable_fake_quantize_per_channel(seed: int, bits: int) -> None:
    low, high = weight_range(bits)
    step = ((1.5 + 0.5 * torch.rand(4, generator=torch.Generator().manual_seed(seed))) / high).requires_grad_()
    log_step = step.detach().log().unsqueeze(1).requires_grad_()
    x = random(4, 100, seed=seed)
    x = torch.where(clear_of_jumps(x, step.detach()[:, None], low, high), x, 0.0)
    ours = lsq_codes(x, log_step, low, high) * log_step.exp()
    theirs = torch._fake_quantize_learnable_per_channel_affine(x, step, torch.zeros(4), 0, low, high, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        ours,
        torch.fake_quantize_per_channel_affine(x, step.detach(), torch.zeros(4, dtype=torch.int32), 0, low, high),
        rtol=1e-6,
        atol=1e-6,
    )
    weights = random(4, 100, seed=seed + 1)
    (by_log,) = torch.autograd.grad((weights * ours).sum(), log_step)
    (by_step,) = torch.autograd.grad((weights * theirs).sum(), step)
    torch.testing.assert_close(by_log[:, 0], by_step * step.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ends", [(-7, 7), (-8, 7), (-127, 127), GELU_RANGE])
@pytest.mark.parametrize("of", ["weight", "input"])
def test_gradients_of_a_rescaled_product_are_those_of_the_product_rule(ends: tuple[int, int], of: str) -> None:
    # `x` is what is quantized: (9, 40) weights with a step per row, or a (6, 40) input with one step.
    rows = (9, 1) if of == "weight" else ()
    x, matrix = (random(9, 40), random(6, 40, seed=1)) if of == "weight" else (random(6, 40), random(9, 40, seed=1))
    log_step = math.log(2 / ends[1]) + 0.3 * random(1, *rows, seed=4)[0]
    bias, weights = random(9, seed=2), random(6, 9, seed=3)
    low, high = (torch.tensor(float(end)) for end in ends)
    x = torch.where(clear_of_jumps(x, log_step.exp(), *ends), x, 0.3 * log_step.exp())
    found = []
    for ahead in (False, True):
        a, b, c, m = (t.clone().requires_grad_() for t in (x, log_step, bias, matrix))
        codes = (lsq_product_codes if ahead else lsq_codes)(a, b, low, high)
        assert torch.equal(codes, lsq_codes(x, log_step, *ends))
        step = (b.detach() if ahead else b).exp()
        product, scale = (m @ codes.t(), step.flatten()) if of == "weight" else (codes @ m.t(), step.expand(9))
        y = rescale(product, scale, c) if ahead else product * scale + c
        (y * weights).sum().backward()
        found.append([y.detach(), *(t.grad for t in (a, b, c, m))])
    for plain, merged in zip(*found, strict=True):
        torch.testing.assert_close(merged, plain, rtol=1e-4, atol=1e-4)


def test_the_bias_gradient_of_a_product_in_bf16_is_that_of_an_autocast_linear_layer() -> None:
    product, scale, weights = random(64, 9).bfloat16(), random(9, seed=1).abs() + 0.1, random(64, 9, seed=2)
    bias = random(9, seed=3).requires_grad_()
    leaf = product.clone().requires_grad_()
    (rescale(leaf, scale, bias) * weights).sum().backward()
    torch.testing.assert_close(bias.grad, weights.sum(0), rtol=2**-7, atol=2**-6)  # eight bits of each row and sum
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(leaf.grad.float(), weights * scale, rtol=2**-7, atol=0.0)
