"""Weights stored as float16: every engine reads the graph of the same rounded weights stored as float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dcqfa_ros.runtime.engine import ROLES, Engine
from dcqfa_ros.runtime.errors import EngineError, LoweringError
from dcqfa_ros.runtime.lowering import parse_model, serialize
from dcqfa_ros.runtime.lowering_tensorrt import lower_for_tensorrt, wants_half
from dcqfa_ros.runtime.openvino_engine import OpenVinoEngine, openvino_version
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.stored_half import stored_half_names, widen_stored_half
from dcqfa_ros.runtime.torch_engine import TorchCudaEngine
from test.runtime.torch_variants import HISTORY, OBSERVED, denoiser_inputs, on_one_thread, random, variant
from training.export.half import LEAST_ELEMENTS, store_in_half

INFERS_ON_OPENVINO = True  # see test/conftest.py
FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from on_one_thread()


@cache
def stored(half: bool) -> dict[str, bytes]:
    """The full-precision variant with its large constants rounded to float16, stored as float16 or as float32."""
    if half:
        return {role: store_in_half(data, role) for role, data in variant("fp32").items()}
    files = {}
    for role, data in variant("fp32").items():
        model = onnx.load_model_from_string(data)
        for tensor in model.graph.initializer:
            if tensor.data_type == FLOAT and np.prod(tensor.dims) >= LEAST_ELEMENTS:
                rounded = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
        files[role] = model.SerializeToString()
    return files


def graph_of(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], result: str = "y", kind: int = FLOAT
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", FLOAT, [2, 4])],
        [helper.make_tensor_value_info(result, kind, [2, 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def widened(name: str, made: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [made], to=FLOAT)


@pytest.mark.parametrize("role", ROLES)
def test_a_parsed_graph_is_that_of_the_same_weights_in_float32_byte_for_byte(role: str) -> None:
    half, full = (parse_model(stored(kind)[role], role) for kind in (True, False))
    assert serialize(half) == serialize(full)
    assert len(stored(True)[role]) < len(stored(False)[role])
    names = stored_half_names(onnx.load_model_from_string(stored(True)[role]))
    assert names == {t.name for t in full.graph.initializer if np.prod(t.dims) >= LEAST_ELEMENTS}
    assert not stored_half_names(onnx.load_model_from_string(stored(False)[role]))


@pytest.mark.parametrize(
    "make",
    [
        OnnxRuntimeEngine,
        pytest.param(lambda files: TorchCudaEngine(files, "fp32", device="cpu"), id="torch"),
        pytest.param(OpenVinoEngine, id="openvino"),
    ],
)
def test_an_engine_computes_the_same_bits_from_either(make: Callable[[dict[str, bytes]], Engine]) -> None:
    if make is OpenVinoEngine:
        try:
            openvino_version()
        except EngineError:
            pytest.skip("not exercised: OpenVINO is not installed (requirements/openvino.txt)")
    half, full = (make(stored(kind)) for kind in (True, False))
    times, observation = np.array([0, 7, 19]), random(0, 2, HISTORY, OBSERVED)
    np.testing.assert_array_equal(half.timestep_kv(times).copy(), full.timestep_kv(times))
    np.testing.assert_array_equal(half.observation_kv(observation).copy(), full.observation_kv(observation))
    inputs = denoiser_inputs(full, 2, 9)
    np.testing.assert_array_equal(half.denoise(*inputs).copy(), full.denoise(*inputs))


@pytest.mark.parametrize("role", ROLES)
def test_tensorrt_builds_the_same_graph_in_float32_from_either(role: str) -> None:
    lowered = []
    for kind in (True, False):
        model = parse_model(stored(kind)[role], role)
        assert not wants_half(model)
        lower_for_tensorrt(model, role, half=False)
        lowered.append(model.SerializeToString(deterministic=True))
    assert lowered[0] == lowered[1]


def test_other_tools_read_the_file_as_it_is() -> None:
    observation = random(0, 2, HISTORY, OBSERVED)
    found = []
    for kind in (True, False):
        session = ort.InferenceSession(stored(kind)["encoder"], providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"observation": observation})[0])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("name", ["fp16", "fp8", "mixed", "w8a8", "w4a4"])
def test_variants_that_compute_below_float32_keep_their_float16_weights(name: str) -> None:
    for role, data in variant(name).items():
        assert serialize(parse_model(data, role)) == onnx.load_model_from_string(data).SerializeToString()


def test_a_cast_of_something_else_is_left_alone() -> None:
    rows = np.arange(8, dtype=np.float16).reshape(2, 4)
    gather = helper.make_node("Gather", ["rows", "index"], ["chosen"], axis=0)
    add = helper.make_node("Add", ["x", "real"], ["y"])
    constants = {"rows": rows, "index": np.array([1, 0])}
    for model in (
        graph_of([gather, widened("chosen", "real"), add], constants),
        graph_of([widened("index", "real"), add], {"index": np.arange(4)}),  # of whole numbers
        graph_of([widened("rows", "y")], {"rows": rows}),  # what the graph gives is made by a node
        graph_of([helper.make_node("Cast", ["rows"], ["y"], to=TensorProto.DOUBLE)], {"rows": rows}, kind=11),
    ):
        before = model.SerializeToString()
        assert widen_stored_half(model, "test") == 0
        assert model.SerializeToString() == before


def test_a_constant_with_several_readers_is_widened_for_those_that_widen_it() -> None:
    rows = np.arange(8, dtype=np.float16).reshape(2, 4)
    nodes = [
        widened("rows", "one"),
        widened("rows", "two"),
        helper.make_node("Add", ["x", "one"], ["sum"]),
        helper.make_node("Add", ["sum", "two"], ["y"]),
    ]
    model = graph_of(nodes, {"rows": rows})
    assert widen_stored_half(model, "test") == 2
    assert [(t.name, t.data_type) for t in model.graph.initializer] == [("one", FLOAT), ("two", FLOAT)]
    shape = helper.make_node("Shape", ["rows"], ["shape"])
    reshape = helper.make_node("Reshape", ["x", "shape"], ["x2"])
    model = graph_of([shape, reshape, nodes[0], helper.make_node("Add", ["x2", "one"], ["y"])], {"rows": rows})
    assert widen_stored_half(model, "test") == 1
    assert [(t.name, t.data_type) for t in model.graph.initializer] == [("rows", FLOAT16), ("one", FLOAT)]
    onnx.checker.check_model(model, full_check=True)


def test_a_damaged_float16_tensor_is_refused_by_name() -> None:
    model = graph_of(
        [widened("rows", "one"), helper.make_node("Add", ["x", "one"], ["y"])], {"rows": np.zeros((2, 4), np.float16)}
    )
    model.graph.initializer[0].raw_data = b"123"
    with pytest.raises(
        LoweringError, match=r"bad\.onnx: tensor 'rows' does not hold float16 numbers of shape \(2, 4\)"
    ):
        parse_model(model.SerializeToString(), "bad.onnx")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=16))
def test_widening_keeps_every_number(bits: list[int]) -> None:
    values = np.array(bits, np.uint16).view(np.float16)
    model = graph_of([widened("rows", "one"), helper.make_node("Identity", ["one"], ["y"])], {"rows": values})
    widen_stored_half(model, "test")
    (tensor,) = model.graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.float16), values)
