"""Reverse mode of a floating-point ONNX denoiser: a graph that also gives a vector-Jacobian product.

``vector_jacobian_product`` adds to a denoiser an input ``cotangent``, shaped like its output ``noise``, and an output
``gradient = (d noise / d noisy)^T cotangent``, shaped like its input ``noisy``. Only the operators that these graphs
use are differentiated, and only along the paths that start at ``noisy``; whatever else lies on such a path is refused
by name. Rounding to half precision (Cast) counts as the identity; rounding to integers has no useful derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from dcqfa_ros.runtime.errors import LoweringError, first_line

COTANGENT, GRADIENT = "cotangent", "gradient"
_FROM, _TO = "noisy", "noise"
_PREFIX = "vjp."

Shape = tuple[int | str, ...]


def vector_jacobian_product(model: ModelProto, label: str) -> ModelProto:
    """Return a copy of a denoiser with input ``cotangent`` (B, T, Da) and output ``gradient`` like ``noisy``.

    Args:
        model: a canonical denoiser (:mod:`dcqfa_ros.runtime.contract`) in floating point.
        label: what to call the file in errors.

    Raises:
        LoweringError: an operator between ``noisy`` and ``noise`` has no derivative here (quantizers among them), a
            broadcast cannot be followed, or ``noise`` does not depend on ``noisy``.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise LoweringError(f"{label}: shapes cannot be inferred: {first_line(error)}") from error
    return _Reverse(inferred, label).run()


