"""Integer quantizers with zero point 0 and the choice of their scales (``algorithms.md`` section 2).

``code = clamp(round_half_even(x / scale), low, high)``, ``x^ = code * scale``: the arithmetic of ONNX QuantizeLinear /
DequantizeLinear, so codes agree bit for bit with the exported graph. Unless a range of codes is passed it is that of a
signed integer of ``bits`` bits, -2^(bits-1) to 2^(bits-1) - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (4, 8)  # bit widths there are
SHRINKS = tuple(1.0 - 0.01 * i for i in range(81))  # candidate clipping ranges as shares of the absolute maximum
PATIENCE = 40  # candidates without improvement before the search for a clipping range ends
TINY = 1e-8  # scale of a tensor or channel that is all zero


def code_range(bits: int) -> tuple[int, int]:
    """Lowest and highest code of a symmetric quantizer of ``bits`` bits.

    Raises:
        ValueError: ``bits`` is neither 4 nor 8.
    """
    if bits not in BITS:
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def codes_in_range(x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Codes of ``x`` from ``low`` to ``high`` (two numbers or two tensors) as whole numbers; all broadcast to ``x``."""
    return torch.clamp(torch.round(x / scale), low, high)  # type: ignore[arg-type]  # its overloads know no unions


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integer codes of ``x`` as float32 whole numbers; ``scale`` broadcasts against ``x``."""
    return codes_in_range(x, scale, *code_range(bits))


def absolute_maximum(x: Tensor, dim: int | None = None) -> Tensor:
    """Greatest magnitude in ``x``: a scalar, or one per index of all other dimensions (``dim`` kept with size 1)."""
    return x.abs().amax() if dim is None else x.abs().amax(dim=dim, keepdim=True)


def absmax_scale(x: Tensor, bits: int, dim: int | None = None) -> Tensor:
    """Scale that just reaches the absolute maximum of ``x``: a scalar, or one per index of all other dimensions."""
    return (absolute_maximum(x, dim) / code_range(bits)[1]).clamp_min(TINY)


def round_to_nearest(x: Tensor, bits: int, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """The baseline without any tuning: codes of ``x`` at the absolute-maximum scale, and that scale.

    ``dim`` 1 of a weight (out, in) gives per-channel, ``dim`` -1 of activations (..., features) per-token scales.
    """
    scale = absmax_scale(x, bits, dim)
    return quantize(x, scale, bits), scale


def mse_scale(
    x: Tensor,
    bits: int,
    dim: int | None = None,
    reach: Tensor | None = None,
    codes: tuple[Tensor | int, Tensor | int] | None = None,
) -> Tensor:
    """Scale with the least mean squared quantization error among clipping ranges from 20 % to 100 % of the maximum.

    The ranges shrink until ``PATIENCE`` in a row improved no scale; below 60 % only heavy tails improve.

    Args:
        x: values, any shape, float32.
        bits: 4 or 8.
        dim: dimension over which the error of one scale is summed (kept with size 1); None for one scale in all.
        reach: the scale of the full range where ``x`` is only a sample of the tensor; default from ``x`` itself.
        codes: lowest and highest code; default ``code_range(bits)``.
    """
    full = absmax_scale(x, bits, dim) if reach is None else reach
    low, high = code_range(bits) if codes is None else codes
    best, least = full, torch.full_like(full, torch.inf)
    improved_at = 0
    for index, shrink in enumerate(SHRINKS):
        scale = full * shrink
        squared = (codes_in_range(x, scale, low, high) * scale - x).square()
        error = squared.mean() if dim is None else squared.mean(dim=dim, keepdim=True)
        better = error < least
        if better.any():
            best, least, improved_at = torch.where(better, scale, best), torch.minimum(error, least), index
        elif index - improved_at >= PATIENCE:
            break
    return best
