"""The derived graph gives the denoiser's vector-Jacobian product, or the graph is refused by the operator's name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from dcqfa_ros.runtime.errors import EngineError, LoweringError
from dcqfa_ros.runtime.ort_pullback import OnnxRuntimePullback
from dcqfa_ros.runtime.vjp import COTANGENT, GRADIENT, vector_jacobian_product
from test.runtime.conftest import ACTED, FLOAT, HISTORY, ROWS, WIDTH, denoiser_model, serialize

Nodes = list[onnx.NodeProto]
HEADS, DIM = 2, 8
node = helper.make_node


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention_denoiser(changed: dict[str, Nodes] | None = None) -> bytes:
    """One block of every operator that real denoisers have: norm, masked attention, GELU MLP, residuals."""
    parts: dict[str, Nodes] = {
        "embed": [
            node("MatMul", ["noisy", "w_in"], ["embedded"]),
            node("Shape", ["noisy"], ["tokens"], start=1, end=2),
            node("Slice", ["positions", "zero", "tokens", "zero"], ["position"]),
            node("Add", ["embedded", "position"], ["x"]),
        ],
        "norm": [node("LayerNormalization", ["x", "gamma", "beta"], ["normed"], axis=-1, epsilon=1e-5)],
        "qkv": [
            node("MatMul", ["normed", "w_qkv"], ["qkv"]),
            node("Split", ["qkv"], ["q", "k", "v"], axis=2, num_outputs=3),
            *(node("Reshape", [n, "split"], [f"{n}_parts"]) for n in "qkv"),
            *(node("Transpose", [f"{n}_parts"], [f"{n}_heads"], perm=[0, 2, 1, 3]) for n in "qkv"),
            node("Transpose", ["k_heads"], ["k_t"], perm=[0, 1, 3, 2]),
        ],
        "attend": [
            node("MatMul", ["q_heads", "k_t"], ["scores"]),
            node("Concat", ["tokens", "tokens"], ["twice"], axis=0),
            node("Slice", ["mask_full", "zeros", "twice", "axes"], ["mask"]),
            node("Add", ["scores", "mask"], ["masked"]),
            node("Softmax", ["masked"], ["weights"], axis=-1),
            node("MatMul", ["weights", "v_heads"], ["mixed"]),
            node("Transpose", ["mixed"], ["mixed_last"], perm=[0, 2, 1, 3]),
            node("Reshape", ["mixed_last", "merge"], ["merged"]),
            node("Add", ["x", "merged"], ["attended"]),
        ],
        "cross": [
            node("Transpose", ["observation_kv"], ["keys_t"], perm=[0, 1, 3, 2]),
            node("MatMul", ["q_heads", "keys_t"], ["seen"]),
            node("Softmax", ["seen"], ["seen_weights"]),
            node("MatMul", ["seen_weights", "observation_kv"], ["seen_mixed"]),
            node("Transpose", ["seen_mixed"], ["seen_last"], perm=[0, 2, 1, 3]),
            node("Reshape", ["seen_last", "merge"], ["seen_merged"]),
            node("ReduceSum", ["timestep_kv"], ["time"], keepdims=0),
            node("Add", ["attended", "seen_merged"], ["crossed"]),
            node("Add", ["crossed", "time"], ["timed"]),
        ],
        "mlp": [
            node("MatMul", ["timed", "w_up"], ["up"]),
            node("Gelu", ["up"], ["bent"]),
            node("MatMul", ["bent", "w_down"], ["down"]),
            node("Add", ["timed", "down"], ["out"]),
        ],
        "head": [node("MatMul", ["out", "w_out"], ["noise"])],
    }
    parts |= changed or {}
    constants: dict[str, Any] = {
        "w_in": random(1, ACTED, DIM), "positions": random(2, 16, DIM), "gamma": random(3, DIM), "beta": random(4, DIM),
        "w_qkv": random(5, DIM, 3 * DIM), "w_up": random(6, DIM, 12), "w_down": random(7, 12, DIM),
        "w_out": random(8, DIM, ACTED), "split": np.array([0, 0, HEADS, DIM // HEADS]), "merge": np.array([0, 0, -1]),
        "mask_full": np.triu(np.full((16, 16), -1e9, np.float32), 1),
        "zero": np.array([0]), "zeros": np.array([0, 0]), "axes": np.array([0, 1]),
    }  # fmt: skip
    return serialize(
        [n for part in parts.values() for n in part],
        {
            "noisy": (FLOAT, ["B", "T", ACTED]),
            "timestep_kv": (FLOAT, [1, ROWS, 1, WIDTH]),
            "observation_kv": (FLOAT, ["B", ROWS, HISTORY, WIDTH]),
        },
        {"noise": (FLOAT, ["B", "T", ACTED])},
        constants,
    )


class Erf(OpRun):
    """In float64: the evaluator's own rounds to float32."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (np.vectorize(math.erf, otypes=[np.float64])(x),)


class Gelu(OpRun):
    """Likewise."""

    op_domain = ""

    def _run(self, x: np.ndarray, approximate: str | None = None) -> tuple[np.ndarray]:
        return (0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))),)


def evaluator(model: ModelProto) -> ReferenceEvaluator:
    return ReferenceEvaluator(in_double(model), new_ops=[Erf, Gelu])


