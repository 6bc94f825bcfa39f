"""Calibration: ranges of quantizers from values observed batch by batch (``algorithms.md`` sections 2 and 7).

A symmetric range has the codes of a signed integer. An asymmetric one has 2^bits codes placed where the values are and
still a zero point of 0: ``code = clamp(round(x / step), low, low + 2^bits - 1)``. At 4 bits such codes lie from -15 to
15 and fit INT8 as they are; the 256 asymmetric codes of 8 bits need a zero point of ``-128 - low`` there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dcqfa_ros.errors import UserError
from training.quant.quantizer import SHRINKS, TINY, code_range, codes_in_range, mse_scale

SAMPLES_PER_CALL = 16_384  # values kept per tensor and call; minimum and maximum see every value
SAMPLES_PER_SEARCH = 65_536  # values per channel at which the lowest code of an asymmetric range is chosen
LOW_CANDIDATES = 16  # lowest codes tried in an asymmetric search: all there are at 4 bits


Method = Literal["mse", "min_max", "percentile"]


class RangeError(UserError, ValueError):
    """No range follows from what was observed."""


class QuantRange(NamedTuple):
    """Step, lowest and highest code: float32, scalars or one per channel in a shape that broadcasts against values."""

    step: Tensor
    low: Tensor
    high: Tensor


def range_between(minimum: Tensor, maximum: Tensor, bits: int, symmetric: bool) -> QuantRange:
    """The range that just holds ``minimum``, ``maximum`` (float32, any equal shape) and 0.

    An asymmetric range is shifted to whole codes, so either end may lie up to half a step inside the limit.
    """
    low, high = code_range(bits)
    minimum, maximum = minimum.clamp_max(0.0), maximum.clamp_min(0.0)
    if symmetric:
        step = (torch.maximum(-minimum, maximum) / high).clamp_min(TINY)
        return QuantRange(step, torch.full_like(step, low), torch.full_like(step, high))
    step = ((maximum - minimum) / (high - low)).clamp_min(TINY)
    lowest = torch.round(minimum / step)
    return QuantRange(step, lowest, lowest + (high - low))


class MinMax:
    """Range of everything observed, per tensor or per channel."""

    def __init__(self, channel: int | None = None) -> None:
        """Begin with nothing observed; ``channel`` is the dimension with a range per index, None for one in all."""
        self.channel = channel
        self.shape: tuple[int, ...] = ()
        self.minimum = torch.empty(0)
        self.maximum = torch.empty(0)

    @property
    def observed(self) -> bool:
        """Whether any value was observed."""
        return self.minimum.numel() > 0

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Add the values of ``x``, not empty, any floating dtype.

        Raises:
            RangeError: ``x`` holds NaN or infinity, or another number of channels than before.
        """
        x = x.detach()
        shape: tuple[int, ...] = ()
        rows = x.reshape(1, -1)
        if self.channel is not None:
            rows = x.movedim(self.channel, 0).reshape(x.shape[self.channel], -1)
            channel = self.channel % x.ndim
            shape = tuple(size if d == channel else 1 for d, size in enumerate(x.shape))
        minimum, maximum = (end.to(torch.float32) for end in rows.aminmax(dim=1, keepdim=True))
        if not (minimum.isfinite().all() and maximum.isfinite().all()):
            raise RangeError("calibration met NaN or infinity; check the observations and the network's weights")
        if not self.observed:
            self.shape, self.minimum, self.maximum = shape, minimum, maximum
        elif shape != self.shape:
            raise RangeError(f"channels of shape {shape} after {self.shape}: use one observer per tensor to calibrate")
        else:
            self.minimum = torch.minimum(self.minimum, minimum)
            self.maximum = torch.maximum(self.maximum, maximum)
        self._keep(rows)

    def range(self, bits: int, symmetric: bool = True) -> QuantRange:
        """The range for ``bits`` bits (4 or 8) from what was observed so far.

        Raises:
            RangeError: nothing was observed.
            ValueError: ``bits`` is neither 4 nor 8.
        """
        if not self.observed:
            raise RangeError("nothing was observed: run calibration batches before asking for a range")
        step, low, high = self._range(bits, symmetric)
        return QuantRange(step.reshape(self.shape), low.reshape(self.shape), high.reshape(self.shape))

    def _keep(self, rows: Tensor) -> None:
        """Remember what else the range depends on from ``rows`` (channels, values)."""

    def _range(self, bits: int, symmetric: bool) -> QuantRange:
        """The range with tensors of shape (channels, 1)."""
        return range_between(self.minimum, self.maximum, bits, symmetric)


