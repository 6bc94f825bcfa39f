"""The operators of canonical graphs in torch.

A builder gets a node, examples of the tensors it computes with and the constants that describe it (shapes, axes,
limits), and returns a function of those tensors: what depends on shapes alone is settled when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.torch_nodes import Node

Function = Callable[..., Any]  # tensors -> a tensor, or several for Split


@dataclass(frozen=True, slots=True)
class Site:
    """Where an operator stands: its node, examples of what it computes with, and what describes it (None: left out)."""

    node: Node
    tensors: Sequence[Tensor]
    described: Sequence[Tensor | None] = ()


@dataclass(frozen=True, slots=True)
class Operator:
    """How to build an operator; its first ``tensors`` inputs are computed with (None: all), the others describe it."""

    build: Callable[[Site], Function]
    tensors: int | None = 1


def _plain(function: Function) -> Callable[[Site], Function]:
    """Builder of an operator that nothing describes."""
    return lambda _: function


def _cast(site: Site) -> Function:
    to = site.node.attributes["to"]
    if to not in (TensorProto.FLOAT16, TensorProto.FLOAT) or not site.tensors[0].is_floating_point():
        raise EngineError(f"{site.node}: the torch engine casts between FLOAT and FLOAT16 only")
    if to == TensorProto.FLOAT16:
        outer = site.tensors[0].dtype
        return lambda x: x.to(torch.float16).to(outer)  # values are rounded; the type stays that of activations
    return lambda x: x


def _clip(site: Site) -> Function:
    low, high = (None if limit is None else float(limit) for limit in (*site.described, None, None)[:2])
    if low is None and high is None:
        return lambda x: x
    return lambda x: torch.clamp(x, low, high)


def _concat(site: Site) -> Function:
    axis = site.node.attributes["axis"]
    return lambda *parts: torch.cat(parts, axis)


def _dequantize(site: Site) -> Function:
    """Codes looked up in a table, one scale per index of an axis (a quantized activation is part of its layer)."""
    if len(site.described) > 1 and site.described[1] is not None and bool(site.described[1].float().any()):
        raise EngineError(f"{site.node}: the zero point is not 0; a canonical graph is symmetric")
    if site.node.attributes.get("block_size", 0) or site.described[0] is None:
        raise EngineError(f"{site.node}: expected one scale per index of an axis")
    scale = site.described[0].to(site.tensors[0].device)
    if scale.ndim:
        axis = site.node.attributes.get("axis", 1) % site.tensors[0].ndim
        scale = scale.reshape([-1 if place == axis else 1 for place in range(site.tensors[0].ndim)])
    return lambda x: x.to(torch.float32) * scale


def _expand(site: Site) -> Function:
    shape = torch.broadcast_shapes(site.tensors[0].shape, tuple(_integers(site, 0)))
    return lambda x: x.expand(shape)


def _gather(site: Site) -> Function:
    axis, (data, index) = site.node.attributes.get("axis", 0), site.tensors
    axis %= data.ndim
    shape = (*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])
    return lambda x, i: x.index_select(axis, i.reshape(-1)).reshape(shape)


def _gelu(site: Site) -> Function:
    approximate = site.node.attributes.get("approximate", "none")
    return lambda x: functional.gelu(x, approximate=approximate)


def _layer_norm(site: Site) -> Function:
    last = site.tensors[0].ndim - 1
    if site.node.attributes.get("axis", -1) not in (-1, last) or len(site.node.outputs) != 1:
        raise EngineError(f"{site.node}: expected normalisation over the last axis and one output")
    shape, epsilon = site.tensors[0].shape[-1:], site.node.attributes.get("epsilon", 1e-5)
    return lambda x, weight, bias=None: functional.layer_norm(x, shape, weight, bias, epsilon)  # sums in float32


def _reshape(site: Site) -> Function:
    shape, sizes = list(site.tensors[0].shape), _integers(site, 0)
    if site.node.attributes.get("allowzero", 0):
        raise EngineError(f"{site.node}: allowzero is not supported")
    target = [shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return lambda x: x.reshape(target)


def _slice(site: Site) -> Function:
    starts, ends = (_integers(site, place) for place in (0, 1))
    axes = _integers(site, 2, list(range(len(starts))))
    steps = _integers(site, 3, [1] * len(starts))
    if any(step < 1 for step in steps):
        raise EngineError(f"{site.node}: steps below 1 are not supported")
    index = [slice(None)] * site.tensors[0].ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    where = tuple(index)
    return lambda x: x[where]


def _softmax(site: Site) -> Function:
    axis, dtype = site.node.attributes.get("axis", -1), site.tensors[0].dtype
    return lambda x: torch.softmax(x, axis, dtype=torch.float32).to(dtype)


def _split(site: Site) -> Function:
    axis, count = site.node.attributes.get("axis", 0), len(site.node.outputs)
    size = site.tensors[0].shape[axis]
    sizes = _integers(site, 0, [])
    if not sizes:
        part = -(-size // count)
        sizes = [min(part, size - place * part) for place in range(count)]
    if sum(sizes) != size or min(sizes) < 1:
        raise EngineError(f"{site.node}: cannot split {size} into {count} parts {sizes}")
    return lambda x: torch.split(x, sizes, axis)


def _transpose(site: Site) -> Function:
    axes = tuple(site.node.attributes.get("perm", range(site.tensors[0].ndim)[::-1]))
    return lambda x: x.permute(axes)


def _attention(site: Site) -> Function:
    attend, scale = functional.scaled_dot_product_attention, site.node.attributes["scale"]
    return lambda q, k, v, mask=None: attend(q, k, v, attn_mask=mask, scale=scale)  # softmax in float32 in any case


def _integers(site: Site, place: int, default: list[int] | None = None) -> list[int]:
    """Read a one-dimensional integer input; ``default`` where the node has none."""
    value = site.described[place] if place < len(site.described) else None
    if value is None:
        if default is None:
            raise EngineError(f"{site.node}: input {place + 1} is missing")
        return default
    return [int(entry) for entry in value.reshape(-1)]


OPERATORS_IN_TORCH: dict[str, Operator] = {
    "Add": Operator(_plain(torch.add), None),
    "Attention": Operator(_attention, None),
    "Cast": Operator(_cast),
    "Clip": Operator(_clip),
    "Concat": Operator(_concat, None),
    "DequantizeLinear": Operator(_dequantize),
    "Expand": Operator(_expand),
    "Gather": Operator(_gather, None),
    "Gelu": Operator(_gelu),
    "LayerNormalization": Operator(_layer_norm, None),
    "MatMul": Operator(_plain(torch.matmul), None),
    "Mish": Operator(_plain(functional.mish)),
    "Mul": Operator(_plain(torch.mul), None),
    "Reshape": Operator(_reshape),
    "Slice": Operator(_slice),
    "Softmax": Operator(_softmax),
    "Split": Operator(_split),
    "Transpose": Operator(_transpose),
}
