"""Randomised devices: cost tensors that make a device nobody measured look familiar to the configuration sampler.

Every device is a roofline whose peaks spread over orders of magnitude, with its own gain from integers and from four
bits (none, some, or a loss), tile sizes that turn widths into stairs, launches that hide the arithmetic, and noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from training.cost import (
    FLOAT_BYTES,
    CostTensors,
    activation_tensor,
    block_bytes,
    choice_shape,
    first_alike,
    fixed_bytes,
    layer_choices,
    repeat_last,
)
from training.roofline import FLOAT_KERNELS, block_work, up_to_tiles
from training.space import SearchSpace
from training.subnet import Layer

STEPS = (4, 8, 10, 16, 25, 50)
TILES = (1.0, 16.0, 64.0, 128.0)
_CHUNK = 256  # devices computed at a time: bounds the scratch memory


@dataclass(frozen=True, slots=True)
class _Devices:
    """Random devices (n,), float64 and SI units; ``gain`` (n, W, A) is the speed relative to float products."""

    compute: Tensor
    bandwidth: Tensor
    launch: Tensor
    gain: Tensor
    tile: Tensor
    packed: Tensor  # (n,) bool: weights below 8 bits are stored packed, otherwise in 8-bit containers
    noise: Tensor
    fixed: Tensor
    workspace: Tensor  # share of the largest network's bytes
    steps: Tensor


def synthetic_table(space: SearchSpace, generator: Generator, steps: int | None = None) -> CostTensors:
    """Draw one device; see :func:`synthetic_tensors`."""
    return synthetic_tensors(space, generator, 1, steps)[0]


def synthetic_tensors(space: SearchSpace, generator: Generator, n: int, steps: int | None = None) -> list[CostTensors]:
    """Draw ``n`` random devices.

    Args:
        space: the search space.
        generator: on the CPU; the same state gives the same devices.
        n: number of devices, at least 1.
        steps: denoising steps per chunk; drawn from ``STEPS`` for each device by default.

    Returns:
        One :class:`CostTensors` per device. Their tensors are views of two large ones.

    Raises:
        ValueError: ``n`` or ``steps`` is below 1.
    """
    for label, value in (("n", n), ("steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{label}: expected at least 1, got {value}")
    devices = _draw(space, generator, n, steps)
    shape = choice_shape(space)
    latency, memory = torch.empty(n, *shape), torch.empty(n, *shape)
    bytes_packed, bytes_contained = _block_bytes(space, packed=True), _block_bytes(space, packed=False)
    first = first_alike(space.shape)
    for index, source in enumerate(first):
        if source != index:
            latency[:, index], memory[:, index] = latency[:, source], memory[:, source]
            continue
        heads, widths = len(space.head_choices[index]), len(space.mlp_choices[index])
        for begin in range(0, n, _CHUNK):
            part = slice(begin, min(begin + _CHUNK, n))
            latency[part, index, :heads, :widths] = 1e3 * _block_seconds(space, index, devices, part).to(torch.float32)
        noise = torch.randn(n, *shape[1:], generator=generator, dtype=torch.float64)
        latency[:, index] *= torch.exp(devices.noise[:, None, None, None, None] * noise).to(torch.float32)
        memory[:, index] = torch.where(
            devices.packed[:, None, None, None, None], bytes_packed[index], bytes_contained[index]
        )
        repeat_last(latency[:, index], heads, widths)
    activation = activation_tensor(space)
    outside = fixed_bytes(space.shape)
    largest = outside + float(bytes_contained.amax(dim=(1, 2, 3, 4)).sum())
    fixed_latency = 1e3 * _fixed_seconds(space, devices)
    fixed_memory = outside + devices.workspace * largest + float(activation.max())
    return [
        CostTensors(latency[i], memory[i], float(fixed_latency[i]), float(fixed_memory[i]), space, activation)
        for i in range(n)
    ]


def _draw(space: SearchSpace, generator: Generator, n: int, steps: int | None) -> _Devices:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def log_uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.exp(math.log(low) + uniform(*shape) * (math.log(high) - math.log(low)))

    def one_of(values: tuple[float, ...]) -> Tensor:
        drawn = torch.randint(len(values), (n,), generator=generator)
        return torch.tensor(values, dtype=torch.float64)[drawn]

    weights, activations = len(space.weight_bits), len(space.activation_bits)
    # What fewer bits gain over the widest ones: nothing on a third of the devices, only where both operands are narrow
    # on another third (a kernel for whole 4-bit products), anything including a loss on the rest.
    free = log_uniform(0.4, 3.0, n, weights, activations)
    joint = torch.ones(n, weights, activations, dtype=torch.float64)
    narrow_w, narrow_a = (
        space.weight_bits.index(min(space.weight_bits)),
        space.activation_bits.index(min(space.activation_bits)),
    )
    joint[:, narrow_w, narrow_a] = log_uniform(1.0, 3.0, n)
    kind = torch.randint(3, (n,), generator=generator)[:, None, None]
    bits = torch.where(kind == 0, torch.ones_like(free), torch.where(kind == 1, joint, free))
    widest_w, widest_a = (
        space.weight_bits.index(max(space.weight_bits)),
        space.activation_bits.index(max(space.activation_bits)),
    )
    bits[:, widest_w, widest_a] = 1.0
    return _Devices(
        compute=log_uniform(1e10, 1e14, n),
        bandwidth=log_uniform(3e9, 3e12, n),
        launch=log_uniform(1e-7, 3e-5, n),
        gain=log_uniform(0.7, 8.0, n)[:, None, None] * bits,
        tile=one_of(TILES),
        packed=uniform(n) < 0.6,
        noise=log_uniform(0.002, 0.1, n),
        fixed=log_uniform(0.3, 3.0, n),
        workspace=log_uniform(0.01, 1.0, n),
        steps=one_of(tuple(float(s) for s in STEPS)) if steps is None else torch.full((n,), steps, dtype=torch.float64),
    )


def _block_seconds(space: SearchSpace, index: int, devices: _Devices, part: slice) -> Tensor:
    """Seconds per chunk (n, H, M, W, A) of one block on the devices in ``part``."""
    block = space.shape.blocks[index]
    work = block_work(block, space.head_choices[index], space.mlp_choices[index])
    tile = devices.tile[part, None, None, None]
    inputs, outputs = (up_to_tiles(sizes[None], tile) for sizes in (work.inputs, work.outputs))  # (n, H, M, K)
    compute, bandwidth = devices.compute[part], devices.bandwidth[part]
    flops = 2.0 * work.tokens * inputs * outputs
    # Layers that are not quantized gain nothing by fewer bits and are stored as what lies outside the blocks.
    quantized = work.quantized[:, None, None]  # (K, 1, 1)
    rate = compute[:, None, None, None] * torch.where(quantized, devices.gain[part, None], 1.0)  # (n, K, W, A)
    arithmetic = flops[..., None, None] / rate[:, None, None]
    bits = torch.tensor(space.weight_bits, dtype=torch.float64)
    stored = torch.where(devices.packed[part, None], bits, bits.clamp_min(8.0)) / 8.0  # (n, W) bytes
    stored = torch.where(quantized[..., 0], stored[:, None], space.shape.fixed_bits / 8.0)  # (n, K, W)
    moved = (inputs * outputs)[..., None] * stored[:, None, None] + (FLOAT_BYTES * work.tokens * (inputs + outputs))[
        ..., None
    ]
    moving = (moved / bandwidth[:, None, None, None, None])[..., None]
    seconds = torch.maximum(arithmetic, moving) + devices.launch[part, None, None, None, None, None]  # (n,H,M,K,W,A)
    runs = torch.where(work.per_chunk, 1.0, devices.steps[part, None])  # (n, K)
    linears = (seconds * runs[:, None, None, :, None, None]).sum(dim=3)
    step = work.attention_flops / compute[:, None] + FLOAT_KERNELS * devices.launch[part, None]  # (n, H)
    times = 1.0 if work.once else devices.steps[part, None]
    return linears + (times * step)[:, :, None, None, None]


def _fixed_seconds(space: SearchSpace, devices: _Devices) -> Tensor:
    """Seconds per chunk (n,) of what lies outside the blocks, at float precision."""
    shape = space.shape
    weights = FLOAT_BYTES * shape.fixed_parameters / devices.bandwidth + FLOAT_KERNELS * devices.launch
    chunk = torch.maximum(shape.fixed_flops_chunk / devices.compute, weights)
    step = shape.fixed_flops_step / devices.compute + FLOAT_KERNELS * devices.launch
    return devices.fixed * (chunk + devices.steps * step)


def _block_bytes(space: SearchSpace, packed: bool) -> Tensor:
    """(L, H, M, W, A) bytes that each choice adds; unpacked weights lie in containers of at least 8 bits."""
    result = torch.zeros(choice_shape(space))
    for index, source in enumerate(first_alike(space.shape)):
        if source != index:
            result[index] = result[source]
            continue
        for place, layer in layer_choices(space, index):
            stored = layer if packed else Layer(layer.heads, layer.mlp, max(layer.w, 8), layer.a)
            result[index][place] = block_bytes(space.shape, index, stored)
        repeat_last(result[index], len(space.head_choices[index]), len(space.mlp_choices[index]))
    return result