class _Sampling(MinMax):
    """Keeps every value of small tensors and a deterministic sample of large ones."""

    def __init__(self, channel: int | None = None) -> None:
        super().__init__(channel)
        self.samples: list[Tensor] = []

    def _keep(self, rows: Tensor) -> None:
        stride = max(1, rows.numel() // SAMPLES_PER_CALL)
        if stride > 1:
            stride += 1 - stride % 2  # odd: every channel of an even-sized tensor is sampled
        self.samples.append(rows[:, ::stride].to(torch.float32, copy=True))

    def sample(self) -> Tensor:
        """The values kept, float32 (channels, values)."""
        return torch.cat(self.samples, dim=1)


class Percentile(_Sampling):
    """Range that leaves out the same share of values at either end (symmetric: of magnitudes)."""

    def __init__(self, percent: float = 99.9, channel: int | None = None) -> None:
        """Hold ``percent`` percent of the values below the upper end, likewise above the lower.

        Raises:
            ValueError: ``percent`` is not above 50 and at most 100.
        """
        if not 50.0 < percent <= 100.0:
            raise ValueError(f"percent: expected more than 50 and at most 100, got {percent}")
        super().__init__(channel)
        self.percent = percent

    def _range(self, bits: int, symmetric: bool) -> QuantRange:
        if self.percent == 100.0:
            return super()._range(bits, symmetric)
        values = self.sample()
        if symmetric:
            values = values.abs()
        count = values.shape[1]
        rank = min(count, 1 + int(self.percent / 100.0 * count))  # nearest rank, from 1
        upper = values.kthvalue(rank, dim=1, keepdim=True).values
        lower = -upper if symmetric else values.kthvalue(count + 1 - rank, dim=1, keepdim=True).values
        return range_between(lower, upper, bits, symmetric)


class MSE(_Sampling):
    """Range with the least mean squared quantization error of the values kept, by search."""

    def _range(self, bits: int, symmetric: bool) -> QuantRange:
        values = self.sample()
        full = super()._range(bits, symmetric)
        if symmetric:
            return full._replace(step=mse_scale(values, bits, 1, reach=full.step))
        thinned = values[:, :: max(1, values.shape[1] // SAMPLES_PER_SEARCH)]
        best, least = full, torch.full_like(full.step, torch.inf)
        for low in self._lowest_codes(full):
            candidate = self._searched(thinned, bits, low, low + (full.high - full.low))
            best, least = _better(thinned, candidate, best, least)
        searched = self._searched(values, bits, best.low, best.high)
        return _better(values, searched, full, _error(values, full))[0]

    def _lowest_codes(self, full: QuantRange) -> list[Tensor]:
        """Lowest codes (channels, 1) to try, between those at which the most shrunk range reaches one end only."""
        shrunk = full.step * min(SHRINKS)
        levels = full.high - full.low
        ends = torch.cat([torch.floor(self.minimum / shrunk), torch.ceil(self.maximum / shrunk) - levels], dim=1)
        ends = torch.minimum(torch.maximum(ends, -levels), torch.zeros_like(levels))  # 0 stays a code
        first, last = ends.amin(dim=1, keepdim=True), ends.amax(dim=1, keepdim=True)
        share = torch.linspace(0.0, 1.0, LOW_CANDIDATES, device=first.device)
        return list(torch.unique(torch.round(first + (last - first) * share), dim=1).split(1, dim=1))

    def _searched(self, values: Tensor, bits: int, low: Tensor, high: Tensor) -> QuantRange:
        """The step of least error on ``values`` for the codes from ``low`` to ``high`` (channels, 1)."""
        upper = torch.where(high > 0, self.maximum / high.clamp_min(1.0), 0.0)
        lower = torch.where(low < 0, self.minimum / low.clamp_max(-1.0), 0.0)
        reach = torch.maximum(upper, lower).clamp_min(TINY)
        return QuantRange(mse_scale(values, bits, 1, reach, (low, high)), low, high)


OBSERVERS: dict[Method, type[MinMax]] = {"mse": MSE, "min_max": MinMax, "percentile": Percentile}


def _error(values: Tensor, candidate: QuantRange) -> Tensor:
    """Mean squared error (channels, 1) of ``values`` (channels, n) in the range ``candidate``."""
    return (codes_in_range(values, *candidate) * candidate.step - values).square().mean(dim=1, keepdim=True)


def _better(values: Tensor, new: QuantRange, old: QuantRange, least: Tensor) -> tuple[QuantRange, Tensor]:
    """Per channel the range of less error, ``least`` being that of ``old``, and its error."""
    error = _error(values, new)
    chosen = (torch.where(error < least, ours, theirs) for ours, theirs in zip(new, old, strict=True))
    return QuantRange(*chosen), torch.minimum(error, least)
