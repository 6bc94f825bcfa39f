"""Networks of chosen blocks as ONNX graphs, for timing: what a robot would run, with random weights.

The graphs are built of the exporter's own pieces, so operators, quantizers and layouts are those of a bundle, and any
engine takes them. Keys and values of all blocks lie flat, (.., R, S, D) with R = 2 sum_l heads_l rows.
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
from training.export.diffusion_policy_t import add_block
from training.export.graph import GraphBuilder
from training.export.weights import InputGrid, LinearWeights, Rounding, concatenate
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig

Feeds = dict[str, NDArray[np.float32]]
_INT8_LARGEST, _FP8_LARGEST = 127.0, 448.0


INTEGER, FLOAT, HALF, FP8 = (
    "int8",
    "float32",
    "float16",
    "float8",
)  # arithmetic that a runtime has for a block's linears


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Heads and hidden channels of one block, and the arithmetic of its linears, one of the four above."""

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
        """``noisy`` (1, T, Da), ``timestep_kv`` (1, R, 1, D), ``observation_kv`` (1, R, To, D) -> ``noise``."""
        config, network = self._config, self._network
        rows = 2 * sum(block.heads for block in blocks)
        g = GraphBuilder("denoiser")
        noisy = g.input("noisy", ("B", "T", config.action_dim))
        tokens = g.node("Shape", [noisy], "tokens", start=1, end=2)
        feeds = {"noisy": self._draw(1, self._tokens, config.action_dim)}
        pairs: list[str] = []
        if blocks:
            timestep = g.input("timestep_kv", (1, rows, 1, self._head_dim))
            observed = g.input("observation_kv", ("B", rows, config.observation_horizon, self._head_dim))
            feeds["timestep_kv"] = self._draw(1, rows, 1, self._head_dim)
            feeds["observation_kv"] = self._draw(1, rows, config.observation_horizon, self._head_dim)
            batch = g.node("Shape", [noisy], "batch", start=0, end=1)
            everywhere = g.node("Concat", [batch, g.index(1, 1, 1)], "batch_shape", axis=0)
            timestep = g.node("Expand", [timestep, everywhere], "timestep_kv_batch")
            kv = g.node("Concat", [timestep, observed], "kv", axis=2)
            names = [f"blocks.{i}.cross_attn.{part}" for i in range(len(blocks)) for part in ("keys", "values")]
            sizes = g.index(*(block.heads for block in blocks for _ in "kv"))
            pairs = g.nodes("Split", [kv, sizes], names, "kv_split", axis=1)
            both = g.node("Concat", [tokens, tokens], "tokens_twice", axis=0)
            self_mask = g.constant("self_mask_full", network.self_mask.numpy()[None, None])
            self_mask = g.node("Slice", [self_mask, g.index(0, 0), both, g.index(2, 3)], "self_mask")
            cross_mask = g.constant("cross_mask_full", network.cross_mask.numpy()[None, None])
            cross_mask = g.node("Slice", [cross_mask, g.index(0), tokens, g.index(2)], "cross_mask")
        embedding = LinearWeights.of(network.action_embedding)
        position = g.constant("action_position", network.action_position.detach()[0].numpy() + embedding.bias)
        position = g.node("Slice", [position, g.index(0), tokens, g.index(0)], "position")
        x = g.node("Add", [g.linear(noisy, embedding, "action_embedding", bias=False), position], "action_tokens")
        for i, block in enumerate(blocks):
            keys_values = (pairs[2 * i], pairs[2 * i + 1])
            x = add_block(g, x, self._weights(block, i), f"blocks.{i}", keys_values, self_mask, cross_mask)
        x = g.linear(g.layer_norm(x, network.norm, "norm"), LinearWeights.of(network.head), "head", bias=False)
        bias = g.constant("head.bias", network.head.bias.detach().numpy())
        g.output(g.node("Add", [x, bias], "noise"), ("B", "T", config.action_dim))
        return g.serialize(), feeds

    def chunk(self, blocks: Sequence[BlockSize]) -> tuple[bytes, Feeds]:
        """``observation`` (1, To, Do) -> ``observation_kv`` (1, R, To, D); without blocks the memory tokens."""
        config, network = self._config, self._network
        g = GraphBuilder("encoder")
        x = g.input("observation", ("B", config.observation_horizon, config.observation_dim))
        feeds = {"observation": self._draw(1, config.observation_horizon, config.observation_dim)}
        embedding = LinearWeights.of(network.observation_embedding)
        x = g.linear(x, embedding, "observation_embedding", bias=False)
        position = network.memory_position.detach()[:, 1:].numpy() + embedding.bias
        x = g.node("Add", [x, g.constant("memory_position", position)], "observation_tokens")
        x = g.linear(x, LinearWeights.of(network.memory_fc1), "memory_fc1")
        x = g.linear(g.node("Mish", [x], "memory_mish"), LinearWeights.of(network.memory_fc2), "memory_fc2")
        if not blocks:
            g.output(x, ("B", config.observation_horizon, config.dim))
            return g.serialize(), feeds
        attentions = [self._weights(block, i).cross for i, block in enumerate(blocks)]
        kv = concatenate([part for attention in attentions for part in (attention.k, attention.v)])
        x = g.linear(x, kv, "cross_attn.kv")
        rows = 2 * sum(block.heads for block in blocks)
        x = g.node("Reshape", [x, g.index(0, 0, rows, self._head_dim)], "kv_heads")
        x = g.node("Transpose", [x], "observation_kv", perm=[0, 2, 1, 3])
        g.output(x, ("B", rows, config.observation_horizon, self._head_dim))
        return g.serialize(), feeds

    def _draw(self, *shape: int) -> NDArray[np.float32]:
        return self._random.standard_normal(shape, np.float32)

    def _weights(self, size: BlockSize, index: int) -> BlockWeights:
        """A block of that size, whose weights differ from those of every other ``index``.

        ONNX Runtime keeps packed weights of equal contents once: equal blocks would stay in the processor's cache
        together and take up to a third less than blocks of a real network.
        """
        block = self._block(size)

        def shifted(layer: LinearWeights) -> LinearWeights:
            return replace(layer, weight=np.roll(layer.weight, index, axis=0))

        def attention(part: AttentionWeights) -> AttentionWeights:
            return replace(part, q=shifted(part.q), k=shifted(part.k), v=shifted(part.v), o=shifted(part.o))

        return replace(
            block,
            self_attention=attention(block.self_attention),
            cross=attention(block.cross),
            fc1=shifted(block.fc1),
            fc2=shifted(block.fc2),
        )

    def _block(self, size: BlockSize) -> BlockWeights:
        """A block of that size, made once."""
        if size not in self._blocks:
            config, generator = self._config, torch.Generator().manual_seed(0)

            def linear(inputs: int, outputs: int) -> LinearWeights:
                layer = nn.Linear(inputs, outputs)
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
                nn.init.zeros_(layer.bias)
                return _stored(layer, size.executed)

            width = size.heads * self._head_dim
            projection, output = linear(config.dim, width), linear(width, config.dim)
            attention = AttentionWeights(size.heads, self._head_dim, projection, projection, projection, output)
            norm = nn.LayerNorm(config.dim)
            fc1, fc2 = linear(config.dim, size.mlp), linear(size.mlp, config.dim)
            self._blocks[size] = BlockWeights(norm, attention, norm, attention, norm, fc1, fc2)
        return self._blocks[size]


def _stored(layer: nn.Linear, executed: str) -> LinearWeights:
    """A linear as the exporter writes it for ``executed``; which steps it has does not matter for time."""
    plain, step = LinearWeights.of(layer), np.float32(0.02)
    if executed == INTEGER:
        scale = np.abs(plain.weight).max(axis=0) / np.float32(_INT8_LARGEST)
        codes = np.rint(plain.weight / scale).astype(np.int8)
        return LinearWeights(codes, plain.bias, scale, InputGrid(Rounding.INTEGER, np.array(step)))
    if executed == HALF:
        return LinearWeights(plain.weight.astype(np.float16), plain.bias, None, InputGrid(Rounding.HALF))
    if executed == FP8:
        scale = np.abs(plain.weight).max(axis=0) / np.float32(_FP8_LARGEST)
        codes = (plain.weight / scale).astype(float8_e4m3fn)
        return LinearWeights(codes, plain.bias, scale, InputGrid(Rounding.FP8, np.array(step)))
    if executed != FLOAT:
        raise ValueError(f"executed: expected one of {INTEGER}, {FLOAT}, {HALF}, {FP8}, got {executed}")
    return plain