def in_double(model: ModelProto) -> ModelProto:
    """The same graph in float64, for differences that keep their digits."""
    double = ModelProto()
    double.CopyFrom(model)
    for index, constant in enumerate(double.graph.initializer):
        array = numpy_helper.to_array(constant)
        if array.dtype == np.float32:
            double.graph.initializer[index].CopyFrom(numpy_helper.from_array(array.astype(np.float64), constant.name))
    for value in (*double.graph.input, *double.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return double


def feeds(batch: int, tokens: int, seed: int) -> dict[str, np.ndarray]:
    return {
        "noisy": random(seed, batch, tokens, ACTED).astype(np.float64),
        "timestep_kv": random(seed + 1, 1, ROWS, 1, WIDTH).astype(np.float64),
        "observation_kv": random(seed + 2, batch, ROWS, HISTORY, WIDTH).astype(np.float64),
    }


@pytest.mark.parametrize("data", [attention_denoiser(), denoiser_model(False)], ids=["attention", "tiny"])
@settings(deadline=None, max_examples=3)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_gradient_equals_finite_differences(data: bytes, batch: int, tokens: int, seed: int) -> None:
    model = onnx.load_model_from_string(data)
    derived = vector_jacobian_product(model, "denoiser.onnx")
    given_ = feeds(batch, tokens, seed)
    cotangent = random(seed + 3, batch, tokens, ACTED).astype(np.float64)
    forward, both = evaluator(model), evaluator(derived)
    noise, gradient = both.run(["noise", GRADIENT], given_ | {COTANGENT: cotangent})
    np.testing.assert_allclose(noise, forward.run(None, given_)[0], rtol=1e-6, atol=1e-9)
    assert gradient.shape == given_["noisy"].shape
    expected, step = np.empty_like(gradient), 1e-5
    for index in np.ndindex(gradient.shape):
        shift = np.zeros_like(gradient)
        shift[index] = step
        ends = [forward.run(None, given_ | {"noisy": given_["noisy"] + s * shift})[0] for s in (1, -1)]
        expected[index] = ((ends[0] - ends[1]) * cotangent).sum() / (2 * step)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_onnxruntime_gives_the_same_in_single_precision() -> None:
    data = attention_denoiser()
    given_, cotangent = feeds(2, 5, 7), random(10, 2, 5, ACTED)
    pullback = OnnxRuntimePullback(data, name="fp32")
    single = {name: array.astype(np.float32) for name, array in given_.items()}
    gradient = pullback.pull(single["noisy"], single["timestep_kv"], single["observation_kv"], cotangent)
    derived = vector_jacobian_product(onnx.load_model_from_string(data), "d")
    expected = evaluator(derived).run([GRADIENT], given_ | {COTANGENT: cotangent.astype(np.float64)})[0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(EngineError, match=r"derivative of onnxruntime/fp32: denoiser.onnx failed"):
        pullback.pull(single["noisy"], single["timestep_kv"], single["observation_kv"], cotangent[:, :4])
    pullback.close()
    pullback.close()
    with pytest.raises(EngineError, match="onnxruntime/fp32 is closed"):
        pullback.pull(single["noisy"], single["timestep_kv"], single["observation_kv"], cotangent)


def changed_head(*nodes: onnx.NodeProto) -> bytes:
    return attention_denoiser({"head": [*nodes, node("MatMul", ["last", "w_out"], ["noise"])]})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (denoiser_model(True), r"DequantizeLinear 'down_x' has no derivative here.*choose a variant in floating point"),
        (changed_head(node("Sin", ["out"], ["last"])), "Sin 'last' has no derivative"),
        (changed_head(node("Gelu", ["out"], ["last"], approximate="tanh")), "only the exact form"),
        (changed_head(node("Softmax", ["out"], ["last"], axis=1)), "only the last axis"),
        (changed_head(node("CumSum", ["out", "zero"], ["last"], exclusive=1)), "only the inclusive sum"),
        (changed_head(node("Cast", ["out"], ["i"], to=6), node("Cast", ["i"], ["last"], to=1)), "rounding to floating"),
        (b"no graph", "not an ONNX file|no nodes"),
    ],
)  # fmt: skip
def test_what_cannot_be_differentiated_is_refused_by_name(data: bytes, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        OnnxRuntimePullback(data, name="x")


def test_an_operand_that_is_broadcast_is_refused() -> None:
    nodes = [
        node("MatMul", ["noisy", "w"], ["narrow"]),  # (B, T, 1)
        node("Add", ["narrow", "b"], ["noise"]),  # (B, T, 2)
    ]
    data = serialize(
        nodes, {"noisy": (FLOAT, ["B", "T", 2])}, {"noise": (FLOAT, ["B", "T", 2])},
        {"w": random(1, 2, 1), "b": random(2, 2)},
    )  # fmt: skip
    with pytest.raises(LoweringError, match=r"Add 'noise' broadcasts 'narrow'"):
        vector_jacobian_product(onnx.load_model_from_string(data), "denoiser.onnx")


def test_a_prediction_that_does_not_depend_on_the_sample_is_refused() -> None:
    data = serialize(
        [node("Identity", ["other"], ["noise"])],
        {"noisy": (FLOAT, ["B", "T", 2]), "other": (FLOAT, ["B", "T", 2])},
        {"noise": (FLOAT, ["B", "T", 2])},
        {},
    )
    with pytest.raises(LoweringError, match="'noise' does not depend on input 'noisy'"):
        vector_jacobian_product(onnx.load_model_from_string(data), "denoiser.onnx")


def test_the_given_graph_is_left_as_it_was() -> None:
    model = onnx.load_model_from_string(attention_denoiser())
    before = model.SerializeToString()
    vector_jacobian_product(model, "denoiser.onnx")
    assert model.SerializeToString() == before
