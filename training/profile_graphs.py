"""Networks of chosen blocks as ONNX graphs, for timing: what a robot would run, with random weights.

The graphs are the exporter's own, of blocks with random weights, so operators, quantizers and layouts are those of a
bundle, and any engine takes them. Keys and values of all blocks lie flat, (.., R, S, D) with R = 2 sum_l heads_l rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from ml_dtypes import float8_e4m3fn
from numpy.typing import NDArray
from torch import nn

from training.export.blocks import AttentionWeights, BlockWeights
from training.export.diffusion_policy_t import Rest, denoiser_graph, encoder_graph
from training.export.weights import INT8_CODES, InputGrid, LinearWeights, Rounding
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.quant.quantizer import code_range

Feeds = dict[str, NDArray[np.float32]]
_INT8_LARGEST, _FP8_LARGEST = 127.0, 448.0


INTEGER, FLOAT, HALF, FP8 = "int8", "float32", "float16", "float8"  # arithmetic that a runtime has for block's linears
INTEGER_A4 = "int8_a4"  # the first, but inputs are clipped to 4 bits before they are rounded: one more pass over them
_REST = {
    INTEGER: Rest.INT8,
    INTEGER_A4: Rest.INT8,
    FLOAT: Rest.FLOAT32,
    HALF: Rest.FLOAT16,
    FP8: Rest.FLOAT16,
}


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Heads and hidden channels of one block, and the arithmetic of its linears, one of those above."""

    heads: int
    mlp: int
    executed: str


class PolicyGraphs(Protocol):
    """Makes the graphs of one backbone.

    Attributes:
        step_linears: weights of a block that are multiplied at every denoising step, named after ``blocks.N.``.
    """

    step_linears: tuple[str, ...]

    def step(self, blocks: Sequence[BlockSize]) -> tuple[bytes, Feeds]:
        """The graph that runs at every denoising step, at batch 1, and its inputs."""
        ...

    def chunk(self, blocks: Sequence[BlockSize]) -> tuple[bytes, Feeds]:
        """The graph that runs once per chunk, at batch 1, and its inputs."""
        ...


class DiffusionPolicyTGraphs:
    """:class:`PolicyGraphs` of DiffusionPolicy-T with ``tokens`` action tokens."""

    step_linears: tuple[str, ...] = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "fc1", "fc2")

    def __init__(self, config: DiffusionPolicyTConfig, tokens: int, seed: int = 0) -> None:
        """Draw weights once for every size of a block.

        Raises:
            ValueError: ``tokens`` is outside 1 to the horizon.
        """
        if not 1 <= tokens <= config.horizon:
            raise ValueError(f"tokens: expected 1 to {config.horizon}, got {tokens}")
        self._config = config
        self._tokens = tokens
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._network = DiffusionPolicyT(config.model_copy(update={"depth": 1})).eval()
        self._head_dim = config.dim // config.heads
        self._random = np.random.default_rng(seed)
        self._blocks: dict[BlockSize, BlockWeights] = {}

    def step(self, blocks: Sequence[BlockSize]) -> tuple[bytes, Feeds]:
        """``noisy`` (1, T, Dn), ``timestep_kv`` (1, R, 1, D), ``observation_kv`` (1, R, To, D) -> ``noise``."""
        rows = 2 * sum(block.heads for block in blocks)
        feeds = {
            "noisy": self._draw(1, self._tokens, self._config.noisy_dim),
            "timestep_kv": self._draw(1, rows, 1, self._head_dim),
            "observation_kv": self._draw(1, rows, self._config.observation_horizon, self._head_dim),
        }
        return denoiser_graph(self._network, self._weights(blocks)), feeds

    def chunk(self, blocks: Sequence[BlockSize]) -> tuple[bytes, Feeds]:
        """``observation`` (1, To, Do) -> ``observation_kv`` (1, R, To, D)."""
        feeds = {"observation": self._draw(1, self._config.observation_horizon, self._config.observation_dim)}
        return encoder_graph(self._network, self._weights(blocks), rest_of(blocks)), feeds

    def _draw(self, *shape: int) -> NDArray[np.float32]:
        return self._random.standard_normal(shape, np.float32)

    def _weights(self, blocks: Sequence[BlockSize]) -> list[BlockWeights]:
        """Blocks of these sizes, every one with weights of its own and its own rounding of the memory tokens.

        ONNX Runtime keeps packed weights of equal contents once: equal blocks would stay in the processor's cache
        together and take up to a third less than blocks of a real network. And blocks that round the memory tokens
        alike would share one product for their keys and values, which those of a real integer network do not.
        """
        return [_different(self._block(size), index) for index, size in enumerate(blocks)]

    def _block(self, size: BlockSize) -> BlockWeights:
        """A block of that size, made once."""
        if size not in self._blocks:
            config, random = self._config, np.random.default_rng(0)

            def linear(inputs: int, outputs: int) -> LinearWeights:
                weight = np.float32(0.02) * random.standard_normal((inputs, outputs), np.float32)
                return _stored(LinearWeights(weight, np.zeros(outputs, np.float32)), size.executed)

            def attention() -> AttentionWeights:
                width = size.heads * self._head_dim
                q, k, v = (linear(config.dim, width) for _ in "qkv")
                return AttentionWeights(size.heads, self._head_dim, q, k, v, linear(width, config.dim))

            norm = nn.LayerNorm(config.dim)
            fc1, fc2 = linear(config.dim, size.mlp), linear(size.mlp, config.dim)
            self._blocks[size] = BlockWeights(norm, attention(), norm, attention(), norm, fc1, fc2)
        return self._blocks[size]


