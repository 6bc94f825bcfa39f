"""BatchQuant activation quantizer, baseline and option (``algorithms.md`` section 2).

Every subnet shifts the distribution of an activation, so the range is read from the batch itself and only a small
correction is learned, one pair per bit width. At test time the range is that of the running subnet, re-estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcqfa_ros.errors import UserError
from training.quant.quantizer import BITS, TINY, code_range


class RangeNotEstimatedError(UserError, RuntimeError):
    """A BatchQuant quantizer runs at test time without the ranges of the running subnet."""


class BatchQuantCodes(NamedTuple):
    """``x^ = (codes - offset) * step``; codes are whole numbers in the dtype of x, the rest float32 scalars."""

    codes: Tensor
    offset: Tensor
    step: Tensor


class BatchQuant(nn.Module):
    """Asymmetric per-tensor quantizer whose range comes from the batch (training) or from ``reestimated_ranges``.

    With ``s = (x_max - x_min) / (q_max - q_min)`` and ``z = clamp(q_min - round(x_min / s))``, the code of ``x`` is
    ``clamp(round(x g / s + z + b))`` and the value it stands for ``(code - z - b) s / g``.

    Attributes:
        estimating: ranges of batches are averaged; see :func:`reestimated_ranges`.
        live: the range is that of the batch in evaluation mode too, for training without dropout.
    """

    minimum: Tensor
    maximum: Tensor
    batches: Tensor

    def __init__(self, bits: Sequence[int] = BITS) -> None:
        """Start with gain 1 and shift 0 for each bit width of ``bits``; it depends on no channel count.

        Raises:
            ValueError: a bit width is neither 4 nor 8.
        """
        super().__init__()
        for width in bits:
            code_range(width)
        self.bits = tuple(bits)
        self.raw_gain = nn.Parameter(torch.full((len(self.bits),), math.log(math.e - 1.0)))  # softplus of it is 1
        self.shift = nn.Parameter(torch.zeros(len(self.bits)))
        self.estimating = False
        self.live = False
        self.register_buffer("minimum", torch.zeros(()))
        self.register_buffer("maximum", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forget(self) -> None:
        """Drop the estimated range."""
        for buffer in (self.minimum, self.maximum, self.batches):
            buffer.zero_()

    @torch.no_grad()
    def batch_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over channels (the last dimension) of the batch minimum and maximum, widened to hold 0; no gradient.

        Under distributed training the batch is that of all processes together.
        """
        flat = x.detach().reshape(-1, x.shape[-1])
        extremes = torch.stack((-flat.amin(dim=0), flat.amax(dim=0)))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        low, high = extremes.to(torch.float32).mean(dim=1).clamp_min(0.0)
        return -low, high

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training or self.estimating or self.live:
            low, high = self.batch_range(x)
            if self.estimating:
                self.batches += 1
                self.minimum += (low - self.minimum) / self.batches
                self.maximum += (high - self.maximum) / self.batches
            return low, high
        if not torch.compiler.is_compiling() and not self.batches:
            raise RangeNotEstimatedError(
                "a BatchQuant quantizer has no range for this subnet: run calibration batches through the network "
                "inside reestimated_ranges() after every change of the active subnet"
            )
        return self.minimum, self.maximum

    def quantize(self, x: Tensor, bits: int) -> BatchQuantCodes:
        """Codes of ``x`` (..., channels) with straight-through gradients.

        Raises:
            ValueError: this quantizer was not made for ``bits``.
            RangeNotEstimatedError: evaluation without an estimated range.
        """
        if bits not in self.bits:
            raise ValueError(f"bits: this quantizer was made for {self.bits}, got {bits}")
        chosen = torch.zeros(len(self.bits), device=x.device)
        chosen[self.bits.index(bits)] = 1.0
        return self.select(x, chosen)

    def select(self, x: Tensor, chosen: Tensor) -> BatchQuantCodes:
        """:meth:`quantize` at the bit width where ``chosen`` (bits,) is 1 and not 0: one graph serves all of them."""
        ends = torch.tensor([code_range(width) for width in self.bits], dtype=torch.float32, device=x.device)
        low, high = (chosen[:, None] * ends).sum(0)
        x_min, x_max = self._range(x)
        batch_step = ((x_max - x_min) / (high - low)).clamp_min(TINY)
        zero_point = (low - torch.round(x_min / batch_step)).clamp(low, high)
        step = batch_step / (chosen * nn.functional.softplus(self.raw_gain)).sum()
        offset = zero_point + (chosen * self.shift).sum()
        scaled = torch.clamp(x.to(torch.float32) / step + offset, low, high)
        codes = scaled + (torch.round(scaled) - scaled).detach()
        return BatchQuantCodes(codes.to(x.dtype), offset, step)

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """The quantized ``x`` (..., channels), dequantized again, in its dtype; errors as in ``quantize``."""
        codes, offset, step = self.quantize(x, bits)
        return ((codes - offset) * step).to(x.dtype)


@contextmanager
def reestimated_ranges(network: nn.Module) -> Iterator[None]:
    """Estimate the range of every BatchQuant quantizer in ``network`` from the batches run inside the ``with`` block.

    The range is the mean over batches and replaces the former one; parameters are untouched. Evaluate the network in
    the same configuration afterwards. Quantizers that no batch reaches stay without a range.
    """
    quantizers = [module for module in network.modules() if isinstance(module, BatchQuant)]
    for quantizer in quantizers:
        quantizer.forget()
        quantizer.estimating = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.estimating = False
