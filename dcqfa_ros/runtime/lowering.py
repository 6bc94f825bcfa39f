"""Lowering of canonical ONNX graphs to what ONNX Runtime executes fast on a CPU.

A canonical graph quantizes activations to int8 with zero point 0. ONNX Runtime's CPU kernels multiply uint8 by int8:
with int8 activations they are about five times slower. Adding 128 to code and zero point changes no value, since
rounding happens before the zero point is added and int8's range -128..127 becomes exactly uint8's 0..255. Weights stay
int8.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from dcqfa_ros.runtime.errors import LoweringError
from dcqfa_ros.runtime.lowering_weights import INTEGERS, place_weights, quantized_type
from dcqfa_ros.runtime.stored_half import widen_stored_half

_ZERO_POINT = 128
# Operators that only move elements: a code passes through them unchanged.
_MOVERS = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Gather", "Expand"}
)
_OPSET_IR = ((21, 10), (20, 9), (19, 9), (18, 8), (17, 8))  # the oldest IR version that can hold an opset


def parse_model(data: bytes, label: str) -> ModelProto:
    """Parse ONNX bytes, widen weights that are only stored as float16, set the oldest IR version the opset allows.

    Writers stamp the newest IR version they know, which older runtimes refuse although nothing in the file needs it.
    Weights: :mod:`dcqfa_ros.runtime.stored_half`.

    Args:
        data: a serialized ``ModelProto`` without external data.
        label: what to call the file in errors.

    Raises:
        LoweringError: not an ONNX model, one that refers to external files, or one with a damaged float16 tensor.
    """
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise LoweringError(f"{label}: not an ONNX file ({error})") from error
    if not model.graph.node:
        raise LoweringError(f"{label}: the ONNX graph has no nodes")
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            raise LoweringError(
                f"{label}: tensor {tensor.name!r} is stored outside the file; export with embedded weights"
            )
    widen_stored_half(model, label)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    for version, ir in _OPSET_IR:
        if opset == version and model.ir_version > ir:
            model.ir_version = ir
    return model


def is_quantized(model: ModelProto) -> bool:
    """Tell whether the graph quantizes activations (holds a QuantizeLinear node)."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def quantizes_to_integers(model: ModelProto) -> bool:
    """Tell whether the graph quantizes activations to 8-bit integers, and so multiplies such."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return any(
        quantized_type(node, constants) in INTEGERS for node in model.graph.node if node.op_type == "QuantizeLinear"
    )


def lower_for_onnxruntime_cpu(model: ModelProto, label: str) -> int:
    """Turn int8 activations with zero point 0 into uint8 ones with zero point 128, in place and without loss.

    Weights are brought into the form that is multiplied (:func:`dcqfa_ros.runtime.lowering_weights.place_weights`).

    Args:
        model: a canonical graph, opset 13 or newer.
        label: what to call the file in errors.

    Returns:
        Number of quantizers changed; 0 for a floating-point graph.

    Raises:
        LoweringError: an activation is int8 with a zero point other than 0, or its codes reach an operator other than
            DequantizeLinear and operators that only move elements, or leave the graph.
    """
    place_weights(model, label)
    return _Lowering(model.graph, label).run()


class _Lowering:
    """One pass over one graph."""

    def __init__(self, graph: GraphProto, label: str) -> None:
        self.graph, self.label = graph, label
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.consumers[name].append(node)
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self.constants[node.output[0]] = attribute.t
        self.outputs = {value.name for value in graph.output}
        self.zero_points: dict[tuple[int, ...], str] = {}
        self.shifted: set[str] = set()  # names of tensors whose codes are now uint8

    def run(self) -> int:
        changed = 0
        for node in list(self.graph.node):
            if node.op_type == "QuantizeLinear" and self._is_signed(node):
                self._shift(node)
                changed += 1
        if self.shifted:  # recorded types of shifted tensors would contradict the graph
            kept = [info for info in self.graph.value_info if info.name not in self.shifted]
            del self.graph.value_info[:]
            self.graph.value_info.extend(kept)
        return changed

    def _is_signed(self, node: NodeProto) -> bool:
        """Tell whether a quantizer writes int8; refuse it where its zero point is not 0."""
        declared = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
        if len(node.input) < 3 or not node.input[2]:
            return bool(declared == TensorProto.INT8)
        zero_point = self._constant(node, node.input[2])
        if zero_point.dtype != np.int8:
            return False
        if zero_point.any():
            raise LoweringError(
                f"{self.label}: {self._name(node)} has an int8 zero point other than 0; a canonical graph is symmetric"
            )
        return True

    def _shift(self, node: NodeProto) -> None:
        shape = self._scale_shape(node)
        self._set_zero_point(node, shape)
        kept = [a for a in node.attribute if a.name != "output_dtype"]
        del node.attribute[:]
        node.attribute.extend(kept)
        pending = [node.output[0]]
        while pending:
            tensor = pending.pop()
            self.shifted.add(tensor)
            if tensor in self.outputs:
                raise LoweringError(f"{self.label}: graph output {tensor!r} holds quantized codes; expected float32")
            for consumer in self.consumers[tensor]:
                if consumer.op_type == "DequantizeLinear" and consumer.input[0] == tensor:
                    self._dequantizer_must_be_symmetric(consumer)
                    self._set_zero_point(consumer, self._scale_shape(consumer))
                elif consumer.op_type in _MOVERS and consumer.input[0] == tensor and tensor not in consumer.input[1:]:
                    pending.append(consumer.output[0])
                else:
                    raise LoweringError(
                        f"{self.label}: int8 codes of {self._name(node)} reach {self._name(consumer)}; "
                        "expected DequantizeLinear"
                    )

    def _dequantizer_must_be_symmetric(self, node: NodeProto) -> None:
        if len(node.input) > 2 and node.input[2] and self._constant(node, node.input[2]).any():
            raise LoweringError(
                f"{self.label}: {self._name(node)} has an int8 zero point other than 0; a canonical graph is symmetric"
            )

    def _set_zero_point(self, node: NodeProto, shape: tuple[int, ...]) -> None:
        if shape not in self.zero_points:
            suffix = "x".join(map(str, shape)) or "scalar"
            name = f"zero_point_128_{suffix}"
            while name in self.constants:
                name += "_"
            tensor = numpy_helper.from_array(np.full(shape, _ZERO_POINT, np.uint8), name)
            self.graph.initializer.append(tensor)
            self.constants[name] = tensor
            self.zero_points[shape] = name
        inputs = [*node.input[:2], self.zero_points[shape]]
        del node.input[:]
        node.input.extend(inputs)

    def _scale_shape(self, node: NodeProto) -> tuple[int, ...]:
        return tuple(self._constant(node, node.input[1]).shape)

    def _constant(self, node: NodeProto, name: str) -> np.ndarray:
        tensor = self.constants.get(name)
        if tensor is None:
            raise LoweringError(
                f"{self.label}: {self._name(node)} takes {name!r} from the graph; "
                "scales and zero points must be constants"
            )
        return numpy_helper.to_array(tensor)

    @staticmethod
    def _name(node: NodeProto) -> str:
        return f"{node.op_type} {node.name or node.output[0]!r}"


def serialize(model: ModelProto) -> bytes:
    """Serialize a lowered model."""
    return model.SerializeToString()