def rest_of(blocks: Sequence[BlockSize]) -> Rest:
    """How the exporter stores what lies outside blocks of this arithmetic."""
    return _REST[blocks[0].executed]


def _different(block: BlockWeights, index: int) -> BlockWeights:
    """The block with weights that no other ``index`` has, and a step of its own for the memory tokens."""

    def shifted(layer: LinearWeights) -> LinearWeights:
        return replace(layer, weight=np.roll(layer.weight, index, axis=0))

    def attention(part: AttentionWeights) -> AttentionWeights:
        return replace(part, q=shifted(part.q), k=shifted(part.k), v=shifted(part.v), o=shifted(part.o))

    def own_step(layer: LinearWeights) -> LinearWeights:
        if layer.grid is None or layer.grid.scale is None:
            return layer
        return replace(layer, grid=replace(layer.grid, scale=layer.grid.scale * np.float32(1.0 + 0.01 * index)))

    cross = attention(block.cross)
    return replace(
        block,
        self_attention=attention(block.self_attention),
        cross=replace(cross, k=own_step(cross.k), v=own_step(cross.v)),
        fc1=shifted(block.fc1),
        fc2=shifted(block.fc2),
    )


def _stored(plain: LinearWeights, executed: str) -> LinearWeights:
    """A linear as the exporter writes it for ``executed``; which steps it has does not matter for time."""
    step = np.array(0.02, np.float32)
    if executed in (INTEGER, INTEGER_A4):
        scale = np.abs(plain.weight).max(axis=0) / np.float32(_INT8_LARGEST)
        codes = np.rint(plain.weight / scale).astype(np.int8)
        low, high = INT8_CODES if executed == INTEGER else code_range(4)
        return LinearWeights(codes, plain.bias, scale, InputGrid(Rounding.INTEGER, step, low, high))
    if executed == HALF:
        return LinearWeights(plain.weight.astype(np.float16), plain.bias, None, InputGrid(Rounding.HALF))
    if executed == FP8:
        scale = np.abs(plain.weight).max(axis=0) / np.float32(_FP8_LARGEST)
        codes = (plain.weight / scale).astype(float8_e4m3fn)
        return LinearWeights(codes, plain.bias, scale, InputGrid(Rounding.FP8, step))
    if executed != FLOAT:
        raise ValueError(f"executed: expected one of {', '.join(_REST)}, got {executed}")
    return plain
