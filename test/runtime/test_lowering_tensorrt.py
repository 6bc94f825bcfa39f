"""The TensorRT lowering keeps values: exactly where only containers change, within FP16 rounding where types do."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.runtime.errors import LoweringError
from dcqfa_ros.runtime.lowering import parse_model
from dcqfa_ros.runtime.lowering_tensorrt import BLOCK, fix_sizes, lower_for_tensorrt, wants_half
from test.runtime.conftest import denoiser_model
from test.runtime.conftest import serialize as build
from test.runtime.tensorrt_graphs import feeds, linears, quantized, run
from training.export.diffusion_policy_t import export_graphs
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig

FLOAT = TensorProto.FLOAT
WIDTH = 8
MIXED = ("w4a4", "w8a8", "w4a8", "fp16", "w8a4", "w4a16", "w8a16")


@pytest.fixture(scope="module")
def graphs() -> dict[str, ModelProto]:
    """The exporter's float32 graphs of a small network; K = 48 and 144 are no multiples of 128."""
    torch.manual_seed(0)
    network = DiffusionPolicyT(DiffusionPolicyTConfig(depth=2, heads=2, dim=48, ffn_ratio=3)).eval()
    for parameter in network.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    return {role: parse_model(data, role) for role, data in export_graphs(network, 50).items()}


def lowered(model: ModelProto, **options: bool) -> tuple[ModelProto, object]:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy, lower_for_tensorrt(copy, "test.onnx", **options)


def plan_of(model: ModelProto, precision: str) -> dict[str, str]:
    weights = linears(model)
    kinds = MIXED if precision == "mixed" else (precision,)
    return {weight: kinds[i % len(kinds)] for i, weight in enumerate(weights)}


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(got - want))) / want.std())


@pytest.mark.parametrize("role", ["encoder", "timestep", "denoiser"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8a8", "w4a4", "w4a8", "fp8"])
def test_without_half_only_containers_change_and_every_result_is_the_same(
    graphs: dict[str, ModelProto], role: str, precision: str
) -> None:
    canonical = quantized(graphs[role], plan_of(graphs[role], precision))
    changed, _ = lowered(canonical, half=False)
    arrays = feeds(canonical)
    for name, want in run(canonical, arrays).items():
        np.testing.assert_array_equal(run(changed, arrays)[name], want)
    assert all(tensor.data_type != TensorProto.INT4 for tensor in changed.graph.initializer)


# An activation near the middle between two codes takes the other one when its input is rounded to FP16, and a step of
# 4 bits is a seventh of the range: whole networks of 4 bits agree only loosely, single layers do (below).
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("fp16", 2e-3), ("w8a8", 0.03), ("w4a4", 0.3), ("w4a8", 0.03), ("fp8", 0.06), ("mixed", 0.2), ("w4a16", 2e-3)],
)
@pytest.mark.parametrize("role", ["encoder", "denoiser"])
def test_half_agrees_with_the_canonical_graph(
    graphs: dict[str, ModelProto], role: str, precision: str, tolerance: float
) -> None:
    canonical = quantized(graphs[role], plan_of(graphs[role], precision))
    assert wants_half(canonical)
    changed, report = lowered(canonical)
    for seed in range(3):
        arrays = feeds(canonical, seed)
        for name, want in run(canonical, arrays).items():
            got = run(changed, arrays)[name]
            assert got.dtype == np.float32
            assert error(got, want) < tolerance
    assert len(report.executed) == len(linears(graphs[role]))


