"""Storage of 4-bit codes: two per byte, the first of each pair in the low half, as in ONNX INT4 tensors."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from training.quant.quantizer import code_range

LOW, HIGH = code_range(4)

Array = TypeVar("Array", np.ndarray, Tensor)


def pack_int4(codes: Array) -> Array:
    """Pack int8 codes (..., n) from -8 to 7 into uint8 bytes (..., ceil(n / 2)), every row for itself.

    The spare half of a row of odd length is zero. Takes and returns a NumPy array or a tensor, on its device.

    Raises:
        TypeError: ``codes`` is not int8.
        ValueError: a code does not fit 4 bits, or ``codes`` has no dimension.
    """
    if isinstance(codes, Tensor):
        return torch.from_numpy(pack_int4(codes.cpu().numpy())).to(codes.device)
    if codes.dtype != np.int8:
        raise TypeError(f"codes: expected int8, got {codes.dtype}")
    if codes.ndim == 0:
        raise ValueError("codes: expected at least one dimension")
    if codes.size and (codes.min() < LOW or codes.max() > HIGH):
        raise ValueError(f"codes: expected {LOW} to {HIGH}, got {codes.min()} to {codes.max()}")
    halves = codes.view(np.uint8) & 0x0F
    packed = halves[..., 0::2].copy()
    odd = halves[..., 1::2]
    packed[..., : odd.shape[-1]] |= odd << 4
    return packed


def unpack_int4(packed: Array, count: int | None = None) -> Array:
    """The int8 codes (..., count) in ``packed`` (..., ceil(count / 2)); ``count`` defaults to an even number.

    Raises:
        TypeError: ``packed`` is not uint8.
        ValueError: rows of ``packed`` do not hold ``count`` codes.
    """
    if isinstance(packed, Tensor):
        return torch.from_numpy(unpack_int4(packed.cpu().numpy(), count)).to(packed.device)
    if packed.dtype != np.uint8:
        raise TypeError(f"packed: expected uint8, got {packed.dtype}")
    if packed.ndim == 0:
        raise ValueError("packed: expected at least one dimension")
    held = 2 * packed.shape[-1]
    count = held if count is None else count
    if not held - 1 <= count <= held or count < 0:
        raise ValueError(f"count: {packed.shape[-1]} bytes per row hold {held} codes or one less, got {count}")
    codes = np.empty((*packed.shape[:-1], held), np.int8)
    codes[..., 0::2] = (packed << 4).view(np.int8) >> 4  # an arithmetic shift back extends the sign
    codes[..., 1::2] = packed.view(np.int8) >> 4
    return codes[..., :count].copy()
