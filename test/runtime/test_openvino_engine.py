"""The OpenVINO engine runs what the contract says, multiplies integers, and refuses the rest by name."""

from __future__ import annotations

import sys
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, reference

from dcqfa_ros.runtime import openvino_engine
from dcqfa_ros.runtime.engine import Engine
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.openvino_engine import OpenVinoEngine, integer_weights, lower_for_openvino, openvino_version
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.processor import Processor
from test.runtime.conftest import ACTED, HISTORY, OBSERVED, ROWS, WIDTH, denoiser_model, encoder_model, tiny_files

INFERS_ON_OPENVINO = True  # see test/conftest.py

pytest.importorskip("openvino", reason="not exercised: OpenVINO is not installed (requirements/openvino.txt)")


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def four_bits(model: onnx.ModelProto, activations: tuple[int, int] = (-7, 7)) -> onnx.ModelProto:
    """Make weights INT4 and clip activations before their quantizers, as canonical W4A4 graphs do."""
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.name.endswith("_w") and tensor.data_type == TensorProto.INT8:
            codes = np.clip(numpy_helper.to_array(tensor) // 18, -7, 7)
            tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.INT4, codes.shape, codes.flatten().tolist()))
    nodes = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0].endswith("_w"):
            del node.input[2]
        if node.op_type == "QuantizeLinear":
            name = node.input[0]
            step = next(numpy_helper.to_array(t) for t in graph.initializer if t.name == node.input[1])
            limits = [f"{node.output[0]}_{end}" for end in ("low", "high")]
            graph.initializer.extend(
                numpy_helper.from_array(np.float32(code * step), limit)
                for limit, code in zip(limits, activations, strict=True)
            )
            nodes.append(helper.make_node("Clip", [name, *limits], [f"{node.output[0]}_clipped"]))
            node.input[0] = f"{node.output[0]}_clipped"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


def denoised(engine: Engine, batch: int, tokens: int) -> np.ndarray:
    observation_kv = engine.observation_kv(random(1, batch, HISTORY, OBSERVED))
    time_kv = engine.timestep_kv(np.array([90, 45, 0]))
    return engine.denoise(random(2, batch, tokens, ACTED), time_kv[1:2], observation_kv).copy()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 9), (1, 1), (3, 16)])
def test_it_computes_what_onnxruntime_computes(quantized: bool, batch: int, tokens: int) -> None:
    files = tiny_files(quantized)
    engine = OpenVinoEngine(files, name="tiny")
    assert isinstance(engine, Engine)
    assert engine.name == "openvino/tiny"
    reference = OnnxRuntimeEngine(files)
    assert np.allclose(denoised(engine, batch, tokens), denoised(reference, batch, tokens), atol=1e-5)
    observation = random(3, batch, HISTORY, OBSERVED)
    assert np.allclose(engine.observation_kv(observation), reference.observation_kv(observation), atol=1e-5)


@pytest.mark.parametrize("activations", [(-7, 7), (-1, 14)])
def test_four_bit_codes_are_stored_as_int8_without_loss(activations: tuple[int, int]) -> None:
    model = four_bits(onnx.load_model_from_string(denoiser_model(True)), activations)
    files = tiny_files() | {"denoiser": model.SerializeToString()}
    assert np.allclose(
        denoised(OpenVinoEngine(files), 1, 9), denoised(OnnxRuntimeEngine(files), 1, 9), rtol=0, atol=1e-5
    )
    assert integer_weights(files["denoiser"], "denoiser.onnx") == {"up_w", "down_w"}
    before = {t.name: numpy_helper.to_array(t).astype(int).tolist() for t in model.graph.initializer if "_w" in t.name}
    assert lower_for_openvino(model, "denoiser.onnx") == 2
    after = {t.name: numpy_helper.to_array(t).astype(int).tolist() for t in model.graph.initializer if "_w" in t.name}
    assert before == after
    assert not any(t.data_type == TensorProto.INT4 for t in model.graph.initializer)


def test_which_weights_are_multiplied_as_integers_is_read_from_the_graph_it_runs() -> None:
    assert integer_weights(denoiser_model(True), "denoiser.onnx") == {"up_w", "down_w"}
    assert integer_weights(denoiser_model(False), "denoiser.onnx") == set()


