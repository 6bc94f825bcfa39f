"""Weights of a canonical graph in the form that a processor multiplies.

A file stores weights in few bits: INT4 codes, FP8 codes, 8-bit codes of layers that read their input as it is. Where
the input is codes of 8-bit integers, INT4 codes become INT8 ones of the same values; everywhere else codes become
float32 values once, at loading, and not at every product.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from dcqfa_ros.runtime.errors import LoweringError

INTEGERS = frozenset({TensorProto.INT4, TensorProto.INT8, TensorProto.UINT8})
FOUR_BITS = frozenset({TensorProto.INT4, TensorProto.UINT4})


def eight_bit_codes(codes: NDArray[Any]) -> NDArray[Any]:
    """Widen integer codes of 4 bits to int8 or uint8 ones of the same values; those of 8 bits stay as they are."""
    return codes.astype(np.uint8 if codes.dtype in (ml_dtypes.uint4, np.uint8) else np.int8)


def quantized_type(quantizer: NodeProto, constants: Mapping[str, TensorProto]) -> int:
    """Return the ONNX element type of the codes that a QuantizeLinear writes."""
    if len(quantizer.input) > 2 and quantizer.input[2] in constants:
        return constants[quantizer.input[2]].data_type
    return next((a.i for a in quantizer.attribute if a.name == "output_dtype"), 0) or TensorProto.UINT8


def place_weights(model: ModelProto, label: str) -> int:
    """Replace stored weights by those that are multiplied, in place and without loss.

    Args:
        model: a canonical graph.
        label: what to call the file in errors.

    Returns:
        Number of weights replaced.

    Raises:
        LoweringError: a stored weight has no constant scale, scales per block, or a zero point other than 0.
    """
    return _Placing(model, label).run()


class _Placing:
    """One pass over one graph."""

    def __init__(self, model: ModelProto, label: str) -> None:
        self.graph, self.label = model.graph, label
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.reads = Counter(name for node in model.graph.node for name in node.input)
        self.reads.update(value.name for value in model.graph.output)
        self.names = {*self.constants, *self.producers, *(value.name for value in model.graph.input)}

    def run(self) -> int:
        folded: dict[str, str] = {}  # value of a dequantizer that goes -> the constant in its place
        widened = 0
        for node in self.graph.node:
            stored = self.constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if stored is None:
                continue
            if stored.data_type in INTEGERS and all(self._reads_codes(r, node) for r in self.readers[node.output[0]]):
                if stored.data_type == TensorProto.INT4:
                    self._widen(node, stored)
                    widened += 1
            else:
                folded[node.output[0]] = self._replaced(stored, self._values(node, stored))
        if folded or widened:
            self._read_constants(folded)
        return widened + len(folded)

    def _reads_codes(self, reader: NodeProto, weight: NodeProto) -> bool:
        """Tell whether ``reader`` multiplies the dequantized ``weight`` with codes of 8-bit integers."""
        if reader.op_type != "MatMul" or reader.input[1] != weight.output[0]:
            return False
        real = self.producers.get(reader.input[0])
        codes = None if real is None or real.op_type != "DequantizeLinear" else self.producers.get(real.input[0])
        return (
            codes is not None
            and codes.op_type == "QuantizeLinear"
            and quantized_type(codes, self.constants) in INTEGERS
        )

    def _widen(self, node: NodeProto, stored: TensorProto) -> None:
        """INT4 codes as INT8 codes, with the zero points that ONNX Runtime's fusions look for."""
        shape = self._scale(node).shape
        codes = self._replaced(stored, eight_bit_codes(numpy_helper.to_array(stored)))
        zero = self._constant(f"{codes}_zero", np.zeros(shape, np.int8))
        inputs = [codes, node.input[1], zero]
        del node.input[:]
        node.input.extend(inputs)

    def _replaced(self, stored: TensorProto, array: NDArray[Any]) -> str:
        """Name of the constant that one dequantizer's weight becomes: the old one, unless others read those codes."""
        if self.reads[stored.name] > 1:
            return self._constant(stored.name, array)
        stored.CopyFrom(numpy_helper.from_array(array, stored.name))
        return stored.name

    def _constant(self, name: str, array: NDArray[Any]) -> str:
        """Store a new constant under ``name``, or a name like it that is free; returns the name."""
        while name in self.names:
            name += "_"
        self.names.add(name)
        tensor = self.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        self.constants[name] = tensor
        return name

    def _values(self, node: NodeProto, stored: TensorProto) -> NDArray[np.float32]:
        """What the dequantizer makes of the codes."""
        scale = self._scale(node)
        codes = numpy_helper.to_array(stored).astype(np.float32)
        if scale.ndim == 1:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % codes.ndim
            scale = scale.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])
        return np.asarray(codes * scale, np.float32)

    def _scale(self, node: NodeProto) -> NDArray[np.float32]:
        given = [name for name in node.input[1:] if name]
        for name in given:
            if name not in self.constants:
                raise LoweringError(f"{self.label}: {node.name}: scale and zero point of a weight must be constants")
        arrays = [numpy_helper.to_array(self.constants[name]).astype(np.float32) for name in given]
        if len(arrays) > 1 and arrays[1].any():
            raise LoweringError(
                f"{self.label}: {node.name} has a zero point other than 0; a canonical graph is symmetric"
            )
        if arrays[0].ndim > 1 or any(a.name == "block_size" and a.i for a in node.attribute):
            raise LoweringError(
                f"{self.label}: {node.name} has scales per block; a canonical graph has one per output channel"
            )
        return arrays[0]

    def _read_constants(self, folded: dict[str, str]) -> None:
        """Drop the dequantizers in ``folded``, with the constants that nothing else reads."""
        kept = [node for node in self.graph.node if not (node.output and node.output[0] in folded)]
        for node in kept:
            for index, name in enumerate(node.input):
                if name in folded:
                    node.input[index] = folded[name]
        del self.graph.node[:]
        self.graph.node.extend(kept)
        read = {name for node in kept for name in node.input} | {value.name for value in self.graph.output}
        tensors = [tensor for tensor in self.graph.initializer if tensor.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(tensors)
