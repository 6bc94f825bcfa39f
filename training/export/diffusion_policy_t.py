"""DiffusionPolicy-T, whole or a subnet of its supernet, as the three ONNX graphs of a variant.

B, T and S are symbolic. The work that depends neither on the noise level nor on the action tokens is in the encoder;
what depends on the noise level alone is a table over all training time steps. Neither is repeated at every denoising
step. Keys and values lie in flat rows (``dcqfa_ros.runtime.engine``), because the blocks of a subnet keep different
numbers of heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from training.export.blocks import AttentionWeights, BlockWeights, blocks_of
from training.export.graph import GraphBuilder
from training.export.weights import LinearWeights, alike, concatenate, stored_in_8_bits, stored_in_half
from training.policies.diffusion_policy_t import DiffusionPolicyT


class Rest(Enum):
    """How what lies outside the blocks is stored: the memory MLP and the table of the time token's keys and values.

    They are computed in float32 whichever it is. The embeddings and the final layer are small and stay as they are.
    """

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"  # one scale per output channel

    def stored(self, layer: LinearWeights) -> LinearWeights:
        """The layer, stored so."""
        return {Rest.FLOAT32: lambda x: x, Rest.FLOAT16: stored_in_half, Rest.INT8: stored_in_8_bits}[self](layer)

    def stored_table(self, table: NDArray[np.float32]) -> LinearWeights:
        """The table (S, R, 1, D), stored so, as if it were a weight (S, R * D)."""
        return self.stored(LinearWeights(table.reshape(len(table), -1), np.zeros(0, np.float32)))


def export_graphs(network: DiffusionPolicyT, train_timesteps: int, rest: Rest = Rest.FLOAT32) -> dict[str, bytes]:
    """Return the ``.onnx`` file per role for a full-precision or quantized network, or an extracted subnet."""
    blocks = blocks_of(network)
    return {
        "encoder": encoder_graph(network, blocks, rest),
        "timestep": timestep_graph(network, train_timesteps, rest),
        "denoiser": denoiser_graph(network, blocks),
    }


def encoder_graph(network: DiffusionPolicyT, blocks: Sequence[BlockWeights], rest: Rest) -> bytes:
    """``observation`` (B, To, Do) -> ``observation_kv`` (B, R, To, D); inputs are normalised."""
    config = network.config
    rows, head_dim = sum(2 * block.cross.heads for block in blocks), config.dim // config.heads
    g = GraphBuilder("encoder")
    x = g.input("observation", ("B", config.observation_horizon, config.observation_dim))
    embedding = LinearWeights.of(network.observation_embedding)
    x = g.linear(x, embedding, "observation_embedding", bias=False)
    position = network.memory_position.detach()[:, 1:].numpy() + embedding.bias  # one addition instead of two
    x = g.node("Add", [x, g.constant("memory_position", position)], "observation_tokens")
    x = g.linear(x, rest.stored(LinearWeights.of(network.memory_fc1)), "memory_fc1")
    x = g.node("Mish", [x], "memory_mish")
    x = g.linear(x, rest.stored(LinearWeights.of(network.memory_fc2)), "memory_fc2")
    pairs = [[block.cross.k, block.cross.v] for block in blocks]
    if alike([part for pair in pairs for part in pair]):
        x = g.linear(x, concatenate([part for pair in pairs for part in pair]), MERGED_KV)
    else:  # every block rounds the memory tokens in its own way
        parts = [g.linear(x, concatenate(pair), f"blocks.{i}.cross_attn.kv") for i, pair in enumerate(pairs)]
        x = g.node("Concat", parts, MERGED_KV, axis=2)
    x = g.node("Reshape", [x, g.index(0, 0, rows, head_dim)], "kv_heads")
    g.output(
        g.node("Transpose", [x], "observation_kv", perm=[0, 2, 1, 3]),
        ("B", rows, config.observation_horizon, head_dim),
    )
    return g.serialize()


MERGED_KV = "cross_attn.kv"


def graph_weights(layer: str) -> tuple[str, ...]:
    """Names that the weight of a network's linear ``layer`` may have in the graphs, where it may be merged."""
    parent, _, child = layer.rpartition(".")
    if parent.endswith("self_attn") and child in "qkv":
        return (f"{parent}.qkv.weight",)
    if parent.endswith("cross_attn") and child in "kv":
        return f"{MERGED_KV}.weight", f"{parent}.kv.weight"
    return (f"{layer}.weight",)


