"""Canonical ONNX graphs read for the torch engine: operators checked, linear layers and attention recognised.

Nothing here needs torch. Two patterns become one node each:

- ``Linear``: MatMul with a constant weight, its quantizers or casts on both sides, and the addition of its bias.
- ``Attention``: softmax(scale q k^T + mask) v. The exporter folds the scale into the query projection, or multiplies
  the queries by it; it is never added again.

Weights that are only stored in fewer bits, for a layer that reads its input as it is, become float32 here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from dcqfa_ros.runtime.contract import declared
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.lowering import parse_model
from dcqfa_ros.runtime.lowering_weights import eight_bit_codes
from dcqfa_ros.runtime.torch_nodes import CODE_RANGE, FLOAT, FP8, HALF, INTEGER, Graph, LinearLayer, Node

# What the exporter writes. Anything else is refused: this is no general interpreter of ONNX.
OPERATORS = frozenset(
    (
        *("Add", "Cast", "Clip", "Concat", "DequantizeLinear", "Expand", "Gather", "Gelu", "LayerNormalization"),
        *("MatMul", "Mish", "Mul", "QuantizeLinear", "Reshape", "Shape", "Slice", "Softmax", "Split", "Transpose"),
    )
)
_WEIGHT_KINDS = {TensorProto.INT8: INTEGER, TensorProto.INT4: INTEGER, TensorProto.FLOAT8E4M3FN: FP8}


def read_graph(data: bytes, label: str) -> Graph:
    """Read a canonical ONNX graph (opset 21).

    Args:
        data: a serialized ``ModelProto`` with embedded weights.
        label: what to call the file in errors.

    Raises:
        EngineError: not an ONNX file, an operator that the exporter does not write, or quantizers that do not belong
            to a linear layer; the message names operator and node.
    """
    model = parse_model(data, label)
    return _Reader(model.graph, label).read()


class _Reader:
    """One pass over one graph."""

    def __init__(self, graph: onnx.GraphProto, label: str) -> None:
        self.label = label
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = declared(value for value in graph.input if value.name not in self.tensors)
        self.outputs = declared(graph.output)
        self.nodes = [self._node(node) for node in graph.node]
        self.producers = {name: node for node in self.nodes for name in node.outputs}
        self.uses = Counter(name for node in self.nodes for name in node.inputs)
        self.uses.update(list(self.outputs))

    def read(self) -> Graph:
        replaced = {}  # output of a pattern's last node -> the node that stands for the pattern
        for node in self.nodes:
            pattern = None
            if node.operator == "MatMul":
                pattern = self._linear(node)
            elif node.operator == "Softmax":
                pattern = self._attention(node)
            if pattern is not None:
                replaced[pattern.outputs[0]] = pattern
        nodes = [replaced.get(node.outputs[0], node) for node in self.nodes]
        alive, kept = set(self.outputs), []
        for node in reversed(nodes):
            if alive.intersection(node.outputs):
                alive.update(node.inputs)
                kept.append(node)
        for node in kept:
            if node.operator == "QuantizeLinear":
                raise EngineError(
                    f"{self.label}: {node} does not belong to a linear layer with a constant weight; the torch engine "
                    "quantizes nothing else"
                )
        constants = {name: self._array(name) for name in alive if name in self.tensors}
        return Graph(self.label, self.inputs, self.outputs, constants, tuple(reversed(kept)))

    def _node(self, node: onnx.NodeProto) -> Node:
        name = node.name or (node.output[0] if node.output else "")
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise EngineError(
                f"{self.label}: the torch engine has no operator {operator} (node {name!r}); it runs what the exporter "
                "writes. Export the bundle again, or use onnxruntime"
            )
        attributes = {}
        for attribute in node.attribute:
            value = onnx.helper.get_attribute_value(attribute)
            attributes[attribute.name] = value.decode() if isinstance(value, bytes) else value
        return Node(node.op_type, name, tuple(node.input), tuple(node.output), attributes)

    def _linear(self, node: Node) -> Node | None:
        """Return the layer that a MatMul belongs to, None for a product of two activations."""
        x, weight = node.inputs
        layer = self._weight(node, weight)
        if layer is None:
            if self._quantized_input(x) is not None:
                raise EngineError(f"{self.label}: {node} multiplies quantized activations by {weight!r}, not a weight")
            return None
        quantizer = self._quantized_input(x)
        if quantizer is not None:
            if layer["kind"] not in (INTEGER, FP8):
                raise EngineError(f"{self.label}: {node} has a quantized input and {layer['kind']} weights")
            x = self._input(node, quantizer, layer)
        else:
            rounded = self._before_casts(x)
            if layer["kind"] == HALF and rounded != x:
                x = rounded
            else:
                _make_float(layer)
        output = node.outputs[0]
        addition = self._only_consumer(output)
        if addition is not None and addition.operator == "Add":
            other = next(name for name in addition.inputs if name != output) if len(set(addition.inputs)) > 1 else ""
            tensor = self.tensors.get(other)
            if tensor is not None and tuple(tensor.dims) == layer["weight"].shape[1:]:
                layer["bias"], output = self._array(other), addition.outputs[0]
        return Node("Linear", node.name, (x,), (output,), layer=LinearLayer(**layer))

    def _weight(self, node: Node, name: str) -> dict[str, Any] | None:
        tensor, producer = self.tensors.get(name), self.producers.get(name)
        if tensor is not None:
            found: dict[str, Any] = {"kind": FLOAT, "weight": self._array(name), "weight_name": name}
        elif producer is None or producer.inputs[0] not in self.tensors:
            return None
        elif producer.operator == "Cast":
            name = producer.inputs[0]
            kind = {TensorProto.FLOAT16: HALF}.get(self.tensors[name].data_type)
            if kind is None or producer.attributes["to"] != TensorProto.FLOAT:
                raise EngineError(f"{self.label}: {producer}: expected a FLOAT16 weight cast to FLOAT")
            found = {"kind": kind, "weight": self._array(name), "weight_name": name}
        elif producer.operator == "DequantizeLinear":
            found = self._quantized_weight(producer)
        else:
            return None
        if found["weight"].ndim != 2:
            raise EngineError(
                f"{self.label}: {node}: expected a weight (in, out), got shape {found['weight'].shape} ({name!r})"
            )
        return found

    def _quantized_weight(self, node: Node) -> dict[str, Any]:
        name = node.inputs[0]
        tensor = self.tensors[name]
        kind = _WEIGHT_KINDS.get(tensor.data_type)
        if kind is None:
            raise EngineError(
                f"{self.label}: {node}: weight {name!r} is {TensorProto.DataType.Name(tensor.data_type)}; expected "
                "INT8, INT4 or FLOAT8E4M3FN"
            )
        codes = self._array(name)
        codes = codes.view(np.uint8) if kind == FP8 else eight_bit_codes(codes)
        scale = self._scale(node)
        if codes.ndim != 2 or scale.shape != codes.shape[1:] or node.attributes.get("axis", 1) not in (1, -1):
            raise EngineError(
                f"{self.label}: {node}: expected one scale per output (axis 1), got scales {scale.shape} for weight "
                f"{codes.shape}, axis {node.attributes.get('axis', 1)}"
            )
        return {"kind": kind, "weight": codes, "weight_name": name, "weight_scale": scale}

    def _quantized_input(self, name: str) -> tuple[Node, Node] | None:
        """Return the quantizer and dequantizer that make an activation, None where it is not quantized."""
        dequantizer = self.producers.get(name)
        if dequantizer is None or dequantizer.operator != "DequantizeLinear":
            return None
        quantizer = self.producers.get(dequantizer.inputs[0])
        return (quantizer, dequantizer) if quantizer is not None and quantizer.operator == "QuantizeLinear" else None

    def _input(self, node: Node, pair: tuple[Node, Node], layer: dict[str, Any]) -> str:
        """Read a layer's input quantizer into ``layer`` and return what it quantizes."""
        quantizer, dequantizer = pair
        element = quantizer.attributes.get("output_dtype", 0)
        if len(quantizer.inputs) > 2 and quantizer.inputs[2] in self.tensors:
            element = self.tensors[quantizer.inputs[2]].data_type
        expected = TensorProto.INT8 if layer["kind"] == INTEGER else TensorProto.FLOAT8E4M3FN
        if element != expected:
            raise EngineError(
                f"{self.label}: {quantizer} writes {TensorProto.DataType.Name(element)} for {node}, whose weights need "
                f"{TensorProto.DataType.Name(expected)}"
            )
        scale = self._scale(quantizer)
        if scale.size != 1 or not np.array_equal(scale, self._scale(dequantizer)):
            raise EngineError(f"{self.label}: {quantizer}: expected one scale, the same in {dequantizer}")
        layer["input_scale"] = scale.reshape(())[()]
        x = quantizer.inputs[0]
        if layer["kind"] == INTEGER:
            layer["codes"], x = self._limits(x, layer["input_scale"])
        return x

    def _limits(self, x: str, scale: np.float32) -> tuple[tuple[int, int], str]:
        """Fold a Clip before an integer quantizer into limits of its codes.

        Exact: quantization never decreases, so quantizing a clipped value is clipping its code.
        """
        clip = self.producers.get(x)
        if clip is None or clip.operator != "Clip":
            return CODE_RANGE, x
        limits = list(CODE_RANGE)
        for place, name in enumerate(clip.inputs[1:3]):
            if name:
                if name not in self.tensors:
                    raise EngineError(f"{self.label}: {clip}: limit {name!r} is not a constant")
                code = np.rint(np.float32(self._array(name).reshape(())) / scale)
                limits[place] = int(np.clip(code, *CODE_RANGE))
        if limits[0] > limits[1]:
            raise EngineError(f"{self.label}: {clip}: its lower limit lies above its upper one")
        return (limits[0], limits[1]), clip.inputs[0]

    def _before_casts(self, name: str) -> str:
        """Return what was rounded to FLOAT16 and back, or ``name``; a layer in half rounds its input itself."""
        before = name
        for element in (TensorProto.FLOAT, TensorProto.FLOAT16):
            cast = self.producers.get(before)
            if cast is None or cast.operator != "Cast" or cast.attributes["to"] != element:
                return name
            before = cast.inputs[0]
        return before

    def _attention(self, softmax: Node) -> Node | None:
        """Return attention where a softmax is its middle, None where it is anything else."""
        mixed = self._only_consumer(softmax.outputs[0])
        if mixed is None or mixed.operator != "MatMul" or mixed.inputs[0] != softmax.outputs[0]:
            return None
        if softmax.attributes.get("axis", -1) != -1:
            return None
        inner, mask = self.producers.get(softmax.inputs[0]), tuple[str, ...]()
        if inner is not None and inner.operator == "Add":
            for number in (0, 1):
                product = self.producers.get(inner.inputs[number])
                if product is not None and product.operator == "MatMul" and self.uses[inner.outputs[0]] == 1:
                    inner, mask = product, (inner.inputs[1 - number],)
                    break
        if inner is None or inner.operator != "MatMul" or self.uses[inner.outputs[0]] != 1:
            return None
        transposed = self.producers.get(inner.inputs[1])
        if transposed is None or transposed.operator != "Transpose":
            return None
        if list(transposed.attributes.get("perm", [])) != [0, 1, 3, 2]:
            return None
        query, scale = self._scaled(inner.inputs[0])
        inputs = (query, transposed.inputs[0], mixed.inputs[1], *mask)
        return Node("Attention", mixed.name, inputs, mixed.outputs, {"scale": scale})

    def _scaled(self, query: str) -> tuple[str, float]:
        """Return queries before they are multiplied by a constant, and the constant; 1 where they are not."""
        product = self.producers.get(query)
        if product is not None and product.operator == "Mul" and self.uses[query] == 1:
            for number in (0, 1):
                tensor = self.tensors.get(product.inputs[number])
                if tensor is not None and not tensor.dims:
                    return product.inputs[1 - number], float(self._array(tensor.name))
        return query, 1.0

    def _only_consumer(self, name: str) -> Node | None:
        if self.uses[name] != 1 or name in self.outputs:
            return None
        return next(node for node in self.nodes if name in node.inputs)

    def _scale(self, node: Node) -> NDArray[np.float32]:
        """Read the scale of a symmetric quantizer or dequantizer."""
        for name in node.inputs[1:]:
            if name and name not in self.tensors:
                raise EngineError(f"{self.label}: {node}: {name!r} is not a constant")
        if node.attributes.get("block_size", 0):
            raise EngineError(f"{self.label}: {node}: scales of blocks are not supported; expected one per output")
        if len(node.inputs) > 2 and node.inputs[2] and self._array(node.inputs[2]).astype(np.float32).any():
            raise EngineError(f"{self.label}: {node}: the zero point is not 0; a canonical graph is symmetric")
        scale = self._array(node.inputs[1]).astype(np.float32)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise EngineError(f"{self.label}: {node}: expected finite scales above 0")
        return scale

    def _array(self, name: str) -> NDArray[Any]:
        return np.array(numpy_helper.to_array(self.tensors[name]))


def _make_float(layer: dict[str, Any]) -> None:
    """Give a layer that reads its input as it is a float32 weight, whatever type that is stored in."""
    if layer["kind"] == FP8:
        layer["weight"] = layer["weight"].view(ml_dtypes.float8_e4m3fn)
    layer["weight"] = layer["weight"].astype(np.float32)
    if layer["kind"] in (INTEGER, FP8):
        layer["weight"] *= layer.pop("weight_scale")
    layer["kind"] = FLOAT
