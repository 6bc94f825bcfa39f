"""Which precisions a device's runtimes execute. A precision that is not listed as executed is refused, never replaced.

Sources: NVIDIA's hardware support matrix by compute capability (INT8 from 7.5, INT4 weights from 8.0, FP8 from 8.9, FP4
from 10.0); onnxruntime pull request 12088 for 8-bit products on x86 without VNNI: they saturate unless the session asks
for exact ones, as the engine does; those take AVX2 and more time. Relative times are medians measured with ONNX Runtime
on one thread: 8 layers of width 256 (2.4, 0.81 and 1.4 ms) and 12 of width 512 (15.5, 5.1 and 6.6 ms) in FP32, INT8 and
INT4 weights; that of INT8 without dot product instructions is an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.devices.detect import Device, Processor

ONNXRUNTIME = "onnxruntime"
TENSORRT = "tensorrt"

PRECISIONS: Mapping[str, Bits] = {
    "fp32": Bits(weight=32, activation=32, kind="float"),
    "fp16": Bits(weight=16, activation=16, kind="float"),
    "fp8": Bits(weight=8, activation=8, kind="float"),
    "fp4": Bits(weight=4, activation=4, kind="float"),
    "w8a8": Bits(weight=8, activation=8, kind="int"),
    "w4a16": Bits(weight=4, activation=16, kind="int"),
    "w4a4": Bits(weight=4, activation=4, kind="int"),
}
"""Named precisions for reports."""

_MINIMUM_CAPABILITY: Mapping[str, tuple[int, int]] = {
    "fp32": (5, 0), "fp16": (5, 3), "w8a8": (7, 5), "w4a16": (8, 0), "fp8": (8, 9), "fp4": (10, 0),
}  # fmt: skip
_INT8_TIME = 0.33
_INT8_TIME_WITHOUT_DOT_PRODUCT = 0.6
_INT4_WEIGHT_TIME = 0.5
_FLOAT_TIME = 1.0


@dataclass(frozen=True, slots=True)
class Runtime:
    """One runtime on one device.

    Attributes:
        name: as bundles write it in ``executed`` and ``LatencyRecord.runtime``.
        version: of the installed package, None where it is not installed.
        runs_on: ``cpu`` or ``gpu``.
        unavailable: why no variant can run on it now, or None.
        refuses: bits -> why this runtime does not execute them here, or None.
        relative_time: bits -> modelled time of one layer, FP32 = 1.
    """

    name: str
    version: str | None
    runs_on: Literal["cpu", "gpu"]
    unavailable: str | None
    refuses: Callable[[Bits], str | None]
    relative_time: Callable[[Bits], float]

    def precisions(self) -> dict[str, str]:
        """Return precision name -> ``yes``, or why not."""
        return {name: self.refuses(bits) or "yes" for name, bits in PRECISIONS.items()}


def runtimes(device: Device, version: Callable[[str], str | None] | None = None) -> tuple[Runtime, ...]:
    """Return the runtimes that concern ``device``, those that can run now first.

    Args:
        device: what was detected.
        version: package name -> installed version or None; for tests.
    """
    version = version or installed_version
    found = version(ONNXRUNTIME)
    missing = None if found else "the Python package onnxruntime is not installed"
    processor = device.processor
    int8_time = _INT8_TIME if processor.features else _INT8_TIME_WITHOUT_DOT_PRODUCT
    cpu = Runtime(
        ONNXRUNTIME,
        found,
        "cpu",
        missing,
        lambda bits: _refused_by_cpu(bits, processor),
        lambda bits: _relative_time(bits, int8_time),
    )
    if device.gpu is None:
        return (cpu,)
    capability = device.gpu.compute_capability
    gpu = Runtime(
        TENSORRT,
        version(TENSORRT),
        "gpu",
        "this version has no TensorRT engine: the policy runs on the processor",
        lambda bits: _refused_by_tensorrt(bits, capability),
        _relative_time,
    )
    return cpu, gpu


def installed_version(package: str) -> str | None:
    """Return the version of an installed Python package without importing it, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _label(bits: Bits) -> str:
    if bits.kind == "float":
        return f"FP{bits.weight}" if bits.weight == bits.activation else f"FP{bits.weight}/FP{bits.activation}"
    return f"W{bits.weight}A{bits.activation}"


def _is_weight_only(bits: Bits) -> bool:
    return bits.kind == "int" and bits.activation >= 16


def _refused_by_cpu(bits: Bits, processor: Processor) -> str | None:
    if bits.kind == "float":
        if bits.weight == bits.activation == 32:
            return None
        return f"{_label(bits)}: ONNX Runtime has no {_label(bits)} kernels for processors"
    if _is_weight_only(bits):
        return None
    if bits.weight == bits.activation == 8:
        return _refused_int8(processor)
    return f"{_label(bits)}: no runtime executes 4-bit activations on a processor; export them in INT8 containers"


def _refused_int8(processor: Processor) -> str | None:
    if processor.features:
        return None
    if processor.architecture == "x86_64":
        if processor.avx2:  # products in 16 bits without saturation: exact, but slower
            return None
        return "W8A8: this processor has neither VNNI nor AVX2, which ONNX Runtime's exact 8-bit products need"
    return f"W8A8: {processor.model} has no 8-bit dot product (asimddp, i8mm) that this software knows"


def _refused_by_tensorrt(bits: Bits, capability: tuple[int, int]) -> str | None:
    name = "w4a16" if _is_weight_only(bits) and bits.weight == 4 else _name(bits)
    needed = _MINIMUM_CAPABILITY.get(name)
    if needed is None:
        return f"{_label(bits)}: stock TensorRT does not execute it"
    if capability < needed:
        return f"{_label(bits)}: needs compute capability {_dotted(needed)}, this GPU has {_dotted(capability)}"
    return None


def _name(bits: Bits) -> str:
    return next((name for name, known in PRECISIONS.items() if known == bits), "")


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _relative_time(bits: Bits, int8_time: float = _INT8_TIME) -> float:
    if bits.kind == "int" and bits.activation == 8:
        return int8_time
    if bits.kind == "int" and bits.weight == 4:
        return _INT4_WEIGHT_TIME
    return _FLOAT_TIME
