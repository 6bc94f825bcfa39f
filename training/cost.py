"""What a subnet costs on a device: latency of one chunk and memory (``algorithms.md`` section 4).

``Lat = t_fix + sum_l t_kv(l) + N_steps (t_step + sum_l t(l) - saved)``, where ``saved`` is what networks gain that stay
in the processor's cache, and ``Mem = weights, scales and fixed parts + max_l activations(l) + workspace``. Both come
from a look-up table and do not depend on the network's weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcqfa_ros.errors import UserError
from training.lut import CacheEffect, FixedEntry, LookUpTable, stored_subnet
from training.policy_shape import BlockShape, PolicyShape
from training.space import SearchSpace
from training.space_counts import real_bytes
from training.subnet import Layer, Precision, Subnet

FLOAT_BYTES = 4


class CostError(UserError, ValueError):
    """A cost that cannot be told; the message names the subnet's layer or the missing entry and what to do."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Latency of one chunk in milliseconds and resident memory in bytes."""

    latency_ms: float
    memory_bytes: float


@dataclass(frozen=True, slots=True, eq=False)
class CachedTensors:
    """What a chunk saves while weights of the blocks stay in the processor's cache.

    Attributes:
        weights: (L, H, M, W, A) float32, bytes of the weights of a kept layer, without copies.
        effect: of one denoising step.
        steps: denoising steps per chunk.
    """

    weights: Tensor
    effect: CacheEffect
    steps: int

    def saved_ms(self, picked: Iterable[tuple[int, int, int, int, int]]) -> float:
        """Milliseconds that a chunk of the network saves that keeps ``picked`` choices."""
        return self.steps * self.effect.saved_ms(sum(float(self.weights[place]) for place in picked))


@dataclass(frozen=True, slots=True, eq=False)
class CostTensors:
    """What every choice of every layer adds on one device, in the space's order of choices, at integer precision.

    Sums over layers hold for networks beyond the processor's cache and bound the latency of smaller ones from above.

    L blocks, H head counts, M hidden widths, W weight bits, A activation bits. Where a block has fewer choices than
    another, its last one is repeated.

    Attributes:
        latency: (L, H, M, W, A) float32, milliseconds per chunk that a kept layer adds.
        memory: (L, H, M, W, A) float32, bytes that a kept layer adds.
        fixed_latency: milliseconds per chunk of everything outside the blocks.
        fixed_memory: bytes of everything outside the blocks, with the largest activation buffer of the whole space:
            ``fixed_memory`` plus a sum over layers bounds the memory from above, by less than that buffer.
        space: the choices behind the indices.
        activation: (L, H, M) float32, bytes of a layer's activations, of which the largest one counts.
        cached: what smaller networks save; None for nothing.
    """

    latency: Tensor
    memory: Tensor
    fixed_latency: float
    fixed_memory: float
    space: SearchSpace
    activation: Tensor
    cached: CachedTensors | None = None

    def indices(self, block: int, layer: Layer) -> tuple[int, int, int, int]:
        """Index of a kept layer's heads, hidden width, weight bits and activation bits.

        Raises:
            CostError: the space does not offer one of them.
        """
        space = self.space
        found = []
        for label, value, choices in (
            ("heads", layer.heads, space.head_choices[block]),
            ("mlp", layer.mlp, space.mlp_choices[block]),
            ("w", layer.w, space.weight_bits),
            ("a", layer.a, space.activation_bits),
        ):
            if value not in choices:
                offered = ", ".join(str(choice) for choice in choices)
                raise CostError(f"block {block}: {label} {value} is not in the space; it offers {offered}")
            found.append(choices.index(value))
        return found[0], found[1], found[2], found[3]

    def total(self, subnet: Subnet) -> Cost:
        """Cost of a subnet at integer precision, equal to :func:`cost` but for the rounding of float32 entries.

        Raises:
            CostError: another precision (use :func:`cost`), or a choice that the space does not offer.
        """
        if subnet.precision is not Precision.INT:
            raise CostError(
                f"the tensors hold costs at integer precision, not {subnet.precision.value}; use cost() with the table"
            )
        picked = [(i, *self.indices(i, layer)) for i, layer in enumerate(subnet.layers) if layer is not None]
        latency = self.fixed_latency + sum(float(self.latency[place]) for place in picked)
        memory = self.fixed_memory + sum(float(self.memory[place]) for place in picked)
        if self.cached is not None:
            latency -= self.cached.saved_ms(picked)
        spare = float(self.activation.max()) - max((float(self.activation[place[:3]]) for place in picked), default=0.0)
        return Cost(latency, memory - spare)


def cost(table: LookUpTable, shape: PolicyShape, subnet: Subnet, steps: int) -> Cost:
    """Cost of a subnet of any precision on the device of ``table``.

    Args:
        table: entries of the device.
        shape: the policy, with the tokens it executes.
        subnet: the subnet.
        steps: denoising steps per chunk, at least 1.

    Raises:
        CostError: ``steps`` is below 1.
        TableError: the table lacks an entry; the message names it.
    """
    _check_steps(steps)
    fixed = table.fixed_parts(shape, subnet.precision)
    latency = fixed.encoder_ms + steps * fixed.step_fixed_ms
    activation = 0
    for block, layer in zip(shape.blocks, subnet.layers, strict=True):
        if layer is None:
            continue
        entry = table.block(block, layer, table.form(subnet.precision, layer).executed)
        latency += entry.kv_ms + steps * entry.step_ms
        activation = max(activation, activation_bytes(block, layer.heads, layer.mlp))
    stored = stored_subnet(table, subnet)
    outside = fixed_bytes(shape, stored.precision)
    blocks = real_bytes(shape, stored) - outside
    if fixed.cache is not None:
        latency -= steps * fixed.cache.saved_ms(blocks)
    engine = workspace_bytes(table, fixed) + subnet.depth * fixed.block_workspace_bytes
    return Cost(latency, outside + fixed.weight_copies * blocks + activation + engine)


