"""Stored weights become what is multiplied, without loss."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dcqfa_ros.runtime.errors import LoweringError
from dcqfa_ros.runtime.lowering_weights import place_weights


def model(
    weight: np.ndarray, scale: np.ndarray, *, quantized: bool, zero: int | None = None, **attributes: int
) -> onnx.ModelProto:
    """``x`` (1, K) times a stored weight (K, N), through an integer quantizer or not."""
    constants = {"w": weight, "w_s": scale, "s": np.float32(0.05), "z": np.int8(0)}
    inputs = ["w", "w_s"]
    if zero is not None:
        constants["w_z"] = np.full(scale.shape, zero, weight.dtype)
        inputs.append("w_z")
    nodes = [helper.make_node("DequantizeLinear", inputs, ["w_real"], "w_real", **({"axis": 1} | attributes))]
    if quantized:
        nodes.append(helper.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"]))
        nodes.append(helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["real"]))
    nodes.append(helper.make_node("MatMul", ["real" if quantized else "x", "w_real"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, weight.shape[1]])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def stored(model: onnx.ModelProto) -> int:
    return next(t.data_type for t in model.graph.initializer if t.name == "w")


def evaluate(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from([ml_dtypes.int4, np.int8, ml_dtypes.float8_e4m3fn]),
    quantized=st.booleans(),
    rows=st.integers(1, 9),
    columns=st.integers(1, 7),
    seed=st.integers(0, 999),
)
def test_no_value_changes(dtype: type, quantized: bool, rows: int, columns: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.integers(-7, 8, (rows, columns)).astype(np.int8).astype(dtype)
    graph = model(weight, generator.uniform(0.01, 1, columns).astype(np.float32), quantized=quantized)
    x = generator.standard_normal((1, rows)).astype(np.float32)
    before = evaluate(graph, x)
    place_weights(graph, "g.onnx")
    onnx.checker.check_model(graph, full_check=True)
    np.testing.assert_allclose(evaluate(graph, x), before, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "quantized", "expected", "count"),
    [
        (ml_dtypes.int4, True, TensorProto.INT8, 1),
        (np.int8, True, TensorProto.INT8, 0),
        (ml_dtypes.int4, False, TensorProto.FLOAT, 1),
        (np.int8, False, TensorProto.FLOAT, 1),
        (ml_dtypes.float8_e4m3fn, True, TensorProto.FLOAT, 1),
    ],
)
def test_only_what_integers_multiply_stays_in_integers(dtype: type, quantized: bool, expected: int, count: int) -> None:
    graph = model(np.ones((4, 3), np.int8).astype(dtype), np.ones(3, np.float32), quantized=quantized)
    assert place_weights(graph, "g.onnx") == count
    assert stored(graph) == expected
    if expected == TensorProto.FLOAT:
        assert not any(node.name == "w_real" for node in graph.graph.node)
        assert "w_s" not in {t.name for t in graph.graph.initializer}


def test_what_is_not_canonical_is_refused_by_node() -> None:
    weight = np.ones((4, 3), np.int8)
    with pytest.raises(LoweringError, match="w_real has a zero point other than 0"):
        place_weights(model(weight, np.ones(3, np.float32), quantized=False, zero=1), "g.onnx")
    with pytest.raises(LoweringError, match="w_real has scales per block"):
        place_weights(model(weight, np.ones((2, 3), np.float32), quantized=False, axis=0, block_size=2), "g.onnx")


def two_readers(*, first: bool, second: bool) -> onnx.ModelProto:
    """Two dequantizers of other scales share one INT4 weight; each product is of integers or not."""
    weight = np.arange(-6, 6).reshape(4, 3).astype(np.int8).astype(ml_dtypes.int4)
    constants = {"w": weight, "s": np.float32(0.05), "z": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["real"]),
    ]
    for number, quantized in enumerate((first, second)):
        constants[f"s{number}"] = np.array([0.5, 0.25, 2.0], np.float32) * (number + 1)
        constants[f"w_z{number}"] = np.zeros(3, np.int8).astype(ml_dtypes.int4)
        inputs = ["w", f"s{number}", f"w_z{number}"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"w{number}"], f"w{number}", axis=1))
        nodes.append(helper.make_node("MatMul", ["real" if quantized else "x", f"w{number}"], [f"y{number}"]))
    nodes.append(helper.make_node("Add", ["y0", "y1"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_a_weight_that_two_dequantizers_share_is_scaled_once_in_each(first: bool, second: bool) -> None:
    graph = two_readers(first=first, second=second)
    x = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)
    before = evaluate(graph, x)
    assert place_weights(graph, "g.onnx") == 2
    onnx.checker.check_model(graph, full_check=True)
    np.testing.assert_allclose(evaluate(graph, x), before, rtol=1e-6)
    names = [tensor.name for tensor in graph.graph.initializer]
    assert len(names) == len(set(names))
    assert TensorProto.INT4 not in {tensor.data_type for tensor in graph.graph.initializer}
