"""The CPU lowering changes codes, never values."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dcqfa_ros.runtime.errors import LoweringError
from dcqfa_ros.runtime.lowering import is_quantized, lower_for_onnxruntime_cpu, parse_model, serialize
from test.runtime.conftest import denoiser_model, quantized_matmul
from test.runtime.conftest import serialize as build

FLOAT, INT8 = TensorProto.FLOAT, TensorProto.INT8
WIDTH = 8


def run_exactly(data: bytes, x: np.ndarray) -> np.ndarray:
    """Run node by node as written: without any optimization."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    result: np.ndarray = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    return result


def lowered(data: bytes) -> bytes:
    model = parse_model(data, "test.onnx")
    assert lower_for_onnxruntime_cpu(model, "test.onnx") > 0
    onnx.checker.check_model(model, full_check=True)
    return serialize(model)


@st.composite
def graphs(draw: st.DrawFn) -> bytes:
    """Chains and branches of quantized linears, elementwise operators and moved codes, with any scale."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes: list[Any] = []
    constants: dict[str, Any] = {}
    current = "x"
    for index in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["linear", "branches", "moved", "elementwise", "declared"]))
        scale = draw(st.floats(2.0**-10, 0.5, width=32))
        name = f"n{index}"
        if kind == "linear":
            weight = generator.standard_normal((WIDTH, WIDTH)).astype(np.float32)
            more, extra = quantized_matmul(name, current, weight, scale)
            nodes, constants = nodes + more, constants | extra
        elif kind == "elementwise":
            nodes.append(helper.make_node(draw(st.sampled_from(["Tanh", "Relu", "Abs"])), [current], [name]))
        else:
            constants |= {f"{name}_s": np.float32(scale), f"{name}_z": np.int8(0)}
            parameters = [f"{name}_s", f"{name}_z"]
            if kind == "declared":  # no zero point tensor: the type is an attribute
                attributes = {"output_dtype": INT8}
                nodes.append(helper.make_node("QuantizeLinear", [current, f"{name}_s"], [f"{name}_q"], **attributes))
                nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s"], [name]))
            elif kind == "moved":
                nodes.append(helper.make_node("QuantizeLinear", [current, *parameters], [f"{name}_q"]))
                nodes.append(helper.make_node("Transpose", [f"{name}_q"], [f"{name}_t"], perm=[1, 0]))
                nodes.append(helper.make_node("Transpose", [f"{name}_t"], [f"{name}_u"], perm=[1, 0]))
                nodes.append(helper.make_node("DequantizeLinear", [f"{name}_u", *parameters], [name]))
            else:  # one quantizer, two dequantizers, as for q, k and v
                nodes.append(helper.make_node("QuantizeLinear", [current, *parameters], [f"{name}_q"]))
                for side in "ab":
                    nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *parameters], [f"{name}_{side}"]))
                nodes.append(helper.make_node("Mul", [f"{name}_a", f"{name}_b"], [name]))
        current = name
    # at least one quantizer, and values of the size of its range
    constants |= {"last_s": np.float32(0.03), "last_z": np.int8(0)}
    nodes.append(helper.make_node("QuantizeLinear", [current, "last_s", "last_z"], ["last_q"]))
    nodes.append(helper.make_node("DequantizeLinear", ["last_q", "last_s", "last_z"], ["y"]))
    return build(nodes, {"x": (FLOAT, ["N", WIDTH])}, {"y": (FLOAT, ["N", WIDTH])}, constants)


@settings(deadline=None, max_examples=60)
@given(graphs(), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 30.0]))
def test_lowering_is_lossless_on_random_graphs(data: bytes, seed: int, size: float) -> None:
    x = (size * np.random.default_rng(seed).standard_normal((5, WIDTH))).astype(np.float32)
    assert np.array_equal(run_exactly(data, x), run_exactly(lowered(data), x))


@given(st.integers(-200, 200), st.sampled_from([0.25, 0.1, 1.0]))
@settings(deadline=None, max_examples=30)
def test_lowering_is_lossless_at_ties_and_at_saturation(code: int, scale: float) -> None:
    constants = {"s": np.float32(scale), "z": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    data = build(nodes, {"x": (FLOAT, ["N", WIDTH])}, {"y": (FLOAT, ["N", WIDTH])}, constants)
    x = np.full((1, WIDTH), (code + 0.5) * np.float32(scale), np.float32)
    assert np.array_equal(run_exactly(data, x), run_exactly(lowered(data), x))


def test_activations_become_uint8_and_weights_stay_int8() -> None:
    model = onnx.load_model_from_string(lowered(denoiser_model(quantized=True)))
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constants[node.input[2]].dtype == np.uint8
            assert constants[node.input[2]] == 128
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            assert constants[node.input[0]].dtype == np.int8
            assert constants[node.input[2]].dtype == np.int8


def test_floating_point_graph_is_left_alone() -> None:
    data = denoiser_model(quantized=False)
    model = parse_model(data, "test.onnx")
    assert not is_quantized(model)
    assert lower_for_onnxruntime_cpu(model, "test.onnx") == 0
    assert serialize(model) == serialize(parse_model(data, "test.onnx"))


def test_lowering_twice_changes_nothing_more() -> None:
    model = parse_model(lowered(denoiser_model(quantized=True)), "test.onnx")
    assert lower_for_onnxruntime_cpu(model, "test.onnx") == 0


def test_newer_ir_version_than_the_opset_needs_is_lowered_for_older_runtimes() -> None:
    model = onnx.load_model_from_string(denoiser_model(quantized=False))
    model.ir_version = 13
    assert parse_model(model.SerializeToString(), "test.onnx").ir_version == 10


def quantizer_into(consumer: Any, zero_point: int = 0, outputs: tuple[str, int] = ("y", FLOAT)) -> bytes:
    constants = {"s": np.float32(0.1), "z": np.int8(zero_point)}
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantizer"), consumer]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "bad",
            [helper.make_tensor_value_info("x", FLOAT, ["N", WIDTH])],
            [helper.make_tensor_value_info(outputs[0], outputs[1], ["N", WIDTH])],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    data: bytes = model.SerializeToString()
    return data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (quantizer_into(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]), 3), "zero point other than 0"),
        (
            quantizer_into(helper.make_node("Cast", ["q"], ["y"], to=FLOAT, name="cast")),
            "'quantizer' reach Cast 'cast'",
        ),
        (quantizer_into(helper.make_node("DequantizeLinear", ["q", "x"], ["y"])), "must be constants"),
        (quantizer_into(helper.make_node("Identity", ["q"], ["y"]), outputs=("y", INT8)), "graph output 'y'"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(data: bytes, text: str) -> None:
    model = parse_model(data, "denoiser.onnx")
    with pytest.raises(LoweringError, match=f"denoiser.onnx: .*{text}"):
        lower_for_onnxruntime_cpu(model, "denoiser.onnx")


@pytest.mark.parametrize("data", [b"", b"not onnx", b"\x08\x0a", bytes(100)])
def test_bytes_that_are_no_onnx_graph_are_refused(data: bytes) -> None:
    with pytest.raises(LoweringError, match=r"encoder\.onnx"):
        parse_model(data, "encoder.onnx")


def test_external_weights_are_refused() -> None:
    model = onnx.load_model_from_string(denoiser_model(quantized=False))
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(LoweringError, match="stored outside the file"):
        parse_model(model.SerializeToString(), "denoiser.onnx")