@pytest.mark.parametrize("precision", ["w8a8", "w4a4", "w4a8", "fp8", "fp16"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_one_layer_in_half_is_within_fp16_rounding(precision: str, asymmetric: bool) -> None:
    generator = np.random.default_rng(3)
    weight = generator.standard_normal((64, 32)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    bias = generator.standard_normal(32).astype(np.float32)
    data = build(nodes, {"x": (FLOAT, ["B", 64])}, {"y": (FLOAT, ["B", 32])}, {"w": weight, "b": bias})
    model = parse_model(data, "layer")
    skewed = frozenset({"w"}) if asymmetric else frozenset()
    canonical = quantized(model, {"w": precision}, skewed)
    changed, _ = lowered(canonical)
    # Activations on codes, where rounding to FP16 changes no code: the layer itself is compared.
    scales = [numpy_helper.to_array(t) for t in canonical.graph.initializer if t.name.endswith(".scale")]
    scale = float(scales[0]) if scales else 0.05
    codes = generator.integers(-1 if asymmetric else -7, 8, (5, 64))
    arrays = {"x": (codes * scale).astype(np.float32)}
    want, got = run(canonical, arrays)["y"], run(changed, arrays)["y"]
    assert np.abs(got - want).max() <= 4e-3 * np.abs(want).max()
    if precision != "fp16":  # beyond the clipping range too
        arrays = {"x": np.full((1, 64), 1e3, np.float32) * np.where(np.arange(64) % 2, 1, -1).astype(np.float32)}
        want, got = run(canonical, arrays)["y"], run(changed, arrays)["y"]
        assert np.abs(got - want).max() <= 4e-3 * np.abs(want).max()


def test_what_is_executed_is_reported_by_weight(graphs: dict[str, ModelProto]) -> None:
    canonical = quantized(graphs["denoiser"], plan_of(graphs["denoiser"], "mixed"))
    _, report = lowered(canonical)
    integer = Bits(weight=8, activation=8, kind="int")
    expected = {
        "w4a4": integer,
        "w8a8": integer,
        "w4a8": integer,
        "w8a4": integer,
        "fp16": Bits(weight=16, activation=16, kind="float"),
        "w4a16": Bits(weight=4, activation=16, kind="int"),
        "w8a16": Bits(weight=8, activation=16, kind="int"),
    }
    plan = plan_of(graphs["denoiser"], "mixed")
    assert dict(report.executed) == {weight: expected[precision] for weight, precision in plan.items()}
    assert report.needs == {"fp16", "int8", "int4"}


@pytest.mark.parametrize("role", ["encoder", "denoiser"])
def test_weight_only_keeps_the_codes_of_w4a4_and_drops_its_activation_quantizers(
    graphs: dict[str, ModelProto], role: str
) -> None:
    model = graphs[role]
    changed, report = lowered(quantized(model, plan_of(model, "w4a4")), weight_only=True)
    reference = quantized(model, plan_of(model, "w4a16"))
    arrays = feeds(model)
    for name, want in run(reference, arrays).items():
        assert error(run(changed, arrays)[name], want) < 2e-3
    assert {(bits.weight, bits.activation) for bits in report.executed.values()} == {(4, 16)}
    assert not any(node.op_type in ("QuantizeLinear", "Clip") for node in changed.graph.node)
    for tensor in changed.graph.initializer:
        if tensor.data_type == TensorProto.INT4:
            assert tensor.dims[0] % BLOCK == 0
    blocked = [node for node in changed.graph.node if node.op_type == "DequantizeLinear"]
    assert {(a.name, a.i) for node in blocked for a in node.attribute} == {("axis", 0), ("block_size", BLOCK)}


def test_weight_only_leaves_8_bit_layers_as_they_are(graphs: dict[str, ModelProto]) -> None:
    model = graphs["denoiser"]
    plan = {weight: ("w8a8", "w4a4")[i % 2] for i, weight in enumerate(linears(model))}
    changed, report = lowered(quantized(model, plan), weight_only=True)
    for weight, precision in plan.items():
        bits = report.executed[weight]
        assert (bits.weight, bits.activation) == ((8, 8) if precision == "w8a8" else (4, 16))
    assert any(node.op_type == "QuantizeLinear" for node in changed.graph.node)


def test_weight_only_needs_half(graphs: dict[str, ModelProto]) -> None:
    with pytest.raises(ValueError, match="FP16"):
        lowered(graphs["encoder"], half=False, weight_only=True)


def test_inputs_outputs_and_symbolic_sizes_stay(graphs: dict[str, ModelProto]) -> None:
    for model in graphs.values():
        changed, _ = lowered(quantized(model, plan_of(model, "w8a8")))
        assert list(changed.graph.input) == list(model.graph.input)
        assert list(changed.graph.output) == list(model.graph.output)


def test_a_float32_graph_stays_float32_unless_asked(graphs: dict[str, ModelProto]) -> None:
    assert not wants_half(graphs["denoiser"])
    _, report = lowered(graphs["denoiser"], half=False)
    assert report.needs == {"fp32"}
    assert {bits.weight for bits in report.executed.values()} == {32}
    _, report = lowered(graphs["denoiser"], half=True)
    assert report.needs == {"fp16"}


def test_no_float32_product_is_left_in_half(graphs: dict[str, ModelProto]) -> None:
    changed, report = lowered(quantized(graphs["denoiser"], plan_of(graphs["denoiser"], "fp16")))
    assert report.float32 == {}
    model = onnx.shape_inference.infer_shapes(changed, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Softmax", "LayerNormalization", "Gelu", "Add"):
            assert types[node.output[0]] == TensorProto.FLOAT16, node.name


def test_mish_stays_float32_and_says_so(graphs: dict[str, ModelProto]) -> None:
    _, report = lowered(quantized(graphs["encoder"], plan_of(graphs["encoder"], "w8a8")))
    assert [name for name in report.float32 if name.startswith("Mish")] == ["Mish 'memory_mish'"]


def test_sizes_are_fixed_by_name(graphs: dict[str, ModelProto]) -> None:
    model = ModelProto()
    model.CopyFrom(graphs["denoiser"])
    fix_sizes(model, {"B": 1, "T": 5})
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input]
    assert shapes[0] == [1, 5, 2]
    assert all(size > 0 for shape in shapes for size in shape)
    onnx.checker.check_model(model, full_check=True)


def attention(mask: np.ndarray, reads_mask_twice: bool = False) -> ModelProto:
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"]),
        helper.make_node("Transpose", ["q"], ["k"], perm=[1, 0]),
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Slice", ["mask", "zero", "rows", "axis"], ["cut"]),
        helper.make_node("Add", ["scores", "cut"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "q"], ["y" if not reads_mask_twice else "mixed"]),
    ]
    if reads_mask_twice:
        nodes.append(helper.make_node("ReduceMean", ["mask"], ["level"], keepdims=0))
        nodes.append(helper.make_node("Add", ["mixed", "level"], ["y"], name="uses_level"))
    constants = {
        "w": weight / 4,
        "mask": mask,
        "zero": np.array([0]),
        "rows": np.array([4]),
        "axis": np.array([0]),
    }
    return parse_model(build(nodes, {"x": (FLOAT, [4, WIDTH])}, {"y": (FLOAT, [4, WIDTH])}, constants), "attention")


@pytest.mark.parametrize("hidden", [-np.inf, -1e9, -1e4, np.finfo(np.float32).min])
def test_masks_of_any_size_survive_half(hidden: float) -> None:
    mask = np.where(np.tril(np.ones((4, 4), bool)), 0, hidden).astype(np.float32)
    model = attention(mask)
    changed, report = lowered(model)
    arrays = feeds(model)
    want, got = run(model, arrays)["y"], run(changed, arrays)["y"]
    np.testing.assert_allclose(got, want, atol=5e-3)
    assert report.float32 == {}
    for tensor in changed.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            assert np.isfinite(numpy_helper.to_array(tensor)).all()


def test_a_large_constant_that_is_no_mask_keeps_its_reader_in_float32() -> None:
    mask = np.where(np.tril(np.ones((4, 4), bool)), 0, -1e9).astype(np.float32)
    model = attention(mask, reads_mask_twice=True)
    changed, report = lowered(model)
    arrays = feeds(model)
    np.testing.assert_allclose(run(changed, arrays)["y"], run(model, arrays)["y"], rtol=2e-3)
    assert any("beyond the largest FP16 number" in why for why in report.float32.values())


@pytest.mark.parametrize("weight_size", [1e-7, 1e-5])
def test_scales_that_half_cannot_hold_keep_their_product_in_float32(weight_size: float) -> None:
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    weight[:, 0] *= weight_size  # one small channel; the other layer reads the same codes and stays FP16
    nodes = [
        helper.make_node("MatMul", ["x", "small"], ["a"], name="small_product"),
        helper.make_node("MatMul", ["x", "other"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    constants = {"small": weight, "other": weight[::-1] + np.float32(0.1)}
    data = build(nodes, {"x": (FLOAT, ["B", WIDTH])}, {"y": (FLOAT, ["B", WIDTH])}, constants)
    canonical = quantized(parse_model(data, "layer"), {"small": "w8a8", "other": "w8a8"})
    changed, report = lowered(canonical)
    assert list(report.float32) == ["MatMul 'small_product'"]
    assert {(bits.weight, bits.activation) for bits in report.executed.values()} == {(8, 8)}
    arrays = feeds(canonical, sizes={"B": 3})
    np.testing.assert_allclose(run(changed, arrays)["y"], run(canonical, arrays)["y"], rtol=5e-3, atol=5e-3)


def test_steps_of_zero_become_positive_in_weight_only_form() -> None:
    weight = np.zeros((WIDTH, WIDTH), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    data = build(nodes, {"x": (FLOAT, ["B", WIDTH])}, {"y": (FLOAT, ["B", WIDTH])}, {"w": weight})
    changed, _ = lowered(quantized(parse_model(data, "layer"), {"w": "w4a16"}))
    steps = [numpy_helper.to_array(t) for t in changed.graph.initializer if "block_scale" in t.name]
    assert (steps[0] > 0).all()


def test_constant_nodes_and_the_tiny_policy_are_lowered() -> None:
    model = parse_model(denoiser_model(quantized=True), "denoiser.onnx")
    changed, report = lowered(model)
    assert {name.split()[0] for name in report.float32} == {"CumSum", "ReduceMean"}
    arrays = feeds(model)
    for name, want in run(model, arrays).items():
        assert error(run(changed, arrays)[name], want) < 0.02


def layer(codes: np.ndarray, axis: int = 1, consumer: str = "MatMul", zero_point: int = 0) -> ModelProto:
    wide = codes.shape[1] if axis == 1 else codes.shape[0]
    inputs = {"MatMul": ["x", "real"], "Add": ["x", "real"], "swapped": ["real", "x"]}[consumer]
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "steps", "zero"], ["real"], name="weights", axis=axis),
        helper.make_node("Add" if consumer == "Add" else "MatMul", inputs, ["y"], name="reader"),
    ]
    constants = {
        "codes": codes,
        "steps": np.full(wide, 0.1, np.float32),
        "zero": np.full(wide, zero_point).astype(codes.dtype),
    }
    shape = [WIDTH, WIDTH]
    result = [WIDTH, codes.shape[1]]
    return parse_model(build(nodes, {"x": (FLOAT, shape)}, {"y": (FLOAT, result)}, constants), "bad")


FOUR = np.ones((WIDTH, WIDTH), ml_dtypes.int4)


def table(rows: int = 3, axis: int = 0, scale_axis: int = 1, dtype: type = np.int8) -> ModelProto:
    """Rows of a table that is stored in codes, as time steps are."""
    codes = np.random.default_rng(0).integers(-7, 8, (rows, WIDTH)).astype(dtype)
    wide = WIDTH if scale_axis == 1 else rows
    nodes = [
        helper.make_node("Gather", ["codes", "index"], ["looked_up"], "look_up", axis=axis),
        helper.make_node("DequantizeLinear", ["looked_up", "steps"], ["y"], axis=scale_axis),
    ]
    constants = {"codes": codes, "steps": np.linspace(0.1, 0.2, wide).astype(np.float32)}
    return parse_model(
        build(nodes, {"index": (TensorProto.INT64, [rows])}, {"y": (FLOAT, [rows, WIDTH])}, constants), "table"
    )


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.int4, ml_dtypes.float8_e4m3fn])
def test_tables_of_codes_become_tables_of_their_values(dtype: type) -> None:
    model = table(dtype=dtype)
    changed, report = lowered(model)
    arrays = {"index": np.array([2, 0, 2])}
    codes, steps = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    np.testing.assert_array_equal(run(changed, arrays)["y"], (codes.astype(np.float32) * steps)[[2, 0, 2]])
    assert [node.op_type for node in changed.graph.node] == ["Gather"]
    assert report.needs == {"fp32"}


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: layer(FOUR, axis=0), "DequantizeLinear 'weights': expected INT4 codes"),
        (lambda: layer(FOUR, consumer="Add"), "INT4 weight 'codes' reaches Add 'reader'"),
        (lambda: layer(FOUR, consumer="swapped"), "reaches MatMul 'reader'"),
        (lambda: layer(np.ones((WIDTH, 7), ml_dtypes.int4)), "7 outputs"),
        (lambda: layer(FOUR.astype(np.int8), zero_point=3), "zero point other than 0"),
        (lambda: layer(FOUR.astype(np.uint8)), "codes of type UINT8"),
        (lambda: table(axis=1, rows=WIDTH), "Gather 'look_up' looks up codes"),
        (lambda: table(rows=WIDTH, scale_axis=0), "Gather 'look_up' looks up codes"),
    ],
)
def test_what_tensorrt_does_not_execute_as_meant_is_refused_by_name(model: object, text: str) -> None:
    with pytest.raises(LoweringError, match=f"test.onnx: .*{text}"):
        lowered(model())  # type: ignore[operator]


def test_types_that_cannot_be_multiplied_are_refused(graphs: dict[str, ModelProto]) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weight = np.ones((WIDTH, WIDTH), np.float32)
    data = build(nodes, {"x": (FLOAT, ["B", WIDTH])}, {"y": (FLOAT, ["B", WIDTH])}, {"w": weight})
    canonical = quantized(parse_model(data, "layer"), {"w": "fp8"})
    for tensor in canonical.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(numpy_helper.from_array(np.ones((WIDTH, WIDTH), np.int8), "w"))
    with pytest.raises(LoweringError, match="'w' is INT8, its activations are FLOAT8E4M3FN"):
        lowered(canonical)
