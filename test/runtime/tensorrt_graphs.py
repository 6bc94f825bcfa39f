"""Canonical graphs for tests of the TensorRT part: any float32 graph with its linears quantized as asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT, FLOAT16, FP8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN
LIMITS = {4: 7, 8: 127}
SIZES = {"B": 1, "T": 9, "S": 4}


def linears(model: ModelProto) -> list[str]:
    """Names of the weights of all MatMul with a constant second input."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node.input[1] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants]


def feeds(model: ModelProto, seed: int = 0, sizes: Mapping[str, int] = SIZES) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        shape = [dim.dim_value or sizes[dim.dim_param] for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == TensorProto.INT64:
            arrays[value.name] = generator.integers(0, 50, shape)
        else:
            arrays[value.name] = generator.standard_normal(shape).astype(np.float32)
    return arrays


def run(model: ModelProto, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run node by node as written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = session.run(None, dict(arrays))
    return {value.name: result for value, result in zip(session.get_outputs(), results, strict=True)}


def quantized(model: ModelProto, precisions: Mapping[str, str], asymmetric: frozenset[str] = frozenset()) -> ModelProto:
    """Give linears their canonical quantizers.

    Args:
        model: a float32 graph.
        precisions: weight -> fp32, fp16, w8a8, w4a4, w4a8, w8a4, fp8, w4a16 or w8a16; others stay float32.
        asymmetric: weights whose 4-bit activations are clipped to -1 .. 14 steps.
    """
    result = ModelProto()
    result.CopyFrom(model)
    largest = _largest_inputs(model)
    constants = {tensor.name: tensor for tensor in result.graph.initializer}
    nodes: list[NodeProto] = []
    done: dict[tuple[str, str], str] = {}
    for node in list(result.graph.node):
        precision = precisions.get(node.input[1], "fp32") if node.op_type == "MatMul" else "fp32"
        if precision != "fp32":
            x, weight = node.input[0], node.input[1]
            kind = precision if precision in ("fp8", "fp16") else precision.partition("a")[2]
            if (x, kind) not in done:
                scale = largest[x]
                done[x, kind] = _activation(result, nodes, x, kind, scale, weight in asymmetric)
            node.input[0] = done[x, kind]
            node.input[1] = _weight(constants[weight], result, nodes, precision)
        nodes.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    del result.graph.value_info[:]
    onnx.checker.check_model(result, full_check=True)
    return result


def _largest_inputs(model: ModelProto) -> dict[str, float]:
    probe = ModelProto()
    probe.CopyFrom(model)
    names = {node.input[0] for node in model.graph.node if node.op_type == "MatMul"}
    arrays = feeds(model, seed=99)
    present = {value.name for value in model.graph.output}
    for name in sorted(names - set(arrays) - present):
        probe.graph.output.append(helper.make_tensor_value_info(name, FLOAT, None))
    values = run(probe, arrays) | arrays
    return {name: float(np.abs(values[name]).max()) for name in names}


def _add(model: ModelProto, name: str, array: Any) -> str:
    if name not in {tensor.name for tensor in model.graph.initializer}:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def _activation(model: ModelProto, nodes: list[NodeProto], x: str, kind: str, largest: float, skewed: bool) -> str:
    name = f"{x}.{kind}"
    if kind == "16":
        return x
    if kind == "fp16":
        nodes.append(helper.make_node("Cast", [x], [f"{name}.half"], f"{name}.half", to=FLOAT16))
        nodes.append(helper.make_node("Cast", [f"{name}.half"], [f"{name}.real"], f"{name}.real", to=FLOAT))
        return f"{name}.real"
    if kind == "fp8":
        scale = _add(model, f"{name}.scale", np.float32(largest / 448))
        zero = _add(model, f"{name}.zero", np.zeros((), ml_dtypes.float8_e4m3fn))
    else:
        low, high = (-1, 14) if skewed else (-LIMITS[int(kind)], LIMITS[int(kind)])
        step = np.float32(largest / high)
        scale, zero = _add(model, f"{name}.scale", step), _add(model, f"{name}.zero", np.int8(0))
        if kind == "4":
            limits = [_add(model, f"{name}.low", step * low), _add(model, f"{name}.high", step * high)]
            nodes.append(helper.make_node("Clip", [x, *limits], [f"{name}.clipped"], f"{name}.clipped"))
            x = f"{name}.clipped"
    nodes.append(helper.make_node("QuantizeLinear", [x, scale, zero], [f"{name}.codes"], f"{name}.codes"))
    nodes.append(helper.make_node("DequantizeLinear", [f"{name}.codes", scale, zero], [f"{name}.real"], f"{name}.real"))
    return f"{name}.real"


def _weight(tensor: TensorProto, model: ModelProto, nodes: list[NodeProto], precision: str) -> str:
    name, value = tensor.name, numpy_helper.to_array(tensor)
    if precision == "fp16":
        tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), name))
        nodes.append(helper.make_node("Cast", [name], [f"{name}.real"], f"{name}.real", to=FLOAT))
        return f"{name}.real"
    largest = np.maximum(np.abs(value).max(axis=0), 1e-6)
    if precision == "fp8":
        steps = (largest / 448).astype(np.float32)
        codes = (value / steps).astype(ml_dtypes.float8_e4m3fn)
    else:
        bits = int(precision[1])
        steps = (largest / LIMITS[bits]).astype(np.float32)
        codes = np.clip(np.rint(value / steps), -LIMITS[bits], LIMITS[bits])
        codes = codes.astype(ml_dtypes.int4 if bits == 4 else np.int8)
    tensor.CopyFrom(numpy_helper.from_array(codes, name))
    inputs = [name, _add(model, f"{name}.steps", steps)]
    nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.real"], f"{name}.real", axis=1))
    return f"{name}.real"
