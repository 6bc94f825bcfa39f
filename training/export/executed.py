"""Which precision each runtime executes.

Read from the graph that ONNX Runtime has optimized, and from what the engines for GPUs make of a file: those were
compiled here and not run, but the file leaves them no other precision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.runtime.engines import ONNXRUNTIME, TENSORRT, TENSORRT_RTX, TORCH_CUDA
from dcqfa_ros.runtime.fusion import fuse_for_onnxruntime_cpu
from dcqfa_ros.runtime.lowering import lower_for_onnxruntime_cpu, parse_model
from dcqfa_ros.runtime.lowering_tensorrt import lower_for_tensorrt, wants_half
from dcqfa_ros.runtime.ort_engine import open_session, session_options
from dcqfa_ros.runtime.torch_graph import read_graph

FLOAT32 = Bits(weight=32, activation=32, kind="float")
CONTAINER = Bits(weight=8, activation=8, kind="int")
_TORCH = {
    "int8": CONTAINER,
    "fp8": Bits(weight=8, activation=8, kind="float"),
    "float16": Bits(weight=16, activation=16, kind="float"),
}
_MADE_UNSIGNED = "_s8_2_u8"  # what ONNX Runtime appends to weights it makes unsigned on x86 without VNNI
INTEGER_PRODUCTS = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger"})


def executed(graphs: Mapping[str, bytes]) -> dict[str, dict[str, Bits]]:
    """What every runtime executes: its name -> name of a weight in the graphs -> bits; FP32 where one is not named.

    Args:
        graphs: role -> canonical ONNX bytes; those of the encoder and the denoiser hold the linear layers.

    Raises:
        LoweringError: a graph cannot be lowered.
        EngineError: a graph holds what the torch engine does not know.
    """
    found: dict[str, dict[str, Bits]] = {name: {} for name in (ONNXRUNTIME, TENSORRT, TENSORRT_RTX, TORCH_CUDA)}
    half = any(wants_half(parse_model(data, f"{role}.onnx")) for role, data in graphs.items())
    kinds: dict[str, str] = {}
    for role in ("encoder", "denoiser"):
        data, label = graphs[role], f"{role}.onnx"
        found[ONNXRUNTIME] |= dict.fromkeys(integer_weights(data, label), CONTAINER)
        lowered = lower_for_tensorrt(parse_model(data, label), label, half=half).executed
        found[TENSORRT] |= lowered
        found[TENSORRT_RTX] |= lowered
        kinds |= read_graph(data, label).linears
    # The engine for CUDA computes what is not quantized in float16, if anything is.
    floats = _TORCH["float16"] if any(kind in _TORCH for kind in kinds.values()) else FLOAT32
    found[TORCH_CUDA] |= {name: _TORCH.get(kind, floats) for name, kind in kinds.items()}
    return found


def bits_in(found: Mapping[str, Bits], names: Iterable[str]) -> Bits:
    """Bits of the layer whose weight has one of ``names``."""
    return next((found[name] for name in names if name in found), FLOAT32)


def integer_weights(data: bytes, label: str) -> set[str]:
    """Names of the weights of a canonical graph that ONNX Runtime's CPU provider multiplies on integer kernels.

    Raises:
        LoweringError: the graph cannot be lowered.
    """
    model = parse_model(data, label)
    if lower_for_onnxruntime_cpu(model, label):
        fuse_for_onnxruntime_cpu(model)
    options = session_options()  # as the engine runs it
    with tempfile.TemporaryDirectory(prefix="dcqfa-export-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        open_session(model, options)
        optimized = onnx.load(options.optimized_model_filepath)
    products = (node for node in optimized.graph.node if node.op_type in INTEGER_PRODUCTS)
    return {name.removesuffix(_MADE_UNSIGNED) for node in products for name in node.input}
