"""DiffusionPolicy-T as the three ONNX graphs of a variant: encoder, timestep, denoiser.

B, T and S are symbolic. The work that depends neither on the noise level nor on the action tokens is in the encoder;
what depends on the noise level alone is a table over all training time steps. Neither is repeated at every denoising
step.
"""

from __future__ import annotations

import math

import torch
from onnx import TensorProto
from torch import nn

from training.export.graph import GraphBuilder, LinearWeights, concatenate
from training.nn.blocks import Attention, DecoderBlock
from training.policies.diffusion_policy_t import DiffusionPolicyT


def export_graphs(network: DiffusionPolicyT, train_timesteps: int) -> dict[str, bytes]:
    """Return the ``.onnx`` file per role for a full-precision or quantized network."""
    return {
        "encoder": encoder_graph(network),
        "timestep": timestep_graph(network, train_timesteps),
        "denoiser": denoiser_graph(network),
    }


def encoder_graph(network: DiffusionPolicyT) -> bytes:
    """``observation`` (B, To, Do) -> ``observation_kv`` (B, L, 2, H, To, D); inputs are normalised."""
    config = network.config
    head_dim = config.dim // config.heads
    shape = ("B", config.depth, 2, config.heads, config.observation_horizon, head_dim)
    g = GraphBuilder("encoder")
    x = g.input("observation", ("B", config.observation_horizon, config.observation_dim))
    embedding = LinearWeights.of(network.observation_embedding)
    x = g.linear(x, embedding, "observation_embedding", bias=False)
    position = network.memory_position.detach()[:, 1:].numpy() + embedding.bias  # one addition instead of two
    x = g.node("Add", [x, g.constant("memory_position", position)], "observation_tokens")
    x = g.linear(x, LinearWeights.of(network.memory_fc1), "memory_fc1")
    x = g.linear(g.node("Mish", [x], "memory_mish"), LinearWeights.of(network.memory_fc2), "memory_fc2")
    kv = concatenate(
        [
            LinearWeights.of(module)
            for block in network.decoder_blocks()
            for module in (block.cross_attn.k, block.cross_attn.v)
        ]
    )
    x = g.linear(x, kv, "cross_attn.kv")
    x = g.node("Reshape", [x, g.index(0, 0, *shape[1:4], head_dim)], "kv_heads")
    g.output(g.node("Transpose", [x], "observation_kv", perm=[0, 2, 3, 4, 1, 5]), shape)
    return g.serialize()


def timestep_graph(network: DiffusionPolicyT, train_timesteps: int) -> bytes:
    """``timesteps`` (S,) int64 -> ``timestep_kv`` (S, L, 2, H, 1, D), looked up in a table of every training time step.

    The table is smaller than the network that makes it, and holds what that network computes, quantized where it is.
    """
    with torch.inference_mode():
        table = network.timestep_keys_values(torch.arange(train_timesteps)).numpy()
    g = GraphBuilder("timestep")
    index = g.input("timesteps", ("S",), TensorProto.INT64)
    name = g.node("Gather", [g.constant("table", table), index], "timestep_kv", axis=0)
    g.output(name, ("S", *table.shape[1:]))
    return g.serialize()


def denoiser_graph(network: DiffusionPolicyT) -> bytes:
    """``noisy`` (B, T, Da), ``timestep_kv`` (1, L, 2, H, 1, D), ``observation_kv`` (B, L, 2, H, To, D) -> ``noise``.

    T is 1 to the horizon; masks and positions are cut to it.
    """
    config = network.config
    head_dim, memory = config.dim // config.heads, 1 + config.observation_horizon
    g = GraphBuilder("denoiser")
    noisy = g.input("noisy", ("B", "T", config.action_dim))
    timestep = g.input("timestep_kv", (1, config.depth, 2, config.heads, 1, head_dim))
    observed = g.input("observation_kv", ("B", config.depth, 2, config.heads, config.observation_horizon, head_dim))

    tokens = g.node("Shape", [noisy], "tokens", start=1, end=2)
    batch = g.node("Shape", [noisy], "batch", start=0, end=1)
    everywhere = g.node("Concat", [batch, g.index(1, 1, 1, 1, 1)], "batch_shape", axis=0)
    timestep = g.node("Expand", [timestep, everywhere], "timestep_kv_batch")
    kv = g.node("Concat", [timestep, observed], "kv", axis=4)
    kv = g.node("Reshape", [kv, g.index(0, config.depth * 2 * config.heads, memory, head_dim)], "kv_flat")
    names = [f"blocks.{i}.cross_attn.{part}" for i in range(config.depth) for part in ("keys", "values")]
    pairs = g.nodes("Split", [kv], names, "kv_split", axis=1, num_outputs=len(names))

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
    for i, block in enumerate(network.decoder_blocks()):
        x = _block(g, x, block, f"blocks.{i}", pairs[2 * i], pairs[2 * i + 1], self_mask, cross_mask)
    x = g.layer_norm(x, network.norm, "norm")
    x = g.linear(x, LinearWeights.of(network.head), "head", bias=False)
    bias = g.constant("head.bias", network.head.bias.detach().numpy())
    g.output(g.node("Add", [x, bias], "noise"), ("B", "T", config.action_dim))
    return g.serialize()


