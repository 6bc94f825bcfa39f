"""Learned step size quantization with log-steps (``algorithms.md`` section 2), as integer codes.

``codes = clamp(round_half_even(x / exp(log_step)), low, high)`` and ``x^ = codes * exp(log_step)``, zero point 0: the
arithmetic of ONNX QuantizeLinear. Rounding passes gradients straight through. Codes and step are kept apart: a matrix
product of codes is exact where one of rescaled values in BF16 is not, and the gradient of the step follows from the
product rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.quant.quantizer import code_range


def weight_range(bits: int) -> tuple[int, int]:
    """Symmetric codes of a weight: 15 values at 4 bits, 255 at 8."""
    high = code_range(bits)[1]
    return -high, high


def lsq_codes(x: Tensor, log_step: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Integer codes of ``x`` as float32 whole numbers with straight-through gradients.

    Args:
        x: values, any shape and floating dtype.
        log_step: natural logarithm of the step, broadcasts against ``x``.
        low: least code; a number or a scalar tensor.
        high: greatest code, likewise.

    Returns:
        Codes, float32. The gradient with respect to ``x`` is ``1 / step`` inside the range and zero outside; with
        respect to ``log_step`` it is ``-x / step`` inside and zero outside, so that of ``codes * step`` is LSQ's.
    """
    scaled = torch.clamp(x.to(torch.float32) / torch.exp(log_step), low, high)  # type: ignore[arg-type]
    return scaled + (torch.round(scaled) - scaled).detach()  # exact: both are multiples of ulp(scaled)


class _StepCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log_step: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, log_step, low, high)
        return torch.round(torch.clamp(x.to(torch.float32) / torch.exp(log_step), low, high))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, log_step, low, high = ctx.saved_tensors
        gradient = gradients[0].to(torch.float32)
        inverse = torch.exp(-log_step)  # a product per element where a quotient would take twice as long
        scaled = x.to(torch.float32) * inverse
        kept = torch.clamp(scaled, low, high)
        passed = torch.where(scaled == kept, gradient, 0.0)  # the mask has one use: it would be stored as booleans
        slope = (gradient * torch.round(kept) - passed * kept).sum(-1, keepdim=True)  # by rows: one loop with the rest
        slope = slope.sum_to_size(log_step.shape)
        return (passed * inverse).to(x.dtype), slope, None, None


def lsq_product_codes(x: Tensor, log_step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """:func:`lsq_codes` for products of codes that are rescaled by the *detached* step afterwards.

    A product is linear in its codes, so the gradient of the log-step that rescales it is the sum of codes times their
    gradients. Added here to the gradient through rounding it leaves ``(codes - x / step) * gradient``: that of LSQ,
    from one pass over ``x`` in place of one more over every product, and without the difference of two large sums.

    Args:
        x: values, any shape and floating dtype.
        log_step: as in :func:`lsq_codes`, float32; a scalar, or one whose last size is 1 (steps of rows).
        low: least code; a scalar tensor.
        high: greatest code, likewise.
    """
    codes: Tensor = _StepCodes.apply(x, log_step, low, high)
    return codes


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = product.dtype
        return product * scale + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        (scale,) = ctx.saved_tensors
        inner = (gradients[0] * scale).to(ctx.dtype)
        rows = inner.flatten(0, -2)
        # A product with ones: as a reduction, a compiler would read whole columns, a page apart from row to row.
        sums = rows.new_ones((1, rows.shape[0])) @ rows
        return inner, None, sums.flatten().to(torch.float32) / scale


def rescale(product: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``product * scale + bias`` for a scale that needs no gradient.

    The gradient of the bias is summed from that of the product, which is stored anyway (in BF16 under autocast, as for
    any linear layer's bias); the unscaled one would be written and read once more, in float32, for this sum alone.

    Args:
        product: (..., rows), at least two dimensions.
        scale: (rows,) float32, no zeros, a constant.
        bias: (rows,) float32.
    """
    result: Tensor = _Rescale.apply(product, scale, bias)
    return result
