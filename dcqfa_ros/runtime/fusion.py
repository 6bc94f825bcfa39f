"""Fusion of lowered graphs into ONNX Runtime's own operators, where its optimizer leaves them apart.

At batch 1 a small denoiser spends more time between operators than in them. Two patterns become one operator each of
the domain ``com.microsoft`` (both exist in every supported ONNX Runtime); the results are the same bit for bit:

- quantized product and bias: ``MatMul(DequantizeLinear, DequantizeLinear)`` then ``Add`` -> ``MatMulIntegerToFloat``;
- attention: heads split off, scores, additive mask, ``Softmax``, mixing, heads merged -> ``MultiHeadAttention``.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

DOMAIN = "com.microsoft"
_HEADS_FIRST = [0, 2, 1, 3]  # (B, T, H, D) <-> (B, H, T, D)
_LAST_SWAPPED = [0, 1, 3, 2]


def fuse_for_onnxruntime_cpu(model: ModelProto) -> Counter[str]:
    """Replace what can be replaced, in place; anything that does not match exactly stays as it is.

    Args:
        model: a graph after ``lower_for_onnxruntime_cpu``.

    Returns:
        Number of nodes made, by operator.
    """
    made = _Fusion(model).run()
    if made and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return made


class _Fusion:
    """One pass over one graph: replacements take the place of the last node of their pattern."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.consumers[name].append(node)
        self.outputs = {value.name for value in model.graph.output}
        self.replacement: dict[int, NodeProto] = {}

    def run(self) -> Counter[str]:
        for node in self.nodes:
            found = None
            if node.op_type == "MatMul":
                found = self._product_with_bias(node)
            elif node.op_type == "Softmax":
                found = self._attention(node)
            if found is not None:
                last, fused = found
                self.replacement[id(last)] = fused
        kept = [self.replacement.get(id(node), node) for node in self.nodes]
        del self.graph.node[:]
        self.graph.node.extend(self._needed(kept))
        return Counter(node.op_type for node in self.replacement.values())

    def _product_with_bias(self, product: NodeProto) -> tuple[NodeProto, NodeProto] | None:
        x, weight = (self._from(name, "DequantizeLinear") for name in product.input)
        add = self._only_consumer(product.output[0], "Add")
        if x is None or weight is None or add is None or len(x.input) < 3 or len(weight.input) < 3:
            return None
        codes, scale = self._constant(weight.input[0]), self._constant(weight.input[1])
        x_scale = self._constant(x.input[1])
        bias_name = next(name for name in add.input if name != product.output[0])
        bias = self._constant(bias_name)
        if codes is None or scale is None or x_scale is None or bias is None:
            return None
        columns = codes.shape[-1]
        per_column = scale.ndim == 1 and _attribute(weight, "axis", 1) in (1, -1)
        if codes.ndim != 2 or not (scale.ndim == 0 or per_column) or x_scale.ndim != 0 or bias.shape != (columns,):
            return None
        inputs = [x.input[0], weight.input[0], x.input[1], weight.input[1], x.input[2], weight.input[2], bias_name]
        fused = helper.make_node("MatMulIntegerToFloat", inputs, list(add.output), product.name, domain=DOMAIN)
        return add, fused

    def _attention(self, softmax: NodeProto) -> tuple[NodeProto, NodeProto] | None:
        masked = self._from(softmax.input[0], "Add")
        scores = masked and self._from(masked.input[0], "MatMul")
        mixed = self._only_consumer(softmax.output[0], "MatMul")
        if masked is None or scores is None or mixed is None or mixed.input[0] != softmax.output[0]:
            return None
        heads_last = self._only_consumer(mixed.output[0], "Transpose")
        merged = heads_last and self._only_consumer(heads_last.output[0], "Reshape")
        keys = self._from(scores.input[1], "Transpose")
        query = self._with_heads(scores.input[0])
        if heads_last is None or merged is None or keys is None or query is None:
            return None
        shape = self._constant(merged.input[1])
        if (
            _attribute(softmax, "axis", -1) not in (-1, 3)
            or _attribute(heads_last, "perm", []) != _HEADS_FIRST
            or _attribute(keys, "perm", []) != _LAST_SWAPPED
            or shape is None
            or shape.tolist() != [0, 0, -1]
            or self._rank(masked.input[1]) != 4
        ):
            return None
        key, value = self._with_heads(keys.input[0]), self._with_heads(mixed.input[1])
        if (key is None) != (value is None) or (key and value and not query[1] == key[1] == value[1]):
            return None
        # Keys and values come as (B, S, H * D) or, already split, as (B, H, S, D): the operator takes both.
        pair = [key[0], value[0]] if key and value else [keys.input[0], mixed.input[1]]
        fused = helper.make_node(
            "MultiHeadAttention",
            [query[0], *pair, "", "", masked.input[1]],
            list(merged.output),
            softmax.name,
            domain=DOMAIN,
            num_heads=query[1],
            scale=1.0,  # the graph has scaled its queries already
        )
        return merged, fused

    def _with_heads(self, name: str) -> tuple[str, int] | None:
        """Return (x, heads) where ``name`` is x (B, T, H * D) reshaped and transposed to (B, H, T, D)."""
        transpose = self._from(name, "Transpose")
        reshape = transpose and self._from(transpose.input[0], "Reshape")
        if transpose is None or reshape is None or _attribute(transpose, "perm", []) != _HEADS_FIRST:
            return None
        shape = self._constant(reshape.input[1])
        if shape is None or shape.shape != (4,) or shape[0] != 0 or shape[1] != 0 or shape[2] < 1:
            return None
        return reshape.input[0], int(shape[2])

    def _needed(self, nodes: list[NodeProto]) -> list[NodeProto]:
        """Drop nodes whose results nothing reads any more, keeping the order."""
        wanted = set(self.outputs)
        kept = []
        for node in reversed(nodes):
            if any(name in wanted for name in node.output):
                wanted.update(node.input)
                kept.append(node)
        return kept[::-1]

    def _from(self, name: str, operator: str) -> NodeProto | None:
        node = self.producer.get(name)
        return node if node is not None and node.op_type == operator else None

    def _only_consumer(self, name: str, operator: str) -> NodeProto | None:
        consumers = self.consumers[name]
        if len(consumers) != 1 or name in self.outputs or consumers[0].op_type != operator:
            return None
        return consumers[0]

    def _constant(self, name: str) -> NDArray[np.generic] | None:
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def _rank(self, name: str) -> int | None:
        """Rank of a constant, or of a slice of one."""
        cut = self._from(name, "Slice")
        array = self._constant(cut.input[0] if cut is not None else name)
        return None if array is None else array.ndim


def _attribute(node: NodeProto, name: str, default: object) -> object:
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default