def _block(
    g: GraphBuilder, x: str, block: DecoderBlock, name: str, keys: str, values: str, self_mask: str, cross_mask: str
) -> str:
    """One pre-norm decoder block on (B, T, dim)."""
    attention, prefix = block.self_attn, f"{name}.self_attn"
    h = g.layer_norm(x, block.norm1, f"{name}.norm1")
    qkv = g.linear(
        h, concatenate([_query(attention), *(LinearWeights.of(m) for m in (attention.k, attention.v))]), f"{prefix}.qkv"
    )
    parts = g.nodes("Split", [qkv], [f"{prefix}.{p}" for p in "qkv"], f"{prefix}.split", axis=2, num_outputs=3)
    q, k, v = (_split_heads(g, part, attention.heads, attention.head_dim, part) for part in parts)
    x = g.node("Add", [x, _attend(g, q, k, v, self_mask, attention.o, prefix)], f"{prefix}.residual")

    attention, prefix = block.cross_attn, f"{name}.cross_attn"
    q = g.linear(g.layer_norm(x, block.norm2, f"{name}.norm2"), _query(attention), f"{prefix}.q")
    q = _split_heads(g, q, attention.heads, attention.head_dim, f"{prefix}.q")
    x = g.node("Add", [x, _attend(g, q, keys, values, cross_mask, attention.o, prefix)], f"{prefix}.residual")

    h = g.linear(g.layer_norm(x, block.norm3, f"{name}.norm3"), LinearWeights.of(block.fc1), f"{name}.fc1")
    h = g.linear(g.node("Gelu", [h], f"{name}.gelu"), LinearWeights.of(block.fc2), f"{name}.fc2")
    return g.node("Add", [x, h], f"{name}.residual")


def _query(attention: Attention) -> LinearWeights:
    """The query projection with the score scale 1/sqrt(D) folded in (exact where D is a power of four)."""
    return LinearWeights.of(attention.q).times(1.0 / math.sqrt(attention.head_dim))


def _split_heads(g: GraphBuilder, x: str, heads: int, head_dim: int, name: str) -> str:
    """(B, T, heads * D) -> (B, heads, T, D)."""
    x = g.node("Reshape", [x, g.index(0, 0, heads, head_dim)], f"{name}.heads")
    return g.node("Transpose", [x], f"{name}.heads_first", perm=[0, 2, 1, 3])


def _attend(g: GraphBuilder, q: str, k: str, v: str, mask: str, output: nn.Module, name: str) -> str:
    """Softmax attention of scaled queries in floating point and its output projection; result (B, T, dim)."""
    transposed = g.node("Transpose", [k], f"{name}.k_transposed", perm=[0, 1, 3, 2])
    scores = g.node("Add", [g.node("MatMul", [q, transposed], f"{name}.scores"), mask], f"{name}.masked")
    weights = g.node("Softmax", [scores], f"{name}.softmax", axis=-1)
    mixed = g.node(
        "Transpose", [g.node("MatMul", [weights, v], f"{name}.mixed")], f"{name}.mixed_last", perm=[0, 2, 1, 3]
    )
    merged = g.node("Reshape", [mixed, g.index(0, 0, -1)], f"{name}.merged")
    return g.linear(merged, LinearWeights.of(output), f"{name}.o")
