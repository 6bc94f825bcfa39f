"""Typing the part of a graph that is not quantized FP16, for strongly typed networks.

Graph inputs and outputs stay FP32 behind Casts, so callers see no difference. Integer and FP8 products keep their
codes; their scales become FP16, which moves a product by 2^-11 of its size, no more than its FP16 result does. What
stays FP32:

- operators that lose more than rounding: Mish forms ``1 + exp(x)``, which swallows small numbers; CumSum and ReduceMean
  add up a whole axis; Sin, Exp, Pow and whatever else is not in ``_HALF``;
- a product with a scale below the smallest normal FP16 number, which FP16 would round by more than 2^-11 or to 0;
- operators that read a constant beyond FP16's largest number.

Softmax and LayerNormalization are FP16: their sums run in FP32 (``stash_type`` 1, which TensorRT's parser passes on;
its attention kernels add in FP32). Constants below -3e4 that only mask scores before a Softmax (-inf, -1e9) become
-3e4, for which the weight is 0 all the same as long as scores are smaller than 3e4.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from dcqfa_ros.runtime.tensorrt_graph import Graph, element_types, node_name

HALF_SUFFIX = ".half"
MASK = -3e4
_FLOAT, _HALF_TYPE = TensorProto.FLOAT, TensorProto.FLOAT16
_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST_SCALE = 2.0**-14
_MOVERS = frozenset(
    {"Reshape", "Transpose", "Concat", "Split", "Slice", "Expand", "Squeeze", "Unsqueeze", "Gather", "Identity",
     "Flatten", "Pad", "Where"}
)  # fmt: skip
_HALF = _MOVERS | {"MatMul", "Add", "Sub", "Mul", "Clip", "Max", "Min", "Relu", "Tanh", "Sigmoid", "Gelu", "Softmax",
                   "LayerNormalization"}  # fmt: skip


def to_half(model: ModelProto, label: str) -> dict[str, str]:
    """Type everything FP16 that may be, in place.

    Args:
        model: a graph with quantized weights in their final form.
        label: what to call the file in errors.

    Returns:
        Node that stays FP32 -> why.

    Raises:
        LoweringError: types cannot be inferred, or the graph holds subgraphs.
    """
    graph = Graph(model.graph, label)
    return _HalfTyping(graph, element_types(model, label)).run()


class _HalfTyping:
    """One pass over one graph. A tensor has up to two versions, FP32 and FP16; the second is made where it is read."""

    def __init__(self, graph: Graph, types: dict[str, int]) -> None:
        self.graph, self.types = graph, types
        self.made: list[NodeProto] = []
        self.versions: dict[int, dict[str, str]] = {_FLOAT: {}, _HALF_TYPE: {}}
        self.dequantizers: dict[str, NodeProto] = {}
        self.kept: dict[str, str] = {}
        self.masks: set[str] = set()
        for value in graph.graph.input:
            if self._is_float(value.name):
                self.versions[types[value.name]][value.name] = value.name
        for tensor in graph.graph.initializer:
            if tensor.data_type in (_FLOAT, _HALF_TYPE):
                self.versions[tensor.data_type][tensor.name] = tensor.name
            if tensor.data_type == _FLOAT and self._only_masks(tensor.name):
                self.masks.add(tensor.name)

    def run(self) -> dict[str, str]:
        nodes = list(self.graph.nodes)
        for node in nodes:
            self._visit(node)
        for value in self.graph.graph.output:
            if self._is_float(value.name):
                self._finish(value.name, value.type.tensor_type.elem_type)
        self.graph.replace_nodes(self.made)
        Graph(self.graph.graph, self.graph.label).drop_unused()
        return self.kept

    def _visit(self, node: NodeProto) -> None:
        floats = [i for i, name in enumerate(node.input) if name and self._is_float(name)]
        if node.op_type == "Cast" and floats and self._is_float(node.output[0]):
            self._rounding(node)
        elif node.op_type == "DequantizeLinear":
            self.dequantizers[node.output[0]] = node
        elif node.op_type == "Shape":
            self._emit(node, {0: self._any(node.input[0])} if floats else {})
        elif node.op_type == "QuantizeLinear":
            half = self._scale_fits(node)
            if not half:
                self.kept[node_name(node)] = "its scale is below the normal numbers of FP16"
            wanted = _HALF_TYPE if half else _FLOAT
            self._emit(node, {i: self._get(node.input[i], wanted) for i in floats})
        else:
            why = self._why_float(node, floats)
            if why and floats:
                self.kept[node_name(node)] = why
            wanted = _FLOAT if why else _HALF_TYPE
            self._emit(node, {i: self._get(node.input[i], wanted) for i in floats}, wanted)

    def _rounding(self, node: NodeProto) -> None:
        """A Cast between FP32 and FP16: its result is the FP16 version of what it reads, or that version widened."""
        source, target = node.input[0], node.output[0]
        if self.types[target] == _HALF_TYPE or self.types[source] == _HALF_TYPE:
            self.versions[_HALF_TYPE][target] = self._get(source, _HALF_TYPE)
        else:
            self.versions[_FLOAT][target] = self._get(source, _FLOAT)

    def _why_float(self, node: NodeProto, floats: list[int]) -> str | None:
        if not floats or node.op_type not in _HALF:
            return f"{node.op_type} is not computed in FP16"
        if node.op_type == "LayerNormalization" and (len(node.output) > 1 or _stash_type(node) != _FLOAT):
            return "its statistics are results, or not FP32"
        for index in floats:
            name = node.input[index]
            if self.graph.is_constant(name) and not self._fits(name):
                return f"constant {name!r} is beyond the largest FP16 number"
            dequantizer = self.dequantizers.get(name)
            if node.op_type == "MatMul" and dequantizer is not None and not self._scale_fits(dequantizer):
                return f"scale {dequantizer.input[1]!r} is below the normal numbers of FP16"
        return None

    def _emit(self, node: NodeProto, inputs: dict[int, str], produced: int = _FLOAT) -> None:
        copy = NodeProto()
        copy.CopyFrom(node)
        for index, name in inputs.items():
            copy.input[index] = name
        for index, name in enumerate(node.output):
            if name and self._is_float(name):
                renamed = name + HALF_SUFFIX if produced == _HALF_TYPE and name in self.graph.outputs else name
                copy.output[index] = renamed
                self.versions[produced][name] = renamed
        self.made.append(copy)

    def _get(self, name: str, wanted: int) -> str:
        """The version of a float tensor that has the wanted type; made if there is none yet."""
        versions = self.versions[wanted]
        if name not in versions:
            if name in self.dequantizers:
                versions[name] = self._dequantize(self.dequantizers[name], wanted)
            elif self.graph.is_constant(name):
                versions[name] = self._constant(name, wanted)
            else:
                source = self._any(name)
                renamed = f"{name}{HALF_SUFFIX if wanted == _HALF_TYPE else '.float'}"
                self.made.append(helper.make_node("Cast", [source], [renamed], f"cast.{renamed}", to=wanted))
                versions[name] = renamed
        return versions[name]

    def _any(self, name: str) -> str:
        """Whichever version there is."""
        for versions in (self.versions[_HALF_TYPE], self.versions[_FLOAT]):
            if name in versions:
                return versions[name]
        return self._get(name, _HALF_TYPE)

    def _dequantize(self, node: NodeProto, wanted: int) -> str:
        """Dequantization to the wanted type: TensorRT's result has the type of the scale."""
        copy = NodeProto()
        copy.CopyFrom(node)
        if wanted == _HALF_TYPE and not self._scale_fits(node):
            wanted = _FLOAT
            target = self._get(node.output[0], _FLOAT)
            renamed = node.output[0] + HALF_SUFFIX
            self.made.append(helper.make_node("Cast", [target], [renamed], f"cast.{renamed}", to=_HALF_TYPE))
            return renamed
        copy.input[1] = self._constant(node.input[1], wanted)
        other = self.versions[_FLOAT if wanted == _HALF_TYPE else _HALF_TYPE]
        if node.output[0] in other or node.output[0] in self.graph.outputs:
            copy.output[0] = f"{node.output[0]}{HALF_SUFFIX if wanted == _HALF_TYPE else '.float'}"
            copy.name = f"{copy.name}{HALF_SUFFIX}" if copy.name else ""
        self.made.append(copy)
        return str(copy.output[0])

    def _constant(self, name: str, wanted: int) -> str:
        """A constant in the wanted type."""
        versions = self.versions[wanted]
        if name not in versions:
            value = np.asarray(self.graph.value(name))
            if name in self.masks:
                value = np.maximum(value, np.float32(MASK))
            with np.errstate(over="ignore"):
                array = value.astype(np.float16 if wanted == _HALF_TYPE else np.float32)
            versions[name] = self.graph.add_constant(name + (HALF_SUFFIX if wanted == _HALF_TYPE else ".float"), array)
        return versions[name]

    def _finish(self, name: str, declared: int) -> None:
        """Give a graph output its name and type back."""
        present = self._any(name)
        if present == name:
            return
        self.made.append(helper.make_node("Cast", [present], [name], f"cast.{name}", to=declared))

    def _scale_fits(self, node: NodeProto) -> bool:
        scale = np.asarray(self.graph.constant(node, node.input[1]), np.float32)
        if any(a.name == "block_size" and a.i for a in node.attribute):
            return True  # weight-only INT4 has FP16 steps only; they were kept above 0 when the blocks were made
        return bool(scale.min() >= _SMALLEST_SCALE and scale.max() <= _LARGEST)

    def _fits(self, name: str) -> bool:
        value = np.asarray(self.graph.value(name), np.float32)
        return name in self.masks or not (np.abs(value[np.isfinite(value)]) > _LARGEST).any()

    def _only_masks(self, name: str) -> bool:
        """Tell whether a constant has numbers below -3e4 that reach nothing but scores on their way to a Softmax."""
        value = np.asarray(self.graph.value(name))
        if value.size == 0 or not (value < MASK).any():
            return False
        pending, seen = [name], set()
        while pending:
            tensor = pending.pop()
            if tensor in self.graph.outputs:
                return False
            for node in self.graph.consumers(tensor):
                if node.op_type == "Softmax":
                    continue
                if node.op_type not in _MOVERS and node.op_type != "Add":
                    return False
                if node.output[0] not in seen:
                    seen.add(node.output[0])
                    pending.extend(node.output)
        return True

    def _is_float(self, name: str) -> bool:
        return self.types.get(name) in (_FLOAT, _HALF_TYPE)


def _stash_type(node: NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "stash_type"), _FLOAT)
