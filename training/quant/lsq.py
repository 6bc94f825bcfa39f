"""Learned step size quantization with log-steps (``algorithms.md`` section 2), as integer codes.

``codes = clamp(round_half_even(x / exp(log_step)), low, high)`` and ``x^ = codes * exp(log_step)``, zero point 0: the
arithmetic of ONNX QuantizeLinear. Rounding passes gradients straight through. Codes and step are kept apart: a matrix
product of codes is exact where one of rescaled values in BF16 is not, and the gradient of the step follows from the
product rule.
"""

from __future__ import annotations

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
