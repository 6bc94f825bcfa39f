"""Linear layers of the torch engine: exact integers, the codes and products of ONNX Runtime, refusals by name."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.runtime import torch_linear
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.torch_graph import read_graph
from dcqfa_ros.runtime.torch_linear import Fp8Linear, IntegerLinear, check_products, make_linear
from dcqfa_ros.runtime.torch_nodes import FLOAT, FP8, HALF, INTEGER, LinearLayer
from dcqfa_ros.runtime.torch_program import Network
from test.runtime.torch_variants import HISTORY, OBSERVED, denoiser_inputs, on_one_thread, random, values, variant

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from on_one_thread()


def integer_layer(
    rng: np.random.Generator, inputs: int, outputs: int, codes: tuple[int, int] = (-128, 127), bias: bool = True
) -> LinearLayer:
    return LinearLayer(
        INTEGER,
        rng.integers(-128, 128, (inputs, outputs)).astype(np.int8),
        "weight",
        rng.standard_normal(outputs).astype(np.float32) if bias else None,
        np.ones(outputs, np.float32),
        np.float32(1.0),
        codes,
    )


@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 50), st.booleans(), st.integers(0, 2**31), st.integers(1, 3)
)
@settings(max_examples=60, deadline=None)
def test_integer_products_are_exact_for_any_shape(rows, inputs, outputs, four_bits, seed, batch) -> None:
    rng = np.random.default_rng(seed)
    limits = (-7, 7) if four_bits else (-128, 127)
    layer = integer_layer(rng, inputs, outputs, limits, bias=False)
    linear = IntegerLinear(layer, torch.float32, CPU)
    x = rng.integers(-200, 200, (batch, rows, inputs)).astype(np.float32)
    codes = np.clip(x, *limits).astype(np.int64)
    np.testing.assert_array_equal(linear.codes(torch.from_numpy(x)).numpy(), codes.reshape(-1, inputs))
    result = linear.at(x.shape)(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(result, codes @ layer.weight.astype(np.int64))  # below 2^24: exact in float32


@given(st.floats(2**-20, 2.0**10), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_codes_divide_by_the_scale_and_round_half_to_even(scale: float, seed: int) -> None:
    rng, step = np.random.default_rng(seed), np.float32(scale)
    layer = LinearLayer(INTEGER, np.ones((6, 8), np.int8), "w", None, np.ones(8, np.float32), step, (-128, 127))
    x = (rng.integers(-140, 140, (32, 6)) * np.float32(0.5) * step).astype(np.float32)  # many of them are ties
    expected = np.clip(np.rint(x / step), -128, 127)
    np.testing.assert_array_equal(IntegerLinear(layer, torch.float32, CPU).codes(torch.from_numpy(x)), expected)


def test_a_layer_at_one_shape_gives_the_same_again_and_leaves_earlier_results_alone() -> None:
    rng = np.random.default_rng(0)
    run = IntegerLinear(integer_layer(rng, 12, 5), torch.float32, CPU).at((2, 3, 12))
    first, second = (torch.from_numpy(random(seed, 2, 3, 12) * 50) for seed in (1, 2))
    kept = run(first)
    copy = kept.clone()
    run(second)
    assert torch.equal(kept, copy)
    assert torch.equal(run(first), copy)


def test_sums_beyond_half_are_scaled_in_float32_before_they_are_rounded_to_half() -> None:
    layer = LinearLayer(
        INTEGER,
        np.full((512, 8), 127, np.int8),
        "w",
        np.full(8, 0.5, np.float32),
        np.full(8, 1e-3, np.float32),
        np.float32(1e-3),
        (-128, 127),
    )
    x = torch.full((4, 512), 0.127, dtype=torch.float16)
    result = IntegerLinear(layer, torch.float16, CPU).at(x.shape)(x)
    assert result.dtype == torch.float16
    np.testing.assert_allclose(result.float(), 512 * 127 * 127 * 1e-6 + 0.5, rtol=1e-3)  # the sum itself is 8e6


def input_codes(data: bytes) -> dict[str, str]:
    """Name of a product -> tensor that holds the codes of its first factor."""
    nodes = onnx.load_from_string(data).graph.node
    dequantized = {node.output[0]: node.input[0] for node in nodes if node.op_type == "DequantizeLinear"}
    return {n.name: dequantized[n.input[0]] for n in nodes if n.op_type == "MatMul" and n.input[0] in dequantized}


@pytest.mark.parametrize("name", ["w8a8", "w4a4", "w4a8", "mixed", "fp8"])
def test_every_layer_has_the_codes_and_the_product_of_onnxruntime(name: str) -> None:
    """Layer by layer on the inputs that ONNX Runtime has there: codes are equal, sums differ by float32 rounding."""
    files = variant(name)
    reference = OnnxRuntimeEngine(files)
    noisy, time_kv, observed = denoiser_inputs(reference, 2, 9)
    layers = 0
    for role, inputs in (
        ("encoder", {"observation": random(0, 2, HISTORY, OBSERVED)}),
        ("denoiser", {"noisy": noisy, "timestep_kv": time_kv, "observation_kv": observed}),
    ):
        network = Network(read_graph(files[role], role), torch.float32, CPU)
        coded = [node for node in network.graph.nodes if node.layer is not None and node.layer.kind in (INTEGER, FP8)]
        names = [name for node in coded for name in (node.inputs[0], node.outputs[0])]
        codes_of = input_codes(files[role])
        found = values(files[role], [*names, *(codes_of[node.name] for node in coded)], inputs)
        for node in coded:
            linear = network.linears[node.outputs[0]]
            assert isinstance(linear, IntegerLinear | Fp8Linear)
            x = torch.from_numpy(found[node.inputs[0]])
            codes = found[codes_of[node.name]]
            ours = linear.codes(x).view(torch.uint8 if node.layer.kind == FP8 else torch.int8).numpy()
            np.testing.assert_array_equal(ours, codes.reshape(ours.shape))  # bits, where they are FP8
            expected = found[node.outputs[0]]
            size = np.abs(expected).max()
            np.testing.assert_allclose(linear.at(x.shape)(x).numpy(), expected, rtol=0, atol=2e-6 * size)
            layers += 1
    assert layers == 2 * 6 + (2 if name == "mixed" else 1)  # keys and values of all blocks are one layer if they can be


def test_fp8_saturates_and_rounds_as_onnx_says() -> None:
    layer = LinearLayer(FP8, np.zeros((4, 3), np.uint8), "w", None, np.ones(3, np.float32), np.float32(0.5))
    x = torch.tensor([[1e9, -1e9, 0.5 * 17.0, 0.5 * 19.0]])  # 17 and 19 lie between 16, 18 and 20
    codes = Fp8Linear(layer, torch.float32, CPU).codes(x).float()
    assert codes.tolist() == [[448.0, -448.0, 16.0, 20.0]]


def test_half_layers_round_inputs_weights_and_result_to_half() -> None:
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((24, 7)).astype(np.float16), rng.standard_normal(7).astype(np.float32)
    x = torch.from_numpy(random(2, 3, 24))
    result = make_linear(LinearLayer(HALF, weight, "w", bias), torch.float32, CPU).at(x.shape)(x)
    assert result.dtype == torch.float32
    assert torch.equal(result, result.half().float())
    np.testing.assert_allclose(
        result, x.half().numpy().astype(np.float32) @ weight.astype(np.float32) + bias, atol=5e-3
    )


def test_a_weight_that_half_cannot_hold_is_refused() -> None:
    layer = LinearLayer(FLOAT, np.full((2, 2), 1e6, np.float32), "big")
    with pytest.raises(EngineError, match=r"big: values do not fit torch\.float16; open the engine with float32"):
        make_linear(layer, torch.float16, CPU)


def test_a_torch_that_multiplies_wrongly_or_not_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_products({INTEGER, FP8, HALF, FLOAT}, CPU)
    product = torch._int_mm
    monkeypatch.setattr(torch_linear.torch, "_int_mm", lambda a, b: product(a, b) + 1)
    with pytest.raises(EngineError, match=r"torch\._int_mm of torch .* gives wrong products on cpu"):
        check_products({INTEGER}, CPU)
    monkeypatch.delattr(torch_linear.torch, "_int_mm")
    with pytest.raises(EngineError, match=r"has no torch\._int_mm, which int8 layers need"):
        check_products({INTEGER}, CPU)

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")

    monkeypatch.setattr(torch_linear.torch, "_scaled_mm", fail)
    with pytest.raises(EngineError, match=r"cannot multiply fp8 codes on cpu: CUBLAS_STATUS_NOT_SUPPORTED$"):
        check_products({FP8}, CPU)


@pytest.mark.parametrize(("capability", "refused"), [((8, 6), True), ((8, 7), True), ((8, 9), False), ((9, 0), False)])
def test_fp8_needs_compute_capability_8_9(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Orin")
    with pytest.raises((EngineError, AssertionError, RuntimeError)) as caught:  # the product itself needs the GPU
        check_products({FP8}, torch.device("cuda"))
    assert ("need compute capability 8.9; Orin has" in str(caught.value)) is refused
