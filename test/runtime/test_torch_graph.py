"""Graphs of the torch engine: patterns are recognised, anything else is refused by operator and node."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.torch_engine import TorchCudaEngine
from dcqfa_ros.runtime.torch_graph import OPERATORS, read_graph
from dcqfa_ros.runtime.torch_nodes import FLOAT, HALF, INTEGER
from dcqfa_ros.runtime.torch_operators import OPERATORS_IN_TORCH
from dcqfa_ros.runtime.torch_program import Network
from test.runtime.conftest import quantized_matmul, serialize, tiny_files
from test.runtime.torch_variants import CONFIG, VARIANTS, on_one_thread, random, values, variant

F32 = TensorProto.FLOAT


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from on_one_thread()


def parsed(name: str, role: str = "denoiser") -> ModelProto:
    return onnx.load_from_string(variant(name)[role])


def node_of(model: ModelProto, operator: str) -> NodeProto:
    return next(node for node in model.graph.node if node.op_type == operator)


def test_every_operator_that_is_read_can_be_run() -> None:
    inside_patterns = {"QuantizeLinear", "Shape"}
    assert set(OPERATORS_IN_TORCH) == (OPERATORS - inside_patterns) | {"Attention"}


@pytest.mark.parametrize("name", VARIANTS)
def test_attention_and_linear_layers_are_whole(name: str) -> None:
    graph = read_graph(variant(name)["denoiser"], "denoiser.onnx")
    operators = [node.operator for node in graph.nodes]
    assert operators.count("Attention") == 2 * CONFIG.depth
    assert operators.count("Linear") == 6 * CONFIG.depth + 2
    assert not {"MatMul", "Softmax", "Cast", "Clip", "Mul", "QuantizeLinear", "DequantizeLinear"} & set(operators)
    layers = [node.layer for node in graph.nodes if node.layer is not None]
    assert sum(layer.bias is not None for layer in layers) == 6 * CONFIG.depth + 1  # one is added with the positions
    scales = {node.attributes["scale"] for node in graph.nodes if node.operator == "Attention"}
    # Weights in float16 stay as they were trained: the scale of the scores cannot be folded into them.
    expected = (CONFIG.heads / CONFIG.dim) ** 0.5 if name == "fp16" else 1.0
    assert list(scales) == [pytest.approx(expected)]


def test_codes_have_the_limits_of_their_clips() -> None:
    layers = [n.layer for n in read_graph(variant("w4a4")["denoiser"], "d").nodes if n.layer is not None]
    limits = {layer.codes for layer in layers if layer.kind == INTEGER}
    assert limits == {(-8, 7), (-1, 14)}  # after a GELU nothing lies far below zero
    assert all(np.abs(layer.weight).max() <= 8 for layer in layers if layer.kind == INTEGER)


def one_layer(codes: tuple[int, int] | None = None, change: Callable[..., None] | None = None) -> bytes:
    """``x`` (B, 6) -> ``y`` (B, 4): a quantized product, clipped before if asked."""
    nodes, constants = quantized_matmul("y", "x", random(0, 6, 4), 0.1)
    if codes is not None:
        constants |= {"low": np.float32(codes[0] * 0.1), "high": np.float32(codes[1] * 0.1)}
        nodes[0].input[0] = "clipped"
        nodes.insert(0, helper.make_node("Clip", ["x", "low", "high"], ["clipped"]))
    if change is not None:
        change(nodes, constants)
    return serialize(nodes, {"x": (F32, ["B", 6])}, {"y": (F32, ["B", 4])}, constants)


@pytest.mark.parametrize("codes", [None, (-7, 7), (-1, 14), (0, 15), (-8, 7)])
def test_a_clip_becomes_limits_of_codes_without_a_difference(codes: tuple[int, int] | None) -> None:
    data = one_layer(codes)
    x = np.linspace(-20, 20, 300, dtype=np.float32).reshape(50, 6)
    with torch.inference_mode():
        network = Network(read_graph(data, "graph"), torch.float32, torch.device("cpu"))
        program = network.program({"x": x.shape})
        found = program.run({"x": torch.from_numpy(x)}).numpy()
    assert next(n.layer for n in network.graph.nodes if n.layer).codes == (codes or (-128, 127))
    assert [node.operator for node in network.graph.nodes] == ["Linear"]
    np.testing.assert_allclose(found, values(data, ["y"], {"x": x})["y"], atol=1e-5)


def test_an_operator_that_the_exporter_does_not_write_is_refused_by_name() -> None:
    files = tiny_files()
    with pytest.raises(EngineError, match=r"denoiser\.onnx: .* no operator CumSum \(node 'past'\); .* onnxruntime"):
        read_graph(files["denoiser"], "denoiser.onnx")
    with pytest.raises(EngineError, match=r"timestep\.onnx: .* no operator Unsqueeze"):
        TorchCudaEngine(files, device="cpu")


def test_operators_of_other_domains_are_refused() -> None:
    model = parsed("fp32")
    node_of(model, "Gelu").domain = "com.microsoft"
    with pytest.raises(EngineError, match=r"no operator com\.microsoft\.Gelu \(node 'blocks\.0\.gelu'\)"):
        read_graph(model.SerializeToString(), "denoiser.onnx")


def set_zero_point(nodes: list[NodeProto], constants: dict[str, np.ndarray]) -> None:
    constants["y_z"] = np.int8(3)


def set_other_scale(nodes: list[NodeProto], constants: dict[str, np.ndarray]) -> None:
    constants["other"] = np.float32(0.3)
    nodes[1].input[1] = "other"


def set_negative_scale(nodes: list[NodeProto], constants: dict[str, np.ndarray]) -> None:
    constants["y_ws"] = -constants["y_ws"]


def set_axis_0(nodes: list[NodeProto], constants: dict[str, np.ndarray]) -> None:
    constants |= {"y_ws": np.ones(6, np.float32), "y_wz": np.zeros(6, np.int8)}
    nodes[2].attribute[0].i = 0


def set_float_weight(nodes: list[NodeProto], constants: dict[str, np.ndarray]) -> None:
    constants["plain"] = random(1, 6, 4)
    nodes[3].input[1] = "plain"


def set_fp8_weight(nodes: list[NodeProto], constants: dict[str, np.ndarray]) -> None:
    constants["y_w"] = random(1, 6, 4).astype(ml_dtypes.float8_e4m3fn)
    constants["y_wz"] = np.zeros(4, ml_dtypes.float8_e4m3fn)


def set_unsigned(nodes: list[NodeProto], constants: dict[str, np.ndarray]) -> None:
    constants["y_z"] = np.uint8(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_zero_point, "QuantizeLinear 'y_q': the zero point is not 0"),
        (set_other_scale, "QuantizeLinear 'y_q': expected one scale, the same in DequantizeLinear 'y_x'"),
        (set_negative_scale, "DequantizeLinear 'y_wx': expected finite scales above 0"),
        (set_axis_0, r"DequantizeLinear 'y_wx': expected one scale per output \(axis 1\)"),
        (set_float_weight, "MatMul 'y' has a quantized input and float weights"),
        (set_fp8_weight, "QuantizeLinear 'y_q' writes INT8 for MatMul 'y', whose weights need FLOAT8E4M3FN"),
        (set_unsigned, "QuantizeLinear 'y_q' writes UINT8 for MatMul 'y', whose weights need INT8"),
    ],
)
def test_quantizers_that_are_not_canonical_are_refused(change: Callable[..., None], message: str) -> None:
    with pytest.raises(EngineError, match=rf"graph: {message}"):
        read_graph(one_layer(change=change), "graph")


def test_a_quantizer_outside_a_linear_layer_is_refused() -> None:
    constants = {"s": np.float32(0.1), "z": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Gelu", ["d"], ["y"]),
    ]
    data = serialize(nodes, {"x": (F32, ["B", 6])}, {"y": (F32, ["B", 6])}, constants)
    with pytest.raises(EngineError, match="graph: QuantizeLinear 'q' does not belong to a linear layer"):
        read_graph(data, "graph")


def test_half_weights_multiply_in_half_only_where_the_input_is_rounded_to_half() -> None:
    constants = {"w": random(0, 6, 4).astype(np.float16)}
    weight = helper.make_node("Cast", ["w"], ["wf"], to=F32)
    product = [weight, helper.make_node("MatMul", ["x", "wf"], ["y"])]
    ends = {"x": (F32, ["B", 6])}, {"y": (F32, ["B", 4])}
    # Only stored so: widened when the graph is parsed.
    assert read_graph(serialize(product, *ends, constants), "g").linears == {"wf": FLOAT}
    rounded = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["h"], ["r"], to=F32),
        weight,
        helper.make_node("MatMul", ["r", "wf"], ["y"]),
    ]
    graph = read_graph(serialize(rounded, *ends, constants), "g")
    assert graph.linears == {"w": HALF}
    assert graph.nodes[-1].inputs == ("x",)


@pytest.mark.parametrize("codes", [np.int8, ml_dtypes.int4, ml_dtypes.float8_e4m3fn])
def test_weights_that_are_only_stored_in_codes_multiply_in_floating_point(codes: type) -> None:
    constants = {"w": np.clip(random(0, 6, 4) * 3, -7, 7).astype(codes), "s": np.float32([0.1, 0.2, 0.3, 0.4])}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wf"], axis=1),
        helper.make_node("MatMul", ["x", "wf"], ["y"]),
    ]
    graph = read_graph(serialize(nodes, {"x": (F32, ["B", 6])}, {"y": (F32, ["B", 4])}, constants), "g")
    assert graph.linears == {"w": FLOAT}
    layer = graph.nodes[0].layer
    assert layer is not None
    np.testing.assert_array_equal(layer.weight, constants["w"].astype(np.float32) * constants["s"])


def test_files_with_external_weights_are_refused() -> None:
    model = parsed("fp32")
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(EngineError, match="stored outside the file"):
        read_graph(model.SerializeToString(), "denoiser.onnx")


def test_softmax_that_is_no_attention_is_run_as_it_is() -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["p"], axis=0), helper.make_node("MatMul", ["p", "p2"], ["y"])]
    nodes.insert(0, helper.make_node("Transpose", ["x"], ["p2"], perm=[1, 0]))
    data = serialize(nodes, {"x": (F32, [3, 6])}, {"y": (F32, [3, 3])}, {})
    x = random(4, 3, 6)
    with torch.inference_mode():
        program = Network(read_graph(data, "g"), torch.float32, torch.device("cpu")).program({"x": (3, 6)})
        found = program.run({"x": torch.from_numpy(x)}).numpy()
    np.testing.assert_allclose(found, values(data, ["y"], {"x": x})["y"], atol=1e-6)


def test_a_node_that_cannot_take_the_shapes_is_named() -> None:
    model = parsed("fp32")
    split = next(n for n in model.graph.node if n.op_type == "Split" and len(n.input) > 1)
    sizes = next(t for t in model.graph.initializer if t.name == split.input[1])
    sizes.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(sizes) + 1, sizes.name))
    network = Network(read_graph(model.SerializeToString(), "denoiser.onnx"), torch.float32, torch.device("cpu"))
    shapes = {"noisy": (1, 9, 2)} | {
        v.name: tuple(d.dim_value or 1 for d in v.type.tensor_type.shape.dim) for v in model.graph.input[1:]
    }
    with pytest.raises(EngineError, match=r"denoiser\.onnx: Split 'kv_split': cannot split 10 into 4 parts"):
        network.program(shapes)