def workspace_bytes(table: LookUpTable, fixed: FixedEntry) -> int:
    """Memory of the engine beyond weights and activations, whatever the network."""
    return table.workspace_bytes if fixed.workspace_bytes is None else fixed.workspace_bytes


def cost_tensors(table: LookUpTable, space: SearchSpace, steps: int) -> CostTensors:
    """What every choice of the space costs at integer precision on the device of ``table``.

    Raises:
        CostError: ``steps`` is below 1.
        TableError: the table lacks an entry of the space; the message names it.
    """
    _check_steps(steps)
    fixed = table.fixed_parts(space.shape, Precision.INT)
    latency, memory, weights = (torch.zeros(choice_shape(space)) for _ in range(3))
    for index, source in enumerate(first_alike(space.shape)):
        if source != index:
            for tensor in (latency, memory, weights):
                tensor[index] = tensor[source]
            continue
        block = space.shape.blocks[index]
        for place, layer in layer_choices(space, index):
            form = table.form(Precision.INT, layer)
            entry = table.block(block, layer, form.executed)
            latency[index][place] = entry.kv_ms + steps * entry.step_ms
            stored = Layer(layer.heads, layer.mlp, form.stored_bits, layer.a)
            weights[index][place] = block_bytes(space.shape, index, stored)
            memory[index][place] = fixed.weight_copies * weights[index][place] + fixed.block_workspace_bytes
        for tensor in (latency, memory, weights):
            repeat_last(tensor[index], len(space.head_choices[index]), len(space.mlp_choices[index]))
    activation = activation_tensor(space)
    return CostTensors(
        latency,
        memory,
        fixed.encoder_ms + steps * fixed.step_fixed_ms,
        fixed_bytes(space.shape) + workspace_bytes(table, fixed) + float(activation.max()),
        space,
        activation,
        None if fixed.cache is None else CachedTensors(weights, fixed.cache, steps),
    )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise CostError(f"steps: expected at least 1 denoising step, got {steps}")


def activation_bytes(block: BlockShape, heads: int, mlp: int) -> int:
    """Most bytes of float32 activations that one block holds at a time, batch 1.

    In attention those are the residual stream, its normalised copy, q, k, v and the scores; in the MLP the residual
    stream, its normalised copy and the hidden channels before and after the activation function. Integer codes take
    the place of floats, so bits do not matter.
    """
    stream = 2 * block.tokens * block.dim
    width = heads * block.head_dim
    attention = block.tokens * 3 * width + heads * block.tokens * max(block.tokens, block.memory_tokens)
    return FLOAT_BYTES * (stream + max(attention, 2 * block.tokens * mlp))


def block_bytes(shape: PolicyShape, index: int, layer: Layer, precision: Precision = Precision.INT) -> int:
    """Bytes that keeping block ``index`` with ``layer`` adds to :func:`training.space_counts.real_bytes`."""
    layers: list[Layer | None] = [None] * len(shape.blocks)
    empty = real_bytes(shape, Subnet(tuple(layers), precision))
    layers[index] = layer
    return real_bytes(shape, Subnet(tuple(layers), precision)) - empty


def fixed_bytes(shape: PolicyShape, precision: Precision = Precision.INT) -> int:
    """Bytes of everything outside the blocks."""
    return real_bytes(shape, Subnet((None,) * len(shape.blocks), precision))


def layer_choices(space: SearchSpace, block: int) -> Iterator[tuple[tuple[int, int, int, int], Layer]]:
    """Every choice of one block with its index in (H, M, W, A)."""
    for h, heads in enumerate(space.head_choices[block]):
        for m, mlp in enumerate(space.mlp_choices[block]):
            for i, w in enumerate(space.weight_bits):
                for j, a in enumerate(space.activation_bits):
                    yield (h, m, i, j), Layer(heads, mlp, w, a)


def choice_shape(space: SearchSpace) -> tuple[int, int, int, int, int]:
    """(L, H, M, W, A) of cost tensors of a space."""
    heads = max(len(choices) for choices in space.head_choices)
    widths = max(len(choices) for choices in space.mlp_choices)
    return len(space.shape.blocks), heads, widths, len(space.weight_bits), len(space.activation_bits)


def first_alike(shape: PolicyShape) -> list[int]:
    """For each block the index of the first block that differs from it in name only: equal blocks cost the same."""
    first: dict[BlockShape, int] = {}
    return [first.setdefault(replace(block, name=""), index) for index, block in enumerate(shape.blocks)]


def repeat_last(tensor: Tensor, heads: int, widths: int) -> Tensor:
    """Fill (..., H, M, W, A) behind a block's last head count and hidden width with copies of those."""
    tensor[..., heads:, :, :, :] = tensor[..., heads - 1 : heads, :, :, :]
    tensor[..., :, widths:, :, :] = tensor[..., :, widths - 1 : widths, :, :]
    return tensor


def activation_tensor(space: SearchSpace) -> Tensor:
    """(L, H, M) float32 bytes of :func:`activation_bytes`."""
    count, heads, widths, _, _ = choice_shape(space)
    result = torch.zeros(count, heads, widths)
    for i, block in enumerate(space.shape.blocks):
        for h in range(heads):
            for m in range(widths):
                offered_heads, offered_mlp = space.head_choices[i], space.mlp_choices[i]
                result[i, h, m] = activation_bytes(
                    block, offered_heads[min(h, len(offered_heads) - 1)], offered_mlp[min(m, len(offered_mlp) - 1)]
                )
    return result
