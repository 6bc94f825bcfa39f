"""Modelled costs of runtimes: what the selector goes by as long as nothing is measured on a device.

A relative time is that of one layer against FP32 on ONNX Runtime's CPU provider, one thread, same device. None of these
numbers is a claim about a device: a choice that rests on one says ``modelled``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.devices.precisions import is_weight_only
from dcqfa_ros.runtime.engines import ONNXRUNTIME, OPENVINO, TENSORRT, TENSORRT_RTX, TORCH_CUDA
from dcqfa_ros.runtime.processor import Processor

MIB = 2**20

_CPU_SOURCE = (
    "medians on a Zen 5 processor, one thread: 8 layers of width 256 take 2.4 ms in FP32 and 0.81 ms in INT8 on ONNX "
    "Runtime"
)
_GPU_SOURCE = (
    "a roofline of Jetson Orin NX 16 GB (config/tables/orin_nx_16gb.json) against ONNX Runtime on a processor "
    "(config/tables/cpu_1_thread.json): a block of width 256, 16 tokens; FP8 taken as INT8"
)


@dataclass(frozen=True, slots=True)
class RuntimeModel:
    """Modelled costs of one runtime.

    Attributes:
        float32: relative time of FP32.
        float16: of FP16.
        eight_bits: of W8A8 and FP8.
        int4_weights: of 4-bit weights with wider activations.
        source: where the times come from.
        worker_bytes: resident memory of a worker without weights.
        weight_copies: copies of the weights in the system's memory at the peak of loading.
        gpu_bytes: memory of the GPU without weights, 0 on a processor.
        gpu_weight_copies: copies of the weights in the GPU's memory.
        memory_source: where the memory figures come from.
    """

    float32: float
    float16: float
    eight_bits: float
    int4_weights: float
    source: str
    worker_bytes: int
    weight_copies: int
    gpu_bytes: int
    gpu_weight_copies: int
    memory_source: str


MODELS: Mapping[str, RuntimeModel] = {
    # The copies: the file's bytes, the graph as parsed and as lowered, the session's own and its packed form.
    ONNXRUNTIME: RuntimeModel(
        1.0, 1.0, 0.33, 1.0, _CPU_SOURCE, 90 * MIB, 5, 0, 0, "measured: 169 MiB for 32 MiB of FP32 weights"
    ),
    OPENVINO: RuntimeModel(
        0.92,
        0.92,
        0.25,
        0.92,
        f"{_CPU_SOURCE}; FP32 and INT8 take 2.2 and 0.59 ms on OpenVINO",
        185 * MIB,
        4,
        0,
        0,
        "measured: peaks of 297 MiB for 36 MiB of FP32 weights and 218 MiB for 12 MiB of W8A8, one shape",
    ),
    TENSORRT: RuntimeModel(0.37, 0.27, 0.22, 0.2, _GPU_SOURCE, 700 * MIB, 4, 300 * MIB, 2, "an estimate"),
    TENSORRT_RTX: RuntimeModel(0.37, 0.27, 0.22, 0.2, _GPU_SOURCE, 700 * MIB, 4, 300 * MIB, 2, "an estimate"),
    TORCH_CUDA: RuntimeModel(
        0.56,
        0.41,
        0.33,
        0.56,
        f"an estimate: 1.5 times TensorRT's, whose are {_GPU_SOURCE}",
        1500 * MIB,
        3,
        500 * MIB,
        2,
        "an estimate",
    ),
}
"""Model by runtime."""

INT8_WITHOUT_DOT_PRODUCT = 0.6
"""Relative time of exact 8-bit products on ONNX Runtime where the processor has no dot product: an estimate."""


def relative_time(runtime: str, executed: Bits, processor: Processor) -> float:
    """Return the modelled time of a layer in the bits that are really multiplied, FP32 on ONNX Runtime = 1."""
    model = MODELS[runtime]
    if is_weight_only(executed):
        return model.int4_weights if executed.weight == 4 else model.float32
    if executed.weight == 8:
        slow = runtime == ONNXRUNTIME and not processor.features
        return INT8_WITHOUT_DOT_PRODUCT if slow else model.eight_bits
    return model.float16 if executed.weight == 16 else model.float32


def host_bytes(runtime: str, weight_bytes: int) -> int:
    """Return the estimated peak of a worker's memory in the system's memory, bytes."""
    model = MODELS[runtime]
    return model.worker_bytes + model.weight_copies * weight_bytes


def gpu_bytes(runtime: str, weight_bytes: int) -> int:
    """Return the estimated memory of a worker in the GPU's memory, bytes; 0 for a processor."""
    model = MODELS[runtime]
    return model.gpu_bytes + model.gpu_weight_copies * weight_bytes
