"""How each runtime executes a precision on given hardware: as it is, in other bits (which it says), or not at all.

The limits are those the engines themselves go by: :mod:`dcqfa_ros.runtime.processor` for exact 8-bit products on
processors, :mod:`dcqfa_ros.runtime.capability` for GPUs; their sources stand there.

No runtime multiplies 4-bit activations. A W4A4 variant holds its activation codes within +-7 in 8 bits, so every
runtime with 8-bit products executes it as W8A8: W4A4 accuracy at the speed and memory of W8A8 (INT8 containers). A
variant of 4-bit weights alone (W4A16) is a precision of its own.

Runtimes on a GPU type everything FP16 in a variant that multiplies any layer in fewer bits than FP32 (a reduced one):
its layers in FP32 are executed in FP16, and this is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.runtime.capability import (
    GPU_CAPABILITY,
    MINIMUM_CAPABILITY,
    TENSORRT_RTX_CAPABILITIES,
    dotted,
)
from dcqfa_ros.runtime.processor import X86, Processor, onnxruntime_refusal, openvino_refusal

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

_FP32, _FP16, _W8A8 = PRECISIONS["fp32"], PRECISIONS["fp16"], PRECISIONS["w8a8"]
_ELEMENTS: Mapping[str, str] = {
    "fp32": "fp32", "fp16": "fp16", "w8a8": "int8", "w4a16": "int4", "fp8": "fp8", "fp4": "fp4",
}  # fmt: skip
_CONTAINERS = "4-bit codes in INT8 containers: W4A4 accuracy at the speed and memory of W8A8"
_WIDENED = "weights are widened to FP32: smaller files, no gain in speed"
_REDUCED = "runtimes on a GPU type all of a variant FP16 that reduces any layer"


@dataclass(frozen=True, slots=True)
class Execution:
    """What a runtime makes of some bits.

    Attributes:
        bits: as multiplied; None where they are refused.
        note: why they are refused, or what differs from what was asked for; empty where nothing does.
    """

    bits: Bits | None
    note: str = ""


def label(bits: Bits) -> str:
    """Return how people write some bits: ``FP16``, ``W4A16``."""
    if bits.kind == "float":
        return f"FP{bits.weight}" if bits.weight == bits.activation else f"FP{bits.weight}/FP{bits.activation}"
    return f"W{bits.weight}A{bits.activation}"


def is_weight_only(bits: Bits) -> bool:
    """Whether only the weights are quantized."""
    return bits.kind == "int" and bits.activation >= 16


def on_onnxruntime(bits: Bits, reduced: bool = False, *, processor: Processor) -> Execution:  # noqa: ARG001 - one signature
    """Return how ONNX Runtime's CPU provider executes ``bits``; layers in FP32 stay so in ``reduced`` variants."""
    if bits.kind == "float":
        if bits == _FP32:
            return Execution(bits)
        if bits == PRECISIONS["fp8"]:
            return Execution(_FP32, "FP8 rounding is simulated and products are computed in FP32: no gain in speed")
        return _widened(bits, "ONNX Runtime has no {} kernels for processors")
    if is_weight_only(bits):  # by the engine's lowering; ONNX Runtime's own 4-bit products take weights in blocks
        return Execution(_FP32, f"integer {_WIDENED}")
    if bits.activation == 16 or bits.weight > 8:
        return _refused(bits, "ONNX Runtime has no such products")
    refusal = onnxruntime_refusal(processor)
    if refusal:
        return _refused(bits, refusal)
    if processor.features or processor.architecture == X86:
        return _in_containers(bits)  # with AVX2 alone: products in 16 bits without saturation, exact, but slower
    return _refused(bits, f"{processor.model} has no 8-bit dot product (asimddp, i8mm) that this software knows")


def on_openvino(bits: Bits, reduced: bool = False, *, processor: Processor) -> Execution:  # noqa: ARG001 - one signature
    """Return how OpenVINO's CPU plugin executes ``bits``; layers in FP32 stay so in ``reduced`` variants."""
    if bits.kind == "float":
        if bits == _FP32:
            return Execution(bits)
        if bits == PRECISIONS["fp8"]:
            return _refused(bits, "OpenVINO rounds 8-bit floats differently from ONNX")
        return _widened(bits, "OpenVINO executes no {} graph of this software")
    if is_weight_only(bits):
        return Execution(_FP32, f"integer {_WIDENED}")
    if bits.activation == 16 or bits.weight > 8:
        return _refused(bits, "OpenVINO has no such products")
    refusal = openvino_refusal(processor)
    return _refused(bits, refusal) if refusal else _in_containers(bits)


def on_tensorrt(bits: Bits, reduced: bool = False, *, capability: tuple[int, int], rtx: bool = False) -> Execution:
    """Return how TensorRT, or TensorRT-RTX, executes ``bits`` on a GPU, alone or in a ``reduced`` variant."""
    title = "TensorRT-RTX" if rtx else "TensorRT"
    if rtx and capability not in TENSORRT_RTX_CAPABILITIES:
        return _refused(bits, f"{rtx_refusal(capability)}")
    return _on_gpu(bits, reduced, capability, f"stock {title} does not execute it")


def on_torch_cuda(bits: Bits, reduced: bool = False, *, capability: tuple[int, int]) -> Execution:
    """Return how the torch engine executes ``bits`` on a GPU: INT8 and FP8 products, no 4-bit ones.

    Alone or in a ``reduced`` variant.
    """
    if bits == PRECISIONS["fp4"]:
        return _refused(bits, "the torch engine has no such products")
    if is_weight_only(bits) and capability >= GPU_CAPABILITY:
        if reduced:
            return Execution(_FP16, f"integer weights are widened to FP16: {_REDUCED}")
        return Execution(_FP32, f"integer {_WIDENED}")
    return _on_gpu(bits, reduced, capability, "the torch engine does not execute it")


def rtx_refusal(capability: tuple[int, int]) -> str | None:
    """Return why TensorRT-RTX does not run on a GPU at all, or None."""
    if capability in TENSORRT_RTX_CAPABILITIES:
        return None
    known = ", ".join(dotted(c) for c in TENSORRT_RTX_CAPABILITIES)
    return f"TensorRT-RTX builds for compute capability {known} only, this GPU has {dotted(capability)}"


def _on_gpu(bits: Bits, reduced: bool, capability: tuple[int, int], otherwise: str) -> Execution:
    asked = bits
    if is_weight_only(bits) and bits.weight in (4, 8):
        name = "w4a16" if bits.weight == 4 else "w8a8"
    elif bits.kind == "int" and bits.activation <= 8 and bits.weight <= 8:
        name, bits = "w8a8", _W8A8
    else:
        name = next((known for known, other in PRECISIONS.items() if other == bits), "")
    if name not in _ELEMENTS:
        return _refused(asked, otherwise)
    needed = MINIMUM_CAPABILITY[_ELEMENTS[name]]
    if capability < needed:
        return _refused(asked, f"needs compute capability {dotted(needed)}, this GPU has {dotted(capability)}")
    if reduced and bits == _FP32:
        return Execution(_FP16, _REDUCED)
    return Execution(bits, "" if bits == asked else _CONTAINERS)


def _in_containers(bits: Bits) -> Execution:
    return Execution(_W8A8, "" if bits == _W8A8 else _CONTAINERS)


def _widened(bits: Bits, otherwise: str) -> Execution:
    if bits == _FP16:
        return Execution(_FP32, f"FP16 {_WIDENED}")
    return _refused(bits, otherwise.format(label(bits)))


def _refused(bits: Bits, why: str) -> Execution:
    return Execution(None, f"{label(bits)}: {why}")
