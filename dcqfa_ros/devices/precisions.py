"""How each runtime executes a precision on given hardware: as it is, in other bits (which it says), or not at all.

Sources: NVIDIA's support matrices by compute capability (INT8 from 7.5, INT4 weights from 8.0, FP8 from 8.9, FP4 from
10.0; TensorRT from 10.5 on needs 7.5; TensorRT-RTX builds for 7.5, 8.0, 8.6, 8.9 and 12.0 only); onnxruntime pull
request 12088 for 8-bit products on x86 without VNNI: they saturate unless the session asks for exact ones, as the
engine does; those take AVX2 and more time; OpenVINO's page on saturation: without VNNI its 8-bit products can saturate,
and nothing makes them exact; its page on the CPU device: quantized types on x86 only.

No runtime multiplies 4-bit activations. A W4A4 variant holds its activation codes within +-7 in 8 bits, so every
runtime with 8-bit products executes it as W8A8: W4A4 accuracy at the speed and memory of W8A8 (INT8 containers). A
variant of 4-bit weights alone (W4A16) is a precision of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.devices.detect import Processor

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

TENSORRT_RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0))
"""What TensorRT-RTX's builder accepts: desktop GPUs, neither Orin (8.7) nor Hopper (9.0)."""

GPU_CAPABILITY = (7, 5)
"""The least compute capability on which a GPU runtime of this software runs."""

_FP32, _FP16, _W8A8 = PRECISIONS["fp32"], PRECISIONS["fp16"], PRECISIONS["w8a8"]
_MINIMUM_CAPABILITY: Mapping[str, tuple[int, int]] = {
    "fp32": GPU_CAPABILITY, "fp16": GPU_CAPABILITY, "w8a8": (7, 5), "w4a16": (8, 0), "fp8": (8, 9), "fp4": (10, 0),
}  # fmt: skip
_CONTAINERS = "4-bit codes in INT8 containers: W4A4 accuracy at the speed and memory of W8A8"
_WIDENED = "weights are widened to FP32: smaller files, no gain in speed"


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


def dotted(capability: tuple[int, int]) -> str:
    """Return a compute capability as people write it: ``8.7``."""
    return f"{capability[0]}.{capability[1]}"


def is_weight_only(bits: Bits) -> bool:
    """Whether only the weights are quantized."""
    return bits.kind == "int" and bits.activation >= 16


def on_onnxruntime(bits: Bits, processor: Processor) -> Execution:
    """Return how ONNX Runtime's CPU provider executes ``bits``."""
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
    if processor.features or (processor.architecture == "x86_64" and processor.avx2):
        return _in_containers(bits)  # with AVX2 alone: products in 16 bits without saturation, exact, but slower
    if processor.architecture == "x86_64":
        return _refused(
            bits, "this processor has neither VNNI nor AVX2, which ONNX Runtime's exact 8-bit products need"
        )
    return _refused(bits, f"{processor.model} has no 8-bit dot product (asimddp, i8mm) that this software knows")


def on_openvino(bits: Bits, processor: Processor) -> Execution:
    """Return how OpenVINO's CPU plugin executes ``bits``."""
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
    if processor.architecture != "x86_64":
        return _refused(bits, f"OpenVINO has 8-bit products for x86 only, this is {processor.architecture}")
    if not processor.features:
        return _refused(bits, "without VNNI or AMX OpenVINO's 8-bit products can saturate, which changes results")
    return _in_containers(bits)


def on_tensorrt(bits: Bits, capability: tuple[int, int], rtx: bool = False) -> Execution:
    """Return how TensorRT, or TensorRT-RTX, executes ``bits`` on a GPU."""
    title = "TensorRT-RTX" if rtx else "TensorRT"
    if rtx and capability not in TENSORRT_RTX_CAPABILITIES:
        return _refused(bits, f"{rtx_refusal(capability)}")
    return _on_gpu(bits, capability, f"stock {title} does not execute it")


def on_torch_cuda(bits: Bits, capability: tuple[int, int]) -> Execution:
    """Return how the torch engine executes ``bits`` on a GPU: INT8 and FP8 products, no 4-bit ones."""
    if bits == PRECISIONS["fp4"]:
        return _refused(bits, "the torch engine has no such products")
    if is_weight_only(bits) and capability >= GPU_CAPABILITY:
        return Execution(_FP32, f"integer {_WIDENED}")
    return _on_gpu(bits, capability, "the torch engine does not execute it")


def rtx_refusal(capability: tuple[int, int]) -> str | None:
    """Return why TensorRT-RTX does not run on a GPU at all, or None."""
    if capability in TENSORRT_RTX_CAPABILITIES:
        return None
    known = ", ".join(dotted(c) for c in TENSORRT_RTX_CAPABILITIES)
    return f"TensorRT-RTX builds for compute capability {known} only, this GPU has {dotted(capability)}"


def _on_gpu(bits: Bits, capability: tuple[int, int], otherwise: str) -> Execution:
    asked = bits
    if is_weight_only(bits) and bits.weight in (4, 8):
        name = "w4a16" if bits.weight == 4 else "w8a8"
    elif bits.kind == "int" and bits.activation <= 8 and bits.weight <= 8:
        name, bits = "w8a8", _W8A8
    else:
        name = next((known for known, other in PRECISIONS.items() if other == bits), "")
    needed = _MINIMUM_CAPABILITY.get(name)
    if needed is None:
        return _refused(asked, otherwise)
    if capability < needed:
        return _refused(asked, f"needs compute capability {dotted(needed)}, this GPU has {dotted(capability)}")
    return Execution(bits, "" if bits == asked else _CONTAINERS)


def _in_containers(bits: Bits) -> Execution:
    return Execution(_W8A8, "" if bits == _W8A8 else _CONTAINERS)


def _widened(bits: Bits, otherwise: str) -> Execution:
    if bits == _FP16:
        return Execution(_FP32, f"FP16 {_WIDENED}")
    return _refused(bits, otherwise.format(label(bits)))


def _refused(bits: Bits, why: str) -> Execution:
    return Execution(None, f"{label(bits)}: {why}")
