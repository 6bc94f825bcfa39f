"""Published peaks of devices that are not at hand, and what is assumed of them.

Peaks are those of dense products: data sheets often print twice as many for 2:4 sparse weights. The shares of them that
are reached, the time of a launch and the workspace are assumptions, equal for devices of one kind.

Sources: NVIDIA Jetson Orin NX, Orin Nano and AGX Orin Series data sheets and the Jetson AGX Orin Series technical brief
(cores, clocks, bandwidths; 1024 dense INT8 operations a clock and tensor core give the TOPS they print: GPU alone, half
of the sparse figure); NVIDIA Ada GPU architecture white paper, appendix on GeForce RTX 4090 (dense, FP16 and FP8 with
FP32 accumulation); NVIDIA H200 Tensor Core GPU data sheet (SXM, printed with sparsity, halved here).
"""

from __future__ import annotations

from dataclasses import dataclass

from training.lut import StoredBits
from training.subnet import Precision


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """One executed form on a device: products per second at peak, and bits of weights and activations in memory."""

    executed: str
    operations: float  # per second, a multiplication and an addition count as two
    stored_bits: StoredBits
    activation_bits: int


@dataclass(frozen=True, slots=True)
class ModelledDevice:
    """Published peaks of a device and what is assumed of them.

    Attributes:
        name: of the table.
        title: for people.
        source: where the peaks are published.
        memory_bytes: of the device.
        bandwidth: bytes per second at peak.
        compute_share: share of peak products that matrix kernels reach.
        bandwidth_share: share of peak bandwidth.
        launch_seconds: from one kernel to the next within a captured graph.
        workspace_bytes: of the engine.
        runtime: what would execute the networks.
        forms: precision and bits -> executed form; None for the bits of whole-network precisions.
        floating: executed form of everything that is never quantized.
        notes: further assumptions.
    """

    name: str
    title: str
    source: str
    memory_bytes: int
    bandwidth: float
    compute_share: float
    bandwidth_share: float
    launch_seconds: float
    workspace_bytes: int
    runtime: str
    forms: dict[tuple[Precision, int | None], Arithmetic]
    floating: Arithmetic
    notes: tuple[str, ...]


_FOUR_BITS = (
    "activations of 4 bits execute as 8 bits; weights of 4 bits are read packed and multiplied as float16 "
    "(weight-only kernels), so they save bandwidth and no arithmetic"
)
_CLOCKS = "every step is a captured graph; clocks are at their maximum"
_NO_FP8 = "compute capability 8.7 has no FP8: fp8 executes as float16"


def _orin(
    name: str, title: str, source: str, memory_gib: int, gigabytes_per_second: float, tensor_cores: int, clock: float
) -> ModelledDevice:
    """A Jetson Orin module; it has 32 CUDA cores for each tensor core, each with one multiply-add a clock."""
    fp32 = Arithmetic("float32", 2 * 32 * tensor_cores * clock, 32, 32)
    fp16 = Arithmetic("float16", 512 * tensor_cores * clock, 16, 16)
    int8 = Arithmetic("int8", 1024 * tensor_cores * clock, 8, 8)
    int4 = Arithmetic("int4_weights_float16", fp16.operations, 4, 16)
    return ModelledDevice(
        name=name,
        title=title,
        source=source,
        memory_bytes=memory_gib * 2**30,
        bandwidth=gigabytes_per_second * 1e9,
        compute_share=0.6,
        bandwidth_share=0.75,
        launch_seconds=3e-6,
        workspace_bytes=4 * 2**20,
        runtime="tensorrt",
        forms={
            (Precision.FP32, None): fp32,
            (Precision.FP16, None): fp16,
            (Precision.FP8, None): fp16,
            (Precision.INT, 8): int8,
            (Precision.INT, 4): int4,
        },
        floating=fp16,
        notes=(_NO_FP8, _FOUR_BITS, _CLOCKS),
    )


