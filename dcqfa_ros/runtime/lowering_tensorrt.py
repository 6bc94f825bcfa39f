"""Lowering of canonical ONNX graphs to what TensorRT (10.3 to 11) and TensorRT-RTX build as strongly typed networks.

What changes, and why:

- INT4 weights that meet quantized activations become INT8 codes. TensorRT multiplies no 4-bit activations, so W4A4 runs
  as W8A8 with codes within +-7: the same numbers at the speed and memory of W8A8.
- ``weight_only``: INT4 weights are kept, in blocks of 128 inputs (the only form TensorRT multiplies by FP16
  activations), and their activation quantizers are dropped. The trained step of a channel is repeated in every block,
  and inputs that do not fill the last block are padded with zeros.
- Everything that is not quantized is typed FP16 (:mod:`dcqfa_ros.runtime.tensorrt_half`): a strongly typed network runs
  in the types that are written, so attention and norms would otherwise run in FP32.

FP8 quantizers stay as they are. Mish, Gelu, LayerNormalization, Split, Expand, Shape, Slice and Gather need no
rewriting: the ONNX parser imports them since TensorRT 10.1 (its ``operators.md`` and importers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.runtime.errors import LoweringError
from dcqfa_ros.runtime.lowering_weights import eight_bit_codes
from dcqfa_ros.runtime.tensorrt_graph import Graph, attribute, node_name
from dcqfa_ros.runtime.tensorrt_half import HALF_SUFFIX, to_half

BLOCK = 128
SMALLEST_STEP = np.float32(2.0**-24)  # the smallest FP16 number: the parser refuses steps of 0
_QUANTIZED = {TensorProto.INT8: "int8", TensorProto.INT4: "int4", TensorProto.FLOAT8E4M3FN: "fp8"}


@dataclass(frozen=True, slots=True)
class TensorRtLowering:
    """What a lowered graph asks the runtime to execute.

    Attributes:
        executed: name of a linear layer's weight (an initializer of the canonical graph) -> bits of its product. A
            strongly typed network leaves TensorRT no other precision for it.
        float32: node that stays in FP32 within an FP16 graph -> why.
        needs: element types that the device must multiply: of ``fp32``, ``fp16``, ``int8``, ``int4``, ``fp8``.
    """

    executed: Mapping[str, Bits]
    float32: Mapping[str, str]
    needs: frozenset[str]


def wants_half(model: ModelProto) -> bool:
    """Tell whether a variant is meant to run below FP32: it quantizes something or has FP16 weights."""
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node) or any(
        tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer
    )


def fix_sizes(model: ModelProto, sizes: Mapping[str, int]) -> None:
    """Give the symbolic dimensions of a graph's inputs and outputs their sizes, in place.

    Args:
        model: any graph.
        sizes: name of a symbolic dimension ("B", "T", "S") -> size, at least 1; the others stay symbolic.
    """
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]
    del model.graph.value_info[:]  # recorded shapes may name the old dimensions


def lower_for_tensorrt(
    model: ModelProto, label: str, *, half: bool = True, weight_only: bool = False
) -> TensorRtLowering:
    """Lower a canonical graph in place; its inputs and outputs keep their names and types.

    Args:
        model: a canonical graph, opset 21.
        label: what to call the file in errors.
        half: type what is not quantized FP16, else leave it FP32. Graphs without a linear layer (a table of time steps)
            stay FP32: nothing in them would become faster.
        weight_only: run linears with INT4 weights as W4A16 and not in INT8 containers; needs ``half``.

    Returns:
        What the lowered graph executes.

    Raises:
        LoweringError: the graph holds something that TensorRT does not execute as it is meant (another zero point than
            0, uint8 codes, scales from the graph, INT4 weights by something else than MatMul).
        ValueError: ``weight_only`` without ``half``.
    """
    if weight_only and not half:
        raise ValueError("weight-only INT4 multiplies FP16 activations; expected half=True")
    graph = Graph(model.graph, label)
    _Quantizers(graph, weight_only).run()
    graph.drop_unused()
    linears = _linears(graph)
    kept: dict[str, str] = {}
    if half and linears:
        kept = to_half(model, label)
        graph = Graph(model.graph, label)
        linears = _linears(graph)
    executed = {weight: _executed(graph, product, weight, half) for weight, product in linears.items()}
    del model.graph.value_info[:]
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LoweringError(f"{label}: the lowered graph is not valid ONNX: {str(error).splitlines()[0]}") from error
    return TensorRtLowering(executed, kept, _needs(model, executed))


class _Quantizers:
    """The pass over quantizers and quantized weights of one graph."""

    def __init__(self, graph: Graph, weight_only: bool) -> None:
        self.graph, self.weight_only = graph, weight_only
        self.padded: dict[tuple[str, int], str] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                self._check(node)
        for node in list(self.graph.nodes):
            if node.op_type == "DequantizeLinear":
                self._gathered_codes(node)
        for node in list(self.graph.nodes):
            if node.op_type == "DequantizeLinear" and self.graph.element_type(node.input[0]) == TensorProto.INT4:
                self._int4_weight(node)

    def _check(self, node: NodeProto) -> None:
        graph, name = self.graph, node_name(node)
        graph.constant(node, node.input[1])
        code_type = attribute(node, "output_dtype", 0) or TensorProto.UINT8  # ONNX's default
        if node.op_type == "DequantizeLinear":
            code_type = graph.element_type(node.input[0]) or 0  # 0: codes of a quantizer, which was checked
        if len(node.input) > 2 and node.input[2]:
            zero_point = graph.constant(node, node.input[2])
            code_type = graph.element_type(node.input[2]) or 0
            if np.asarray(zero_point, np.float32).any():
                raise LoweringError(
                    f"{graph.label}: {name} has a zero point other than 0; TensorRT quantizes symmetrically"
                )
        if code_type and code_type not in _QUANTIZED:
            raise LoweringError(
                f"{graph.label}: {name} has codes of type {TensorProto.DataType.Name(code_type)}; "
                "TensorRT takes INT8, INT4 and FLOAT8E4M3FN"
            )

    def _gathered_codes(self, node: NodeProto) -> None:
        """Rows looked up in a table of codes: the table in FP32, since TensorRT gathers no codes; the same values."""
        graph = self.graph
        gather = graph.producer(node.input[0])
        if gather is None or gather.op_type != "Gather" or graph.element_type(gather.input[0]) not in _QUANTIZED:
            return
        codes, scale = graph.constant(gather, gather.input[0]), graph.constant(node, node.input[1])
        rows = graph.consumers(gather.output[0]) == [node] and len(graph.consumers(gather.input[0])) == 1
        if not rows or attribute(gather, "axis", 0) != 0 or (scale.ndim and attribute(node, "axis", 1) != 1):
            raise LoweringError(
                f"{graph.label}: {node_name(gather)} looks up codes; "
                "expected rows of a table, read by one DequantizeLinear of axis 1"
            )
        graph.set_constant(gather.input[0], codes.astype(np.float32) * scale.astype(np.float32))
        graph.pass_through(node, gather)

    def _int4_weight(self, node: NodeProto) -> None:
        graph, name = self.graph, node_name(node)
        codes = graph.constant(node, node.input[0])
        products = graph.consumers(node.output[0])
        if codes.ndim != 2 or not products or attribute(node, "axis", 1) != 1 or attribute(node, "block_size", 0):
            raise LoweringError(f"{graph.label}: {name}: expected INT4 codes (in, out) with one scale per output")
        quantized = set()
        for product in products:
            if product.op_type != "MatMul" or product.input[1] != node.output[0]:
                raise LoweringError(
                    f"{graph.label}: INT4 weight {node.input[0]!r} reaches {node_name(product)}; "
                    "expected the second input of MatMul"
                )
            quantized.add(self._quantizer_of(product.input[0]) is not None)
        if len(quantized) > 1:
            raise LoweringError(
                f"{graph.label}: INT4 weight {node.input[0]!r} meets quantized and other activations; give each its own"
            )
        if quantized == {True} and not self.weight_only:
            self._to_container(node, codes)
        else:
            self._to_blocks(node, codes, products)

    def _to_container(self, node: NodeProto, codes: np.ndarray) -> None:
        """4-bit codes in INT8: the name of the weight stays."""
        self.graph.set_constant(node.input[0], eight_bit_codes(codes))
        if len(node.input) > 2:
            del node.input[2:]  # INT8 and 0 are what a missing zero point means

    def _to_blocks(self, node: NodeProto, codes: np.ndarray, products: list[NodeProto]) -> None:
        """W4A16: weight (ceil(K / 128) * 128, N), steps (ceil(K / 128), N), float activations."""
        graph = self.graph
        inputs, outputs = codes.shape
        if outputs % 2:
            raise LoweringError(
                f"{graph.label}: INT4 weight {node.input[0]!r} has {outputs} outputs; weight-only INT4 packs two codes "
                "in a byte and needs an even number: run this variant without weight_only"
            )
        blocks = -(-inputs // BLOCK)
        padded = np.zeros((blocks * BLOCK, outputs), np.int8)
        padded[:inputs] = codes.astype(np.int8)
        step = np.asarray(graph.constant(node, node.input[1]), np.float32).reshape(1, -1)
        step = np.maximum(np.broadcast_to(step, (1, outputs)), SMALLEST_STEP)
        graph.set_constant(node.input[0], padded.astype(ml_dtypes.int4))
        scale = graph.add_constant(f"{node.input[0]}.block_scale", np.repeat(step, blocks, axis=0))
        blocked = helper.make_node(
            "DequantizeLinear", [node.input[0], scale], list(node.output), node.name, axis=0, block_size=BLOCK
        )
        node.CopyFrom(blocked)
        for product in products:
            source = self._quantizer_of(product.input[0]) or product.input[0]
            if len(padded) > inputs:
                source = self._pad(source, len(padded) - inputs)
            graph.set_input(product, 0, source)

    def _pad(self, source: str, count: int) -> str:
        """Append ``count`` zeros to the last axis."""
        key = (source, count)
        if key not in self.padded:
            graph = self.graph
            pads = graph.add_constant(f"{source}.pads_{count}", np.array([0, count], np.int64))
            zero = graph.add_constant(f"{source}.pad_value_{count}", np.float32(0))
            axes = graph.add_constant(f"{source}.pad_axes_{count}", np.array([-1], np.int64))
            name = f"{source}.padded_{count}"
            self.padded[key] = name
            graph.insert_after_producer(source, helper.make_node("Pad", [source, pads, zero, axes], [name], name))
        return self.padded[key]

    def _quantizer_of(self, tensor: str) -> str | None:
        """The tensor that a quantizer reads whose dequantized codes ``tensor`` holds, before its clipping; or None."""
        graph = self.graph
        dequantizer = graph.producer(tensor)
        if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
            return None
        quantizer = graph.producer(dequantizer.input[0])
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            return None
        source = str(quantizer.input[0])
        clip = graph.producer(source)
        readers = {consumer.op_type for consumer in graph.consumers(source)}
        if clip is not None and clip.op_type == "Clip" and readers == {"QuantizeLinear"}:
            return str(clip.input[0])
        return source


def _linears(graph: Graph) -> dict[str, NodeProto]:
    """Linear layers of a graph: name of the weight's initializer -> its product."""
    found = {}
    for node in graph.nodes:
        if node.op_type == "MatMul":
            weight = _root(graph, node.input[1])
            if weight is not None:
                found[weight] = node
    return found


