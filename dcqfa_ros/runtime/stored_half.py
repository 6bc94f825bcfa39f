"""Weights that a canonical graph only stores as float16: widened when the graph is read, computed with in float32.

The canonical form is a float16 initializer and a Cast to float32 that makes the tensor which the rest of the graph
reads; it halves the file and is ordinary ONNX. Widening is exact, so every engine and every reader of weights sees
the graph of the same (rounded) weights stored as float32, constant by constant and node by node.

A float16 variant has such Casts too, and is something else: its activations are rounded to float16 as well, which
engines recognise and multiply in float16. Graphs that round or quantize activations are left as they are.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from dcqfa_ros.runtime.errors import LoweringError


def widen_stored_half(model: ModelProto, label: str) -> int:
    """Replace every Cast of a float16 initializer to float32 by a float32 initializer, in place and exactly.

    The new initializer has the name of the Cast's result and stands where the float16 one stood, which is dropped
    unless something else reads it. Casts of anything but initializers stay, and so does every Cast in a graph that
    computes below float32 (it rounds activations to float16, or quantizes).

    Args:
        model: a canonical graph with embedded weights.
        label: what to call the file in errors.

    Returns:
        Number of initializers made.

    Raises:
        LoweringError: a float16 tensor does not hold the numbers that its shape asks for.
    """
    graph = model.graph
    widened = _stored(graph)
    if not widened:
        return 0
    made = {name for names in widened.values() for name in names}
    nodes = [_copy(node) for node in graph.node if not made.intersection(node.output)]
    still_read = {name for node in nodes for name in node.input}
    tensors = []
    for tensor in graph.initializer:
        names = widened.get(tensor.name, [])
        if not names or tensor.name in still_read:
            tensors.append(_copy_tensor(tensor))
        for name in names:
            tensors.append(numpy_helper.from_array(_values(tensor, label).astype(np.float32), name))
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    return len(made)


def stored_half_names(model: ModelProto) -> frozenset[str]:
    """Names of the float32 tensors that :func:`widen_stored_half` would make of a graph as it lies in its file."""
    return frozenset(name for names in _stored(model.graph).values() for name in names)


def _stored(graph: GraphProto) -> dict[str, list[str]]:
    """float16 initializer -> float32 tensors that Casts make of it; empty in a graph that computes below float32."""
    fixed = {value.name for value in (*graph.output, *graph.input)}
    halves = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT16} - fixed
    if not halves or _computes_below(graph):
        return {}
    found: dict[str, list[str]] = {}
    for node in graph.node:
        if _target(node) == TensorProto.FLOAT and node.input[0] in halves and node.output[0] not in fixed:
            found.setdefault(node.input[0], []).append(node.output[0])
    return found


def _computes_below(graph: GraphProto) -> bool:
    """Whether a graph computes something in less than float32."""
    return any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear") or _target(node) == TensorProto.FLOAT16
        for node in graph.node
    )


def _target(node: NodeProto) -> int | None:
    """Element type that a Cast makes; None for other operators."""
    if node.op_type != "Cast" or node.domain not in ("", "ai.onnx"):
        return None
    return next((a.i for a in node.attribute if a.name == "to"), None)


def _values(tensor: TensorProto, label: str) -> np.ndarray:
    try:
        return numpy_helper.to_array(tensor)
    except ValueError as error:
        raise LoweringError(
            f"{label}: tensor {tensor.name!r} does not hold float16 numbers of shape {tuple(tensor.dims)} ({error}); "
            "export the policy again"
        ) from error


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _copy_tensor(tensor: TensorProto) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    return copy