class _Reverse:
    """One backward pass, written behind the forward nodes."""

    def __init__(self, model: ModelProto, label: str) -> None:
        self.model, self.label = ModelProto(), label
        self.model.CopyFrom(model)
        graph = self.graph = self.model.graph
        self.shapes: dict[str, Shape] = {}
        self.types: dict[str, int] = {}
        for value in (*graph.value_info, *graph.input, *graph.output):
            tensor = value.type.tensor_type
            self.types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.shapes[value.name] = tuple(d.dim_value or d.dim_param or "?" for d in tensor.shape.dim)
        for constant in graph.initializer:
            self.shapes[constant.name] = tuple(constant.dims)
        self.constants: dict[str, str] = {}  # made here: key -> name
        self.gradients: dict[str, list[str]] = {}  # tensor -> contributions to its gradient
        self.active = {_FROM}  # tensors that depend on noisy
        for node in graph.node:
            if any(name in self.active for name in node.input) and node.op_type != "Shape":
                self.active.update(node.output)

    def run(self) -> ModelProto:
        if _TO not in self.active:
            raise LoweringError(f"{self.label}: output {_TO!r} does not depend on input {_FROM!r}")
        forward = list(self.graph.node)
        self._declare(self.graph.input, COTANGENT, _TO)
        self.gradients[_TO] = [COTANGENT]
        for node in reversed(forward):
            given = [self._total(name) for name in node.output]
            if not any(given) or not any(name in self.active for name in node.input):
                continue
            rule = _RULES.get(node.op_type)
            if rule is None:
                raise LoweringError(
                    f"{self.label}: {_name(node)} has no derivative here, so that guidance cannot follow the network; "
                    "choose a variant in floating point, or another way of chunking"
                )
            rule(self, node, given)
        total = self._total(_FROM)
        assert total is not None  # noise depends on noisy, and every rule passes its gradient on
        self.node("Identity", [total], name=GRADIENT)
        self._declare(self.graph.output, GRADIENT, _FROM)
        del self.graph.value_info[:]
        try:
            onnx.checker.check_model(self.model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise LoweringError(f"{self.label}: the backward graph is not valid: {first_line(error)}") from error
        return self.model

    # what the rules use

    def node(self, operator: str, inputs: Sequence[str], *, name: str = "", **attributes: Any) -> str:
        """Append an operator with one output and return the output's name."""
        name = name or f"{_PREFIX}{len(self.graph.node)}"
        self.graph.node.append(helper.make_node(operator, list(inputs), [name], f"{_PREFIX}{name}", **attributes))
        return name

    def constant(self, values: Any, dtype: type = np.float32) -> str:
        """Store a constant, shared between equal uses, and return its name."""
        array: NDArray[Any] = np.asarray(values, dtype)
        key = f"{array.dtype}{array.shape}{array.tolist()}"
        if key not in self.constants:
            self.constants[key] = f"{_PREFIX}constant.{len(self.constants)}"
            self.graph.initializer.append(numpy_helper.from_array(array, self.constants[key]))
        return self.constants[key]

    def last_mean(self, name: str) -> str:
        """Mean over the last axis, kept."""
        return self.node("ReduceMean", [name, self.constant([-1], np.int64)], keepdims=1)

    def pass_on(self, name: str, gradient: str) -> None:
        """Add a contribution to the gradient of a tensor, where it depends on ``noisy``."""
        if name in self.active:
            self.gradients.setdefault(name, []).append(gradient)

    def shape(self, node: NodeProto, name: str) -> Shape:
        """Shape of a tensor that a rule needs to know.

        Raises:
            LoweringError: shape inference left its rank open.
        """
        if name not in self.shapes:
            raise LoweringError(f"{self.label}: {_name(node)}: the shape of {name!r} is not known")
        return self.shapes[name]

    def require_unbroadcast(self, node: NodeProto, name: str, other: str, axes: int) -> None:
        """Refuse an operand that depends on ``noisy`` and is broadcast over one of its leading ``axes`` (-1: all)."""
        if name not in self.active:
            return
        own, others = self.shape(node, name), self.shape(node, other)
        own, others = (own, others) if axes < 0 else (own[:axes], others[:axes])
        pairs = list(zip(own[::-1], others[::-1], strict=False))
        # Symbolic sizes (batch, tokens) are those of noisy itself: nothing is larger.
        if len(own) < len(others) or any(mine in (1, "?") and theirs != 1 for mine, theirs in pairs):
            raise LoweringError(
                f"{self.label}: {_name(node)} broadcasts {name!r} {own} to {others}; its derivative is not implemented"
            )

    def _total(self, name: str) -> str | None:
        parts = self.gradients.pop(name, [])
        while len(parts) > 1:
            parts = [self.node("Add", parts[:2]), *parts[2:]]
        if parts:
            self.gradients[name] = parts
        return parts[0] if parts else None

    def _declare(self, values: Any, name: str, like: str) -> None:
        if name in self.types:
            raise LoweringError(f"{self.label}: a tensor is called {name!r}, which is this software's name")
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(self.shape(NodeProto(), like))))


def _name(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or (node.output[0] if node.output else '')!r}"


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


def _require(reverse: _Reverse, node: NodeProto, holds: bool, what: str) -> None:
    if not holds:
        raise LoweringError(f"{reverse.label}: {_name(node)}: only {what} is differentiated")


Rule = Callable[[_Reverse, NodeProto, list["str | None"]], None]


def _first(given: list[str | None]) -> str:
    assert given[0] is not None
    return given[0]