def _desktop(
    name: str,
    title: str,
    source: str,
    memory_bytes: float,
    bandwidth: float,
    peaks: tuple[float, float, float, float],
) -> ModelledDevice:
    """A GPU of its own memory; ``peaks`` are dense operations per second in FP32, FP16, FP8 and INT8."""
    fp32 = Arithmetic("float32", peaks[0], 32, 32)
    fp16 = Arithmetic("float16", peaks[1], 16, 16)
    return ModelledDevice(
        name=name,
        title=title,
        source=source,
        memory_bytes=int(memory_bytes),
        bandwidth=bandwidth,
        compute_share=0.6,
        bandwidth_share=0.75,
        launch_seconds=2e-6,
        workspace_bytes=16 * 2**20,
        runtime="tensorrt",
        forms={
            (Precision.FP32, None): fp32,
            (Precision.FP16, None): fp16,
            (Precision.FP8, None): Arithmetic("float8", peaks[2], 8, 8),
            (Precision.INT, 8): Arithmetic("int8", peaks[3], 8, 8),
            (Precision.INT, 4): Arithmetic("int4_weights_float16", fp16.operations, 4, 16),
        },
        floating=fp16,
        notes=(_FOUR_BITS, _CLOCKS),
    )


ORIN_NX_16GB = _orin(
    "orin_nx_16gb",
    "Jetson Orin NX 16 GB",
    "NVIDIA Jetson Orin NX Series data sheet: 1024 CUDA and 32 tensor cores at 918 MHz, 100 sparse INT8 TOPS of "
    "which the GPU has 60 (30 dense; 15 TFLOPS FP16), 128-bit LPDDR5 102.4 GB/s",
    16,
    102.4,
    32,
    918e6,
)
ORIN_NX_8GB = _orin(
    "orin_nx_8gb",
    "Jetson Orin NX 8 GB",
    "NVIDIA Jetson Orin NX Series data sheet: 1024 CUDA and 32 tensor cores at 765 MHz, 70 sparse INT8 TOPS of which "
    "the GPU has 50 (25 dense), 128-bit LPDDR5 102.4 GB/s",
    8,
    102.4,
    32,
    765e6,
)
ORIN_NANO_8GB = _orin(
    "orin_nano_8gb",
    "Jetson Orin Nano 8 GB",
    "NVIDIA Jetson Orin Nano Series data sheet: 1024 CUDA and 32 tensor cores at 625 MHz (not Super mode), 40 sparse "
    "INT8 TOPS (20 dense), 128-bit LPDDR5 68 GB/s",
    8,
    68.0,
    32,
    625e6,
)
AGX_ORIN_64GB = _orin(
    "agx_orin_64gb",
    "Jetson AGX Orin 64 GB",
    "NVIDIA Jetson AGX Orin Series data sheet: 2048 CUDA and 64 tensor cores at 1.3 GHz, 275 sparse INT8 TOPS of which "
    "the GPU has 170 (85 dense), 256-bit LPDDR5 204.8 GB/s",
    64,
    204.8,
    64,
    1.3e9,
)
RTX_4090 = _desktop(
    "rtx_4090",
    "GeForce RTX 4090",
    "NVIDIA Ada GPU architecture white paper: 82.6 TFLOPS FP32, dense tensor peaks of 165.2 TFLOPS FP16 and 330.3 FP8 "
    "with FP32 accumulation, 660.6 TOPS INT8; 24 GB GDDR6X 1008 GB/s",
    24 * 2**30,
    1008e9,
    (82.6e12, 165.2e12, 330.3e12, 660.6e12),
)
H200 = _desktop(
    "h200",
    "H200 SXM",
    "NVIDIA H200 Tensor Core GPU data sheet: 67 TFLOPS FP32, dense tensor peaks of 989.5 TFLOPS FP16, 1979 FP8 and "
    "1979 TOPS INT8 (half of the sparse ones it prints); 141 GB HBM3e 4.8 TB/s",
    141e9,
    4.8e12,
    (67e12, 989.5e12, 1979e12, 1979e12),
)
DEVICES = (ORIN_NX_16GB, ORIN_NX_8GB, ORIN_NANO_8GB, AGX_ORIN_64GB, RTX_4090, H200)