def timestep_graph(network: DiffusionPolicyT, train_timesteps: int, rest: Rest) -> bytes:
    """``timesteps`` (S,) int64 -> ``timestep_kv`` (S, R, 1, D), looked up in a table of every training time step.

    The table is smaller than the network that makes it, and holds what that network computes, quantized where it is.
    """
    with torch.inference_mode():
        return table_graph(network.timestep_keys_values(torch.arange(train_timesteps)).numpy(), rest)


def table_graph(table: NDArray[np.float32], rest: Rest) -> bytes:
    """:func:`timestep_graph` of a given table (S, R, 1, D)."""
    stored, shape = rest.stored_table(table), table.shape[1:]
    g = GraphBuilder("timestep")
    index = g.input("timesteps", ("S",), TensorProto.INT64)
    if rest is Rest.FLOAT32:
        name = g.node("Gather", [g.constant("table", table), index], "timestep_kv", axis=0)
    else:
        rows = g.node("Gather", [g.constant("table", stored.weight), index], "timestep_stored", axis=0)
        if stored.weight_scale is None:
            flat = g.node("Cast", [rows], "timestep_flat", to=TensorProto.FLOAT)
        else:
            scale = g.constant("table_scale", stored.weight_scale)
            flat = g.node("DequantizeLinear", [rows, scale], "timestep_flat", axis=1)
        name = g.node("Reshape", [flat, g.index(0, *shape)], "timestep_kv")
    g.output(name, ("S", *shape))
    return g.serialize()


def denoiser_graph(network: DiffusionPolicyT, blocks: Sequence[BlockWeights]) -> bytes:
    """``noisy`` (B, T, Dn), ``timestep_kv`` (1, R, 1, D), ``observation_kv`` (B, R, To, D) -> ``noise`` (B, T, Da).

    T is 1 to the horizon; masks and positions are cut to it.
    """
    config = network.config
    rows, head_dim = sum(2 * block.cross.heads for block in blocks), config.dim // config.heads
    g = GraphBuilder("denoiser")
    noisy = g.input("noisy", ("B", "T", config.noisy_dim))
    timestep = g.input("timestep_kv", (1, rows, 1, head_dim))
    observed = g.input("observation_kv", ("B", rows, config.observation_horizon, head_dim))

    tokens = g.node("Shape", [noisy], "tokens", start=1, end=2)
    batch = g.node("Shape", [noisy], "batch", start=0, end=1)
    everywhere = g.node("Concat", [batch, g.index(1, 1, 1)], "batch_shape", axis=0)
    timestep = g.node("Expand", [timestep, everywhere], "timestep_kv_batch")
    kv = g.node("Concat", [timestep, observed], "kv", axis=2)
    names = [f"blocks.{i}.cross_attn.{part}" for i in range(len(blocks)) for part in ("keys", "values")]
    sizes = g.index(*(block.cross.heads for block in blocks for _ in "kv"))
    pairs = g.nodes("Split", [kv, sizes], names, "kv_split", axis=1)

    both = g.node("Concat", [tokens, tokens], "tokens_twice", axis=0)
    self_mask = g.constant("self_mask_full", network.self_mask.numpy()[None, None])
    self_mask = g.node("Slice", [self_mask, g.index(0, 0), both, g.index(2, 3)], "self_mask")
    cross_mask = g.constant("cross_mask_full", network.cross_mask.numpy()[None, None])
    cross_mask = g.node("Slice", [cross_mask, g.index(0), tokens, g.index(2)], "cross_mask")

    embedding = LinearWeights.of(network.action_embedding)
    position = network.action_position.detach()[0].numpy() + embedding.bias  # one addition instead of two
    position_name = g.constant("action_position", position)
    position_name = g.node("Slice", [position_name, g.index(0), tokens, g.index(0)], "position")
    x = g.node("Add", [g.linear(noisy, embedding, "action_embedding", bias=False), position_name], "action_tokens")
    for i, block in enumerate(blocks):
        x = add_block(g, x, block, f"blocks.{i}", (pairs[2 * i], pairs[2 * i + 1]), self_mask, cross_mask)
    x = g.layer_norm(x, network.norm, "norm")
    x = g.linear(x, LinearWeights.of(network.head), "head", bias=False)
    bias = g.constant("head.bias", network.head.bias.detach().numpy())
    g.output(g.node("Add", [x, bias], "noise"), ("B", "T", config.action_dim))
    return g.serialize()