def test_weights_that_are_only_stored_as_integers_are_not_counted() -> None:
    model = onnx.load_model_from_string(denoiser_model(True))
    kept = []
    for node in model.graph.node:
        if node.op_type == "MatMul":
            node.input[0] = {"up_x": "past", "down_x": "bent"}[node.input[0]]
        if node.op_type != "QuantizeLinear" and node.input[0] not in ("up_q", "down_q"):
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    data = model.SerializeToString()
    assert integer_weights(data, "denoiser.onnx") == set()
    inputs = {
        "noisy": random(1, 1, 9, ACTED),
        "timestep_kv": random(2, 1, ROWS, 1, WIDTH),
        "observation_kv": random(3, 1, ROWS, HISTORY, WIDTH),
    }
    expected = reference.ReferenceEvaluator(model).run(None, inputs)[0]
    engine = OpenVinoEngine(tiny_files() | {"denoiser": data})
    assert np.allclose(engine.denoise(**inputs), expected, atol=1e-5)  # nothing quantizes activations on the way


def test_eight_bit_floats_are_refused() -> None:
    model = onnx.load_model_from_string(denoiser_model(True))
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            del node.input[2]
            node.attribute.append(helper.make_attribute("output_dtype", TensorProto.FLOAT8E4M3FN))
        elif node.op_type == "DequantizeLinear" and node.input[0].endswith("_q"):
            del node.input[2]
    with pytest.raises(EngineError, match=r"denoiser\.onnx: it holds 8-bit floats.*run this variant with onnxruntime"):
        OpenVinoEngine(tiny_files() | {"denoiser": model.SerializeToString()})


def test_weights_of_sixteen_bits_agree_within_their_rounding() -> None:
    model = onnx.load_model_from_string(denoiser_model(False))
    graph = model.graph
    for tensor in list(graph.initializer):
        if tensor.name.endswith("_w"):
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, f"{tensor.name}_half"))
            name = tensor.name.removesuffix("_half")
            graph.node.insert(0, helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    product = next(node for node in graph.node if node.op_type == "MatMul")
    place, source = list(graph.node).index(product), product.input[0]
    product.input[0] = "rounded"
    graph.node.insert(place, helper.make_node("Cast", ["half"], ["rounded"], to=TensorProto.FLOAT))
    graph.node.insert(place, helper.make_node("Cast", [source], ["half"], to=TensorProto.FLOAT16))
    onnx.checker.check_model(model)
    files = tiny_files() | {"denoiser": model.SerializeToString()}
    assert np.allclose(denoised(OpenVinoEngine(files), 1, 9), denoised(OnnxRuntimeEngine(files), 1, 9), atol=5e-3)


def test_result_goes_to_out_and_inputs_stay() -> None:
    engine = OpenVinoEngine(tiny_files())
    noisy, kv = random(1, 2, 9, ACTED), engine.observation_kv(random(2, 2, HISTORY, OBSERVED))
    time_kv, before, out = engine.timestep_kv(np.array([3])), noisy.copy(), np.empty_like(noisy)
    assert engine.denoise(noisy, time_kv, kv, out) is out
    assert np.array_equal(noisy, before)
    assert np.array_equal(out, engine.denoise(noisy, time_kv, kv))


def test_the_denoiser_reads_where_the_encoder_wrote_and_other_keys_and_values_leave_that_alone() -> None:
    engine = OpenVinoEngine(tiny_files(False))
    time_kv = engine.timestep_kv(np.array([45]))
    noisy = random(2, 1, 4, ACTED)
    encoded = engine.observation_kv(random(1, 1, HISTORY, OBSERVED))
    mine = encoded.copy()
    first = engine.denoise(noisy, time_kv, encoded).copy()
    other = engine.denoise(noisy, time_kv, mine + 1.0).copy()
    np.testing.assert_array_equal(encoded, mine)
    assert np.abs(other - first).max() > 1e-4
    np.testing.assert_array_equal(engine.denoise(noisy, time_kv, encoded), first)
    np.testing.assert_array_equal(engine.denoise(noisy, time_kv, mine), first)


def test_more_shapes_than_are_kept_do_not_disturb_each_other() -> None:
    engine = OpenVinoEngine(tiny_files())
    first = [denoised(engine, batch, tokens) for batch in (1, 2, 3) for tokens in (1, 9)]
    again = [denoised(engine, batch, tokens) for batch in (1, 2, 3) for tokens in (1, 9)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_idle_engine_takes_no_processor_time() -> None:
    engine = OpenVinoEngine(tiny_files(True), threads=2)
    denoised(engine, 1, 9)
    begin = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - begin < 0.03


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"encoder": b""}, "timestep, denoiser"),
        (tiny_files() | {"denoiser": b"damaged"}, "denoiser.onnx: "),
        (tiny_files() | {"encoder": tiny_files()["denoiser"]}, "encoder.onnx: expected input observation, got noisy"),
        (tiny_files() | {"denoiser": denoiser_model(False, noise="eps")}, "expected output noise, got eps"),
        (tiny_files() | {"encoder": encoder_model()[:-7]}, "encoder.onnx: "),
    ],
)
def test_files_that_break_the_contract_are_refused_by_name(files: dict[str, bytes], text: str) -> None:
    with pytest.raises(EngineError, match=text):
        OpenVinoEngine(files)


