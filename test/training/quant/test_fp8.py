from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from training.quant.fp8 import E4M3_MAX, fp8_codes, fp8_scale, round_to_e4m3

values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 20)),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)
scales = st.floats(2**-10, 2**10, width=32)
ONE = torch.tensor(1.0)


def cast(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).to(torch.float32)


@pytest.fixture(scope="module")
def representable() -> torch.Tensor:
    """All 253 finite values of the format, ascending."""
    return torch.unique(cast(torch.arange(-256, 256).to(torch.int8).view(torch.float8_e4m3fn).float()).nan_to_num(0.0))


def test_rounding_equals_the_hardware_format_over_the_whole_range_of_float32(representable: torch.Tensor) -> None:
    assert len(representable) == 253
    patterns = torch.arange(-(2**31), 2**31, 4999, dtype=torch.int64).to(torch.int32).view(torch.float32)
    halfway = (representable[1:] + representable[:-1]) / 2
    beside = [torch.nextafter(halfway, torch.tensor(end)) for end in (-500.0, 500.0)]
    x = torch.cat([patterns[~patterns.isnan()].clamp(-448, 448), representable, halfway, *beside])
    assert torch.equal(round_to_e4m3(x), cast(x))


def test_the_cast_saturates_and_keeps_nan() -> None:
    codes = fp8_codes(torch.tensor([1e9, -1e9, torch.inf, 449.0, torch.nan]), ONE)
    assert codes[:4].tolist() == [448.0, -448.0, 448.0, 448.0]
    assert codes[4].isnan()


@settings(deadline=None)
@given(array=values, scale=scales)
def test_codes_are_symmetric_and_casting_again_changes_nothing(array: np.ndarray, scale: float) -> None:
    x, s = torch.from_numpy(array), torch.tensor(scale)
    codes = fp8_codes(x, s)
    assert codes.abs().max() <= E4M3_MAX
    assert torch.equal(codes, cast(codes))
    assert torch.equal(fp8_codes(-x, s), -codes)
    assert torch.equal(fp8_codes(codes, ONE), codes)


@settings(deadline=None)
@given(array=values)
def test_the_scale_reaches_the_maximum_and_errs_by_a_sixteenth_at_most(array: np.ndarray) -> None:
    x = torch.from_numpy(array)
    for dim, shape in ((None, ()), (1, (len(x), 1))):
        scale = fp8_scale(x, dim)
        assert scale.shape == shape
        restored = fp8_codes(x, scale) * scale
        # half a spacing: a sixteenth of normal values, 2^-10 of the scale below them
        assert ((restored - x).abs() <= torch.maximum(x.abs() / 16, scale * 2**-10) * 1.0001).all()


def test_low_precision_inputs_hold_the_codes_exactly() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 3
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        codes = fp8_codes(low, torch.tensor(0.013))
        assert codes.dtype == dtype
        assert torch.equal(codes.float(), fp8_codes(low.float(), torch.tensor(0.013)))


def test_the_gradient_is_that_of_the_clamped_quotient() -> None:
    x = (torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 300).requires_grad_()
    scale = torch.tensor(0.7)
    (gradient,) = torch.autograd.grad(fp8_codes(x.float(), scale).sum(), x)

    def smooth(v: torch.Tensor) -> torch.Tensor:
        return (v / scale.double()).clamp(-E4M3_MAX, E4M3_MAX)

    with torch.no_grad():
        expected = (smooth(x + 1e-4) - smooth(x - 1e-4)) / 2e-4
    assert (expected == 0).any()
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


def test_the_scale_carries_no_gradient_and_zeros_have_one() -> None:
    assert not fp8_scale(torch.ones(3, requires_grad=True)).requires_grad
    assert torch.equal(fp8_codes(torch.zeros(4), fp8_scale(torch.zeros(4))), torch.zeros(4))


def test_compiled_code_gives_the_same_codes_and_gradients(representable: torch.Tensor) -> None:
    halfway = (representable[1:] + representable[:-1]) / 2
    x = torch.cat([halfway, torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 200]).requires_grad_()
    compiled = torch.compile(fp8_codes)
    codes, expected = compiled(x, ONE), fp8_codes(x, ONE)
    assert torch.equal(codes, expected)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (codes, expected)))