def _root(graph: Graph, tensor: str) -> str | None:
    """The initializer that ``tensor`` is, perhaps dequantized or cast."""
    while not graph.is_constant(tensor):
        node = graph.producer(tensor)
        if node is None or node.op_type not in ("DequantizeLinear", "Cast"):
            return None
        tensor = node.input[0]
    return tensor.removesuffix(HALF_SUFFIX)


def _executed(graph: Graph, product: NodeProto, weight: str, half: bool) -> Bits:
    codes = [_codes(graph, name) for name in product.input]
    if (
        codes[1] is None
    ):  # activations that are quantized all the same are rounded to their codes and multiplied as floats
        bits: Literal[16, 32] = 16 if half and graph.element_type(product.input[1]) == TensorProto.FLOAT16 else 32
        return Bits(weight=bits, activation=bits, kind="float")
    if codes[0] is None:
        return Bits(weight=4 if codes[1] == TensorProto.INT4 else 8, activation=16 if half else 32, kind="int")
    if codes[0] != codes[1]:
        first, second = (TensorProto.DataType.Name(code) for code in codes if code is not None)
        raise LoweringError(
            f"{graph.label}: weight {weight!r} is {second}, its activations are {first}; "
            "TensorRT multiplies equal types"
        )
    return Bits(weight=8, activation=8, kind="int" if codes[1] == TensorProto.INT8 else "float")


def _codes(graph: Graph, tensor: str) -> int | None:
    """The type of the codes that ``tensor`` was dequantized from, or None."""
    node = graph.producer(tensor)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    element = graph.element_type(node.input[0])
    if element is None:
        quantizer = graph.producer(node.input[0])
        if quantizer is None:
            return None
        element = attribute(quantizer, "output_dtype", 0)
        if len(quantizer.input) > 2 and quantizer.input[2]:
            element = graph.element_type(quantizer.input[2])
    return element


def _needs(model: ModelProto, executed: Mapping[str, Bits]) -> frozenset[str]:
    types = {tensor.data_type for tensor in model.graph.initializer}
    needs = {name for code, name in _QUANTIZED.items() if code in types}
    needs |= {"fp16" if TensorProto.FLOAT16 in types else "fp32"}
    needs |= {"fp32" for bits in executed.values() if bits.kind == "float" and bits.weight == 32}
    return frozenset(needs)
