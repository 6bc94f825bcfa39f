"""FP8 E4M3: saturating cast with a straight-through gradient (``algorithms.md`` section 2).

E4M3 has 3 fraction bits, normal values from 2^-6 to 448, a spacing of 2^-9 below them and no infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.quant.quantizer import TINY, absolute_maximum

E4M3_MAX = 448.0  # largest finite value
SMALLEST_NORMAL = 2.0**-6
EXPONENT_MASK = 0x7F800000  # of a float32
TO_ROUNDING_CONSTANT = 20 << 23  # exponent of the value -> exponent of the number whose last bit is the value's spacing


def round_to_e4m3(u: Tensor) -> Tensor:
    """The E4M3 value nearest to ``u``, ties to even; float32, |u| <= 448; NaN stays NaN.

    Equal to ``u.to(torch.float8_e4m3fn).to(torch.float32)`` for every value (a zero may lose its sign). Adding and
    subtracting a number whose last bit is one spacing rounds in plain float32 arithmetic, which compiles to vector
    code; the cast does not and takes twice as long.
    """
    exponent = u.abs().clamp_min(SMALLEST_NORMAL).view(torch.int32) & EXPONENT_MASK
    constant = (exponent + TO_ROUNDING_CONSTANT).view(torch.float32) * 1.5
    return (u + constant) - constant


def fp8_codes(x: Tensor, scale: Tensor) -> Tensor:
    """Saturating E4M3 cast of ``x / scale``: values of the format, in the dtype of ``x`` (exact in BF16 and FP16 too).

    The gradient is that of ``clamp(x / scale, -448, 448)``, so it passes straight through the rounding and is zero
    where the cast saturates. ``scale`` is float32 and broadcasts against ``x``.
    """
    u = (x.to(torch.float32) / scale).clamp(-E4M3_MAX, E4M3_MAX)
    return (u + (round_to_e4m3(u.detach()) - u.detach())).to(x.dtype)


def fp8_scale(x: Tensor, dim: int | None = None) -> Tensor:
    """Scale at which the absolute maximum of ``x`` becomes 448: a float32 scalar, or ``dim`` reduced to size 1.

    It carries no gradient and never falls below a tiny positive number. Take it from the full tensor, not from a
    slice, so that a narrower network keeps the codes of the wider one.
    """
    return (absolute_maximum(x.detach(), dim).to(torch.float32) / E4M3_MAX).clamp_min(TINY)