def add_block(
    g: GraphBuilder,
    x: str,
    block: BlockWeights,
    name: str,
    keys_values: tuple[str, str],
    self_mask: str,
    cross_mask: str,
) -> str:
    """Add one pre-norm decoder block on (B, T, dim) and return the name of its result."""
    attention, prefix = block.self_attention, f"{name}.self_attn"
    query, factor = _query(attention)
    h = g.layer_norm(x, block.norm1, f"{name}.norm1")
    qkv = g.linear(h, concatenate([query, attention.k, attention.v]), f"{prefix}.qkv")
    parts = g.nodes("Split", [qkv], [f"{prefix}.{p}" for p in "qkv"], f"{prefix}.split", axis=2, num_outputs=3)
    q, k, v = (_split_heads(g, part, attention.heads, attention.head_dim, part) for part in parts)
    x = g.node(
        "Add", [x, _attend(g, _scaled(g, q, factor), k, v, self_mask, attention.o, prefix)], f"{prefix}.residual"
    )

    attention, prefix = block.cross, f"{name}.cross_attn"
    query, factor = _query(attention)
    q = g.linear(g.layer_norm(x, block.norm2, f"{name}.norm2"), query, f"{prefix}.q")
    q = _scaled(g, _split_heads(g, q, attention.heads, attention.head_dim, f"{prefix}.q"), factor)
    x = g.node("Add", [x, _attend(g, q, *keys_values, cross_mask, attention.o, prefix)], f"{prefix}.residual")

    h = g.linear(g.layer_norm(x, block.norm3, f"{name}.norm3"), block.fc1, f"{name}.fc1")
    h = g.linear(g.node("Gelu", [h], f"{name}.gelu"), block.fc2, f"{name}.fc2")
    return g.node("Add", [x, h], f"{name}.residual")


def _query(attention: AttentionWeights) -> tuple[LinearWeights, float]:
    """The query projection, and the factor its queries are still to be multiplied by.

    The score scale 1/sqrt(D) is folded in (exact where D is a power of four), except in float16 weights.
    """
    factor = 1.0 / math.sqrt(attention.head_dim)
    return (attention.q, factor) if attention.q.weight.dtype == np.float16 else (attention.q.times(factor), 1.0)


def _scaled(g: GraphBuilder, q: str, factor: float) -> str:
    if factor == 1.0:
        return q
    return g.node("Mul", [q, g.constant("score_scale", np.float32(factor))], f"{q}.scaled")


def _split_heads(g: GraphBuilder, x: str, heads: int, head_dim: int, name: str) -> str:
    """(B, T, heads * D) -> (B, heads, T, D)."""
    x = g.node("Reshape", [x, g.index(0, 0, heads, head_dim)], f"{name}.heads")
    return g.node("Transpose", [x], f"{name}.heads_first", perm=[0, 2, 1, 3])


def _attend(g: GraphBuilder, q: str, k: str, v: str, mask: str, output: LinearWeights, name: str) -> str:
    """Softmax attention of scaled queries in floating point and its output projection; result (B, T, dim)."""
    transposed = g.node("Transpose", [k], f"{name}.k_transposed", perm=[0, 1, 3, 2])
    scores = g.node("Add", [g.node("MatMul", [q, transposed], f"{name}.scores"), mask], f"{name}.masked")
    weights = g.node("Softmax", [scores], f"{name}.softmax", axis=-1)
    mixed = g.node(
        "Transpose", [g.node("MatMul", [weights, v], f"{name}.mixed")], f"{name}.mixed_last", perm=[0, 2, 1, 3]
    )
    merged = g.node("Reshape", [mixed, g.index(0, 0, -1)], f"{name}.merged")
    return g.linear(merged, output, f"{name}.o")
