"""Compute capabilities of NVIDIA GPUs, and what needs which: the one table that selector and engines go by.

Sources: NVIDIA's support matrices (INT8 from 7.5, INT4 weights from 8.0, FP8 from 8.9, FP4 from 10.0; TensorRT from
10.5 on needs 7.5) and the compute capabilities that the builder of TensorRT-RTX 1.7 lists.
"""

from __future__ import annotations

from collections.abc import Mapping

GPU_CAPABILITY = (7, 5)
"""The least compute capability on which a GPU runtime of this software runs."""

MINIMUM_CAPABILITY: Mapping[str, tuple[int, int]] = {
    "fp32": GPU_CAPABILITY, "fp16": GPU_CAPABILITY, "int8": (7, 5), "int4": (8, 0), "fp8": (8, 9), "fp4": (10, 0),
}  # fmt: skip
"""Element type -> the least compute capability that multiplies it."""

TENSORRT_RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
"""What TensorRT-RTX's builder accepts: desktop GPUs, neither Orin (8.7) nor Hopper (9.0)."""


def dotted(capability: tuple[int, int]) -> str:
    """Return a compute capability as people write it: ``8.7``."""
    return f"{capability[0]}.{capability[1]}"
