"""Symmetric integer quantizers and the choice of their scales (``algorithms.md`` section 2).

``code = clamp(round_half_even(x / scale), -2^(bits-1), 2^(bits-1) - 1)``, ``x^ = code * scale``, zero point 0: the
arithmetic of ONNX QuantizeLinear / DequantizeLinear, so codes agree bit for bit with the exported graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKS = tuple(1.0 - 0.01 * i for i in range(41))  # candidate clipping ranges as shares of the absolute maximum
TINY = 1e-8  # scale of a tensor or channel that is all zero


def code_range(bits: int) -> tuple[int, int]:
    """Lowest and highest code of a symmetric quantizer of ``bits`` bits.

    Raises:
        ValueError: ``bits`` is neither 4 nor 8.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integer codes of ``x`` as float32 whole numbers; ``scale`` broadcasts against ``x``."""
    low, high = code_range(bits)
    return torch.round(x / scale).clamp(low, high)


def absmax_scale(x: Tensor, bits: int, dim: int | None = None) -> Tensor:
    """Scale that just reaches the absolute maximum of ``x``: a scalar, or one per index of all other dimensions."""
    maximum = x.abs().amax() if dim is None else x.abs().amax(dim=dim, keepdim=True)
    return (maximum / code_range(bits)[1]).clamp_min(TINY)


def mse_scale(x: Tensor, bits: int, dim: int | None = None, reach: Tensor | None = None) -> Tensor:
    """Scale with the least mean squared quantization error among clipping ranges from 60 % to 100 % of the maximum.

    Args:
        x: values, any shape, float32.
        bits: 4 or 8.
        dim: dimension over which the error of one scale is summed (kept with size 1); None for one scale in all.
        reach: the scale of the full range where ``x`` is only a sample of the tensor; default from ``x`` itself.
    """
    full = absmax_scale(x, bits, dim) if reach is None else reach
    best, least = full, torch.full_like(full, torch.inf)
    for shrink in SHRINKS:
        scale = full * shrink
        squared = (quantize(x, scale, bits) * scale - x).square()
        error = squared.mean() if dim is None else squared.mean(dim=dim, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best