def _identity(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    r.pass_on(node.input[0], _first(given))


def _add(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    a, b = node.input
    r.require_unbroadcast(node, a, b, -1)
    r.require_unbroadcast(node, b, a, -1)
    r.pass_on(a, _first(given))
    r.pass_on(b, _first(given))


def _matmul(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    a, b = node.input
    ranks = len(r.shape(node, a)), len(r.shape(node, b))
    weight = ranks[1] == 2 and b not in r.active and ranks[0] >= 2
    _require(r, node, weight or (ranks[0] == ranks[1] > 2), "a product with a matrix, or of two equal ranks,")
    if not weight:
        r.require_unbroadcast(node, a, b, ranks[0] - 2)
        r.require_unbroadcast(node, b, a, ranks[0] - 2)
    g = _first(given)
    if a in r.active:
        r.pass_on(a, r.node("MatMul", [g, _transposed(r, b, ranks[1])]))
    if b in r.active:
        r.pass_on(b, r.node("MatMul", [_transposed(r, a, ranks[0]), g]))


def _transposed(r: _Reverse, name: str, rank: int) -> str:
    return r.node("Transpose", [name], perm=[*range(rank - 2), rank - 1, rank - 2])


def _transpose(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    perm = list(_attribute(node, "perm", range(len(r.shape(node, node.input[0])))[::-1]))
    r.pass_on(node.input[0], r.node("Transpose", [_first(given)], perm=[perm.index(i) for i in range(len(perm))]))


def _reshape(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    r.pass_on(node.input[0], r.node("Reshape", [_first(given), r.node("Shape", [node.input[0]])]))


def _split(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    parts = [g or r.node("Mul", [out, r.constant(0.0)]) for g, out in zip(given, node.output, strict=True)]
    r.pass_on(node.input[0], r.node("Concat", parts, axis=_attribute(node, "axis", 0)))


def _softmax(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    axis = _attribute(node, "axis", -1)
    _require(r, node, axis in (-1, len(r.shape(node, node.input[0])) - 1), "the last axis")
    y = node.output[0]
    product = r.node("Mul", [_first(given), y])
    along = r.node("ReduceSum", [product, r.constant([-1], np.int64)], keepdims=1)
    r.pass_on(node.input[0], r.node("Sub", [product, r.node("Mul", [y, along])]))


def _layer_norm(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    axis = _attribute(node, "axis", -1)
    _require(r, node, axis in (-1, len(r.shape(node, node.input[0])) - 1), "the last axis")
    x, scale = node.input[:2]
    while len(node.output) < 3:
        node.output.append(f"{_PREFIX}{node.output[0]}.{len(node.output)}")
    mean, inverse = node.output[1:3]
    centred = r.node("Mul", [r.node("Sub", [x, mean]), inverse])
    g = r.node("Mul", [_first(given), scale])
    along = r.node("Mul", [centred, r.last_mean(r.node("Mul", [g, centred]))])
    rest = r.node("Sub", [r.node("Sub", [g, r.last_mean(g)]), along])
    r.pass_on(x, r.node("Mul", [rest, inverse]))


def _gelu(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    approximate = _attribute(node, "approximate", b"none")
    _require(r, node, approximate == b"none", "the exact form")
    x = node.input[0]
    erf = r.node("Erf", [r.node("Mul", [x, r.constant(math.sqrt(0.5))])])
    share = r.node("Mul", [r.node("Add", [erf, r.constant(1.0)]), r.constant(0.5)])
    bell = r.node("Exp", [r.node("Mul", [r.node("Mul", [x, x]), r.constant(-0.5)])])
    density = r.node("Mul", [bell, r.constant(1.0 / math.sqrt(2.0 * math.pi))])
    slope = r.node("Add", [share, r.node("Mul", [x, density])])
    r.pass_on(x, r.node("Mul", [_first(given), slope]))


def _tanh(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    y = node.output[0]
    slope = r.node("Sub", [r.constant(1.0), r.node("Mul", [y, y])])
    r.pass_on(node.input[0], r.node("Mul", [_first(given), slope]))


def _cumulative_sum(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    plain = not _attribute(node, "exclusive", 0) and not _attribute(node, "reverse", 0)
    _require(r, node, plain, "the inclusive sum from the beginning")
    r.pass_on(node.input[0], r.node("CumSum", [_first(given), node.input[1]], reverse=1))


def _cast(r: _Reverse, node: NodeProto, given: list[str | None]) -> None:
    halves = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    _require(r, node, _attribute(node, "to", 0) in halves, "rounding to floating point")
    r.pass_on(node.input[0], _first(given))  # gradients stay in single precision


_RULES: dict[str, Rule] = {
    "Add": _add,
    "Cast": _cast,
    "CumSum": _cumulative_sum,
    "Gelu": _gelu,
    "Identity": _identity,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Softmax": _softmax,
    "Split": _split,
    "Tanh": _tanh,
    "Transpose": _transpose,
}
