"""Which precision ONNX Runtime really executes, read from the graph it has optimized."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from dcqfa_ros.runtime.fusion import fuse_for_onnxruntime_cpu
from dcqfa_ros.runtime.lowering import lower_for_onnxruntime_cpu, parse_model
from dcqfa_ros.runtime.ort_engine import open_session, session_options

RUNTIME = "onnxruntime"
_MADE_UNSIGNED = "_s8_2_u8"  # what ONNX Runtime appends to weights it makes unsigned on x86 without VNNI
INTEGER_PRODUCTS = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger"})


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
