from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from training.quant.quantizer import absmax_scale, codes_in_range, mse_scale
from training.quant.ranges import MSE, MinMax, Percentile, QuantRange, RangeError

values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 24)),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)
bits = st.sampled_from([4, 8])
OBSERVERS = (MinMax, Percentile, MSE)


def quantized(x: Tensor, found: QuantRange) -> Tensor:
    return codes_in_range(x, *found) * found.step


def error(x: Tensor, found: QuantRange) -> Tensor:
    return (quantized(x, found) - x).square().mean(dim=-1)


def found(observer: MinMax, x: Tensor, bits: int, symmetric: bool) -> QuantRange:
    observer.observe(x)
    return observer.range(bits, symmetric)


@settings(deadline=None)
@given(array=values, bits=bits, symmetric=st.booleans(), observer=st.sampled_from(OBSERVERS))
def test_a_range_has_all_codes_of_its_bits_and_quantizing_twice_changes_nothing(
    array: np.ndarray, bits: int, symmetric: bool, observer: type[MinMax]
) -> None:
    x = torch.from_numpy(array)
    result = found(observer(), x, bits, symmetric)
    assert result.step.shape == result.low.shape == result.high.shape == ()
    assert result.step > 0
    assert result.high - result.low == 2**bits - 1
    assert result.low <= 0 <= result.high
    if symmetric:
        assert result.low == -(2 ** (bits - 1))
    elif bits == 4:
        assert result.low >= -15 and result.high <= 15  # INT8 holds the codes as they are
    once = quantized(x, result)
    assert torch.equal(quantized(once, result), once)


@settings(deadline=None)
@given(array=values, bits=bits, symmetric=st.booleans())
def test_minimum_and_maximum_leave_at_most_half_a_step_of_error(array: np.ndarray, bits: int, symmetric: bool) -> None:
    x = torch.from_numpy(array)
    result = found(MinMax(), x, bits, symmetric)
    assert ((quantized(x, result) - x).abs() <= result.step * 0.5001).all()


@settings(deadline=None)
@given(array=values, bits=bits, symmetric=st.booleans(), channel=st.sampled_from([None, 0]))
def test_the_searched_range_is_never_worse_than_minimum_and_maximum(
    array: np.ndarray, bits: int, symmetric: bool, channel: int | None
) -> None:
    x = torch.from_numpy(array)
    searched, full = (found(kind(channel), x, bits, symmetric) for kind in (MSE, MinMax))
    ours, theirs = error(x, searched), error(x, full)
    if channel is None:
        ours, theirs = ours.mean(), theirs.mean()
    assert (ours <= theirs * 1.00001).all()


@settings(deadline=None, max_examples=50)
@given(array=values, bits=bits, symmetric=st.booleans(), observer=st.sampled_from(OBSERVERS), last=st.booleans())
def test_a_channel_gets_the_range_it_would_get_alone(
    array: np.ndarray, bits: int, symmetric: bool, observer: type[MinMax], last: bool
) -> None:
    rows = torch.from_numpy(array)
    result = found(observer(channel=-1 if last else 0), rows.T if last else rows, bits, symmetric)
    assert result.step.shape == ((1, len(rows)) if last else (len(rows), 1))
    for index, row in enumerate(rows):
        alone = found(observer(), row, bits, symmetric)
        for ours, theirs in zip(result, alone, strict=True):
            assert torch.equal(ours.flatten()[index], theirs)


@settings(deadline=None)
@given(array=values, cuts=st.lists(st.integers(0, 24), max_size=3), symmetric=st.booleans())
@pytest.mark.parametrize("observer", OBSERVERS)
def test_batches_give_the_range_of_all_values_together(
    observer: type[MinMax], array: np.ndarray, cuts: list[int], symmetric: bool
) -> None:
    x = torch.from_numpy(array)
    streamed = observer()
    width = x.shape[1]
    for first, last in pairwise([0, *sorted(c for c in set(cuts) if 0 < c < width), width]):
        streamed.observe(x[:, first:last].T)
    together = found(observer(), x.T, 4, symmetric)
    assert all(map(torch.equal, streamed.range(4, symmetric), together))


def test_a_percentile_ignores_the_outlier_that_the_maximum_follows() -> None:
    x = torch.linspace(-1.0, 1.0, 2001)
    x[1000] = 50.0
    assert found(MinMax(), x, 8, True).step == pytest.approx(50 / 127)
    assert found(Percentile(99.9), x, 8, True).step == pytest.approx(1 / 127, rel=0.01)
    low, high = (getattr(found(Percentile(99.9), x, 8, False), end) for end in ("low", "high"))
    assert -130 <= low <= -125 and 125 <= high <= 130
    assert all(map(torch.equal, found(Percentile(100.0), x, 8, True), found(MinMax(), x, 8, True)))


def test_sixteen_asymmetric_levels_fit_a_gelu_four_times_better_than_symmetric_ones() -> None:
    x = torch.nn.functional.gelu(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    asymmetric, symmetric = (found(MSE(), x, 4, kind) for kind in (False, True))
    assert asymmetric.low in (-2, -1)
    power = x.square().mean()
    assert error(x, asymmetric) / power < 0.01
    assert error(x, symmetric) / power > 0.03


def test_the_search_equals_the_direct_one_on_a_tensor() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    for width in (4, 8):
        assert torch.equal(found(MSE(), x, width, True).step, mse_scale(x, width))
        assert torch.equal(found(MinMax(), x, width, True).step, absmax_scale(x, width))


def test_large_tensors_are_sampled_but_the_maximum_sees_every_value() -> None:
    observer = MSE()
    x = torch.zeros(1_000_000)
    x[123_457] = 9.0
    observer.observe(x)
    assert observer.maximum == 9.0
    assert sum(part.numel() for part in observer.samples) < 40_000


def test_zeros_have_a_range() -> None:
    for observer in OBSERVERS:
        for symmetric in (True, False):
            result = found(observer(), torch.zeros(3, 4), 4, symmetric)
            assert torch.equal(quantized(torch.zeros(3), result), torch.zeros(3))


def test_what_gives_no_range_is_refused() -> None:
    with pytest.raises(RangeError, match="nothing was observed"):
        MSE().range(4)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(RangeError, match="NaN or infinity"):
            MinMax().observe(torch.tensor([1.0, bad]))
    per_channel = MinMax(channel=-1)
    per_channel.observe(torch.ones(2, 3))
    with pytest.raises(RangeError, match="one observer per tensor"):
        per_channel.observe(torch.ones(2, 4))
    with pytest.raises(ValueError, match="percent: expected more than 50"):
        Percentile(50.0)
    with pytest.raises(ValueError, match="4 or 8, got 3"):
        per_channel.range(3)