def test_fixed_batch_is_refused() -> None:
    model = onnx.load_model_from_string(denoiser_model(False))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(EngineError, match=r"input 'noisy' is float .1, 'T', 2.; expected .* symbolic B, T"):
        OpenVinoEngine(tiny_files() | {"denoiser": model.SerializeToString()})


def test_an_operator_that_openvino_lacks_is_named() -> None:
    model = onnx.load_model_from_string(denoiser_model(False))
    node = next(node for node in model.graph.node if node.op_type == "Tanh")
    node.op_type, node.domain = "Abacus", "made.up"
    model.opset_import.append(helper.make_opsetid("made.up", 1))
    with pytest.raises(EngineError, match=rf"denoiser\.onnx: OpenVINO {openvino_version()} cannot load it"):
        denoised(OpenVinoEngine(tiny_files() | {"denoiser": model.SerializeToString()}), 1, 9)


def test_wrong_shape_is_refused_instead_of_broadcast() -> None:
    engine = OpenVinoEngine(tiny_files())
    kv, time_kv = engine.observation_kv(random(1, 1, HISTORY, OBSERVED)), engine.timestep_kv(np.array([3, 2]))
    with pytest.raises(EngineError, match="observation_kv has shape"):
        engine.denoise(random(1, 2, 9, ACTED), time_kv[:1], kv)
    with pytest.raises(EngineError, match="timestep_kv has shape"):
        engine.denoise(random(1, 1, 9, ACTED), time_kv, kv)
    with pytest.raises(EngineError, match="observation has shape"):
        engine.observation_kv(random(1, 1, HISTORY, OBSERVED + 1))


def test_a_closed_engine_is_refused() -> None:
    engine = OpenVinoEngine(tiny_files())
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.timestep_kv(np.array([1]))


def test_threads_outside_the_processor_are_refused() -> None:
    with pytest.raises(EngineError, match="threads: expected at least 1, got 0"):
        OpenVinoEngine(tiny_files(), threads=0)
    with pytest.raises(EngineError, match=r"threads: OpenVINO takes .* on this processor, not 100000"):
        denoised(OpenVinoEngine(tiny_files(), threads=100000), 1, 9)


def test_a_missing_openvino_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"openvino is not installed.*requirements/openvino\.txt"):
        OpenVinoEngine(tiny_files())


def test_integers_are_refused_where_their_products_can_saturate_and_floats_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for processor, reason in (
        (Processor("old", "x86_64", 2, (), avx2=True), "can saturate"),
        (Processor("arm", "aarch64", 2, ("asimddp",)), "for x86 only, this is aarch64"),
    ):
        monkeypatch.setattr(openvino_engine, "this_processor", lambda processor=processor: processor)
        with pytest.raises(EngineError, match=rf"denoiser\.onnx: .*{reason}.*the runtime onnxruntime"):
            OpenVinoEngine(tiny_files(quantized=True))
        OpenVinoEngine(tiny_files()).close()
