"""A recognised graph as a list of torch calls for inputs of fixed shapes.

What depends on constants and shapes alone (masks and positions cut to T, shape arithmetic, expansion sizes) is computed
once, when the shapes are known; a run is a plain loop over the calls that are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from dcqfa_ros.runtime.errors import EngineError, first_line
from dcqfa_ros.runtime.torch_linear import Linear, check_products, fitting, make_linear
from dcqfa_ros.runtime.torch_nodes import Graph, Node
from dcqfa_ros.runtime.torch_operators import OPERATORS_IN_TORCH, Function, Site

Shapes = Mapping[str, tuple[int, ...]]
_INPUT_TYPES: dict[int, torch.dtype] = {TensorProto.FLOAT: torch.float32, TensorProto.INT64: torch.int64}


@dataclass(frozen=True, slots=True)
class _Call:
    function: Function
    inputs: tuple[int, ...]  # places in the list of values
    outputs: tuple[int, ...]
    unused: tuple[int, ...]  # places that nothing reads after this call


class Network:
    """A graph whose weights are on a device; it makes a :class:`Program` for any shapes of its inputs.

    Attributes:
        graph: what was read, without the weights of linear layers, which would lie in memory twice.
        dtype: type of activations between layers.
        device: where it runs.
        linears: output of a linear layer -> the layer.
    """

    def __init__(self, graph: Graph, dtype: torch.dtype, device: torch.device) -> None:
        """Put the weights on the device and check the products that they need.

        Raises:
            EngineError: the device or this torch cannot multiply a layer; the message names graph and reason.
        """
        self.dtype, self.device = dtype, device
        self._constants: dict[str, Tensor] = {}
        try:
            check_products(set(graph.linears.values()), device)
            self.linears: dict[str, Linear] = {
                node.outputs[0]: make_linear(node.layer, dtype, device)
                for node in graph.nodes
                if node.layer is not None
            }
        except EngineError as error:
            raise EngineError(f"{graph.label}: {error}") from error
        self.graph = replace(graph, nodes=tuple(_without_weights(node) for node in graph.nodes))

    def program(self, shapes: Shapes) -> Program:
        """Prepare runs with inputs of these shapes; call it in inference mode.

        Raises:
            EngineError: the graph cannot take these shapes; the message names the node.
        """
        return Program(self, shapes)

    def constant(self, name: str) -> Tensor:
        """Return an initializer on the device, in the type of activations where it is floating point."""
        if name not in self._constants:
            array = self.graph.constants[name]
            if np.issubdtype(array.dtype, np.floating):
                tensor = fitting(array, self.dtype, self.device, f"{self.graph.label}: {name}")
            else:
                tensor = torch.from_numpy(array).to(self.device)
            self._constants[name] = tensor
        return self._constants[name]


class Program:
    """The calls of one graph at fixed shapes. Linear layers reuse buffers of their own: one run at a time.

    Attributes:
        output_shape: shape of the graph's output.
    """

    def __init__(self, network: Network, shapes: Shapes) -> None:
        """Fold constants and record the calls, running each once on zeros to know the shapes that follow.

        Raises:
            EngineError: as :meth:`Network.program`.
        """
        graph = network.graph
        self._network = network
        self._places: dict[str, int] = {}
        self._examples: list[Tensor] = []
        self._folded: dict[str, Tensor] = {}
        calls: list[tuple[Function, tuple[int, ...], tuple[int, ...]]] = []
        for name, (element, _) in graph.inputs.items():
            example = torch.zeros(shapes[name], dtype=_INPUT_TYPES[element], device=network.device)
            self._place(name, example.to(network.dtype) if example.is_floating_point() else example)
        for node in graph.nodes:
            try:
                call = self._record(node)
            except EngineError as error:
                raise EngineError(f"{graph.label}: {error}") from error
            except (RuntimeError, IndexError, KeyError, ValueError, TypeError) as error:
                sizes = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
                raise EngineError(f"{graph.label}: {node} cannot take {sizes}: {first_line(error)}") from error
            if call is not None:
                calls.append(call)
        (output,) = graph.outputs
        self._output = self._place_of(output)
        self.output_shape: tuple[int, ...] = tuple(self._examples[self._output].shape)
        self._inputs = {name: self._places[name] for name in graph.inputs}
        # Results of calls are dropped; what stays are constants.
        made = {place for _, _, outputs in calls for place in outputs} | set(self._inputs.values())
        self._values: list[Any] = [None if i in made else example for i, example in enumerate(self._examples)]
        self._calls = _with_releases(calls, made, self._output)
        del self._examples, self._folded, self._places

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the calls in order; call it in inference mode.

        Args:
            inputs: every graph input, on the network's device, float32 or int64, of the shapes given before.

        Returns:
            The graph's output, float32 or the type of activations.
        """
        values, dtype = list(self._values), self._network.dtype
        for name, place in self._inputs.items():
            tensor = inputs[name]
            values[place] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        for call in self._calls:
            result = call.function(*[values[place] for place in call.inputs])
            if len(call.outputs) == 1:
                values[call.outputs[0]] = result
            else:
                for place, part in zip(call.outputs, result, strict=True):
                    values[place] = part
            for place in call.unused:
                values[place] = None
        output: Tensor = values[self._output]
        return output

    def _record(self, node: Node) -> tuple[Function, tuple[int, ...], tuple[int, ...]] | None:
        """Fold a node, or run it on examples and return its call."""
        if node.operator == "Shape":
            sizes = self._example(node.inputs[0]).shape
            start, end = node.attributes.get("start", 0), node.attributes.get("end", len(sizes))
            self._folded[node.outputs[0]] = torch.tensor(tuple(sizes[start:end]), dtype=torch.int64)
            return None
        if node.layer is not None:
            example = self._example(node.inputs[0])
            if example.shape[-1] != node.layer.weight.shape[0]:
                raise EngineError(f"{node}: input {tuple(example.shape)}, weight {node.layer.weight.shape}")
            function = self._network.linears[node.outputs[0]].at(tuple(example.shape))
            return self._called(function, node, node.inputs)
        operator = OPERATORS_IN_TORCH[node.operator]
        given = len(node.inputs) if operator.tensors is None else operator.tensors
        tensors = [name for name in node.inputs[:given] if name]
        described = [self._constant(node, name) if name else None for name in node.inputs[given:]]
        if all(self._is_constant(name) for name in tensors):
            examples = [self._constant(node, name) for name in tensors]
            result = operator.build(Site(node, examples, described))(*examples)
            parts = (result,) if isinstance(result, Tensor) else result
            self._folded.update(zip(node.outputs, parts, strict=True))
            return None
        site = Site(node, [self._example(name) for name in tensors], described)
        return self._called(operator.build(site), node, tensors)

    def _called(
        self, function: Function, node: Node, inputs: Sequence[str]
    ) -> tuple[Function, tuple[int, ...], tuple[int, ...]]:
        places = tuple(self._place_of(name) for name in inputs)
        result = function(*[self._examples[place] for place in places])
        parts = (result,) if isinstance(result, Tensor) else result
        outputs = tuple(self._place(name, part) for name, part in zip(node.outputs, parts, strict=True))
        return function, places, outputs

    def _is_constant(self, name: str) -> bool:
        return name in self._folded or name in self._network.graph.constants

    def _constant(self, node: Node, name: str) -> Tensor:
        """Return a constant in host memory, as it is stored or as it was folded."""
        if name in self._folded:
            return self._folded[name]
        if name not in self._network.graph.constants:
            raise EngineError(f"{node}: input {name!r} must be a constant")
        return torch.from_numpy(self._network.graph.constants[name])

    def _example(self, name: str) -> Tensor:
        return self._examples[self._place_of(name)]

    def _place_of(self, name: str) -> int:
        """Return where a tensor lies among the values; a constant gets a place when it is first computed with."""
        if name in self._places:
            return self._places[name]
        if name in self._folded:
            tensor, network = self._folded[name], self._network
            dtype = network.dtype if tensor.is_floating_point() else tensor.dtype
            return self._place(name, tensor.to(network.device, dtype))
        return self._place(name, self._network.constant(name))

    def _place(self, name: str, example: Tensor) -> int:
        self._places[name] = len(self._examples)
        self._examples.append(example)
        return self._places[name]


def _without_weights(node: Node) -> Node:
    if node.layer is None:
        return node
    shape_only = np.broadcast_to(np.zeros((), node.layer.weight.dtype), node.layer.weight.shape)
    return replace(node, layer=replace(node.layer, weight=shape_only))


def _with_releases(
    calls: Sequence[tuple[Function, tuple[int, ...], tuple[int, ...]]], made: set[int], output: int
) -> tuple[_Call, ...]:
    """Note after which call a result is read no more, so that its memory serves the next ones."""
    seen, backwards = {output}, []
    for function, inputs, outputs in reversed(calls):
        last = tuple(sorted((set(inputs) | set(outputs)) & made - seen))
        seen.update(inputs)
        backwards.append(_Call(function, inputs, outputs, last))
    return tuple(reversed(backwards))
