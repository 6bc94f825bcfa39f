"""Which precision ONNX Runtime really executes, read from the graph it has optimized."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime as ort

from dcqfa_ros.runtime.fusion import fuse_for_onnxruntime_cpu
from dcqfa_ros.runtime.lowering import is_quantized, lower_for_onnxruntime_cpu, parse_model, serialize

RUNTIME = "onnxruntime"
INTEGER_PRODUCTS = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger"})


def integer_weights(data: bytes, label: str) -> set[str]:
    """Names of the weights of a canonical graph that ONNX Runtime's CPU provider multiplies on integer kernels.

    Raises:
        LoweringError: the graph cannot be lowered.
    """
    model = parse_model(data, label)
    if lower_for_onnxruntime_cpu(model, label):
        fuse_for_onnxruntime_cpu(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # warnings about the saved graph being specific to this machine
    disabled = ["MatMulAddFusion"] if is_quantized(model) else []  # as the engine does
    with tempfile.TemporaryDirectory(prefix="dcqfa-export-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(
            serialize(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
        optimized = onnx.load(options.optimized_model_filepath)
    return {name for node in optimized.graph.node if node.op_type in INTEGER_PRODUCTS for name in node.input}
