"""An ONNX graph with what a lowering asks about it: constants, who makes a tensor, who reads it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

from dcqfa_ros.runtime.errors import LoweringError


class Graph:
    """A view on a graph that stays true while it is changed through it.

    Attributes:
        label: what to call the file in errors.
        nodes: the graph's nodes, in order.
        outputs: names of the graph's outputs.
    """

    def __init__(self, graph: GraphProto, label: str) -> None:
        """Index ``graph``; ``Constant`` nodes that hold a tensor become initializers.

        Raises:
            LoweringError: the graph holds subgraphs (If, Loop, Scan), whose tensors this view would miss.
        """
        self.graph, self.label = graph, label
        self.nodes = graph.node
        for node in list(graph.node):
            if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
                raise LoweringError(f"{label}: {node_name(node)} holds a subgraph; expected a plain graph")
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                tensor = graph.initializer.add()
                tensor.CopyFrom(node.attribute[0].t)
                tensor.name = node.output[0]
                graph.node.remove(node)
        self.outputs = {value.name for value in graph.output}
        self._constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self._arrays: dict[str, np.ndarray] = {}
        self._producer: dict[str, NodeProto] = {}
        self._consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.output:
                self._producer[name] = node
            for name in dict.fromkeys(node.input):
                self._consumers[name].append(node)

    def producer(self, tensor: str) -> NodeProto | None:
        """The node that makes ``tensor``; None for inputs and constants."""
        return self._producer.get(tensor)

    def consumers(self, tensor: str) -> list[NodeProto]:
        """The nodes that read ``tensor``, each once."""
        return list(self._consumers.get(tensor, ()))

    def is_constant(self, tensor: str) -> bool:
        """Tell whether ``tensor`` is an initializer."""
        return tensor in self._constants

    def element_type(self, tensor: str) -> int | None:
        """ONNX element type of a constant; None for other tensors."""
        constant = self._constants.get(tensor)
        return None if constant is None else int(constant.data_type)

    def constant(self, node: NodeProto, tensor: str) -> np.ndarray:
        """The value of a constant input of ``node``.

        Raises:
            LoweringError: it is not constant.
        """
        if tensor not in self._constants:
            raise LoweringError(
                f"{self.label}: {node_name(node)} takes {tensor!r} from the graph; "
                "scales, zero points and codes must be constants"
            )
        return self.value(tensor)

    def value(self, tensor: str) -> np.ndarray:
        """The value of an initializer."""
        if tensor not in self._arrays:
            self._arrays[tensor] = numpy_helper.to_array(self._constants[tensor])
        return self._arrays[tensor]

    def add_constant(self, name: str, array: Any) -> str:
        """Store a new constant under ``name``, or a name like it that is free; returns the name."""
        while name in self._constants or name in self._producer:
            name += "_"
        tensor = self.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(array), name))
        self._constants[name] = tensor
        return name

    def set_constant(self, name: str, array: Any) -> None:
        """Replace the value of a constant."""
        self._constants[name].CopyFrom(numpy_helper.from_array(np.asarray(array), name))
        self._arrays.pop(name, None)

    def set_input(self, node: NodeProto, index: int, tensor: str) -> None:
        """Make ``node`` read ``tensor``."""
        old = node.input[index]
        node.input[index] = tensor
        if old not in node.input:
            self._consumers[old] = [consumer for consumer in self._consumers[old] if consumer is not node]
        if all(consumer is not node for consumer in self._consumers[tensor]):
            self._consumers[tensor].append(node)

    def pass_through(self, node: NodeProto, maker: NodeProto) -> None:
        """Remove ``node``, which does nothing but read ``maker``: its output becomes that of ``maker``."""
        name = node.output[0]
        maker.output[0] = name
        self._producer[name] = maker
        self.nodes.remove(node)

    def insert_after_producer(self, tensor: str, node: NodeProto) -> None:
        """Add a node that reads ``tensor`` as early as it can run."""
        maker = self._producer.get(tensor)
        index = 0 if maker is None else 1 + next(i for i, existing in enumerate(self.nodes) if existing is maker)
        self.nodes.insert(index, node)
        added = self.nodes[index]
        for name in added.output:
            self._producer[name] = added
        for name in dict.fromkeys(added.input):
            self._consumers[name].append(added)

    def drop_unused(self) -> None:
        """Remove nodes and constants on which no output depends. The view must not be used afterwards."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self.replace_nodes(list(reversed(kept)))
        for index in reversed(range(len(self.graph.initializer))):
            if self.graph.initializer[index].name not in needed:
                del self.graph.initializer[index]

    def replace_nodes(self, nodes: Sequence[NodeProto]) -> None:
        """Put other nodes in the place of all. The view must not be used afterwards."""
        copies = []
        for node in nodes:
            copies.append(NodeProto())
            copies[-1].CopyFrom(node)
        del self.graph.node[:]
        self.graph.node.extend(copies)


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def node_name(node: NodeProto) -> str:
    """What to call a node in errors."""
    return f"{node.op_type} {node.name or node.output[0]!r}"


def element_types(model: onnx.ModelProto, label: str) -> dict[str, int]:
    """Element type of every tensor of a model.

    Raises:
        LoweringError: types cannot be inferred.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise LoweringError(f"{label}: types cannot be inferred: {str(error).splitlines()[0]}") from error
    graph = inferred.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    return types
