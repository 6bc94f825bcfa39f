"""The decoder blocks of a network, whatever it is made of, as what a graph needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from training.export.weights import LinearWeights, elastic_weights
from training.nn.blocks import Attention, DecoderBlock
from training.nn.elastic import Arithmetic, Bits, ElasticAttention, ElasticDecoderBlock, ElasticLinear, InputQuantizer
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Projections of ``heads`` heads of ``head_dim`` channels each."""

    heads: int
    head_dim: int
    q: LinearWeights
    k: LinearWeights
    v: LinearWeights
    o: LinearWeights


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One pre-norm decoder block."""

    norm1: nn.LayerNorm
    self_attention: AttentionWeights
    norm2: nn.LayerNorm
    cross: AttentionWeights
    norm3: nn.LayerNorm
    fc1: LinearWeights
    fc2: LinearWeights


def blocks_of(network: DiffusionPolicyT) -> list[BlockWeights]:
    """The blocks that run, in order.

    Raises:
        ValueError: a supernet whose active subnet is not the whole network: extract the subnet first.
    """
    if not isinstance(network, ElasticDiffusionPolicyT):
        return [plain_block(block) for block in network.decoder_blocks()]
    blocks = network.elastic_blocks()
    plan = network.plan()
    if [index for index, _, _ in plan] != list(range(len(blocks))) or any(
        (width.heads, width.mlp) != size for (_, width, _), size in zip(plan, network.sizes, strict=True)
    ):
        raise ValueError("only a part of the network is active; extract the subnet and export that")
    return [_elastic_block(blocks[index], width.arithmetic, bits) for index, width, bits in plan]


def plain_block(block: DecoderBlock) -> BlockWeights:
    """A block of full precision, or one with post-training quantized linears."""

    def attention(module: Attention) -> AttentionWeights:
        q, k, v, o = (LinearWeights.of(part) for part in (module.q, module.k, module.v, module.o))
        return AttentionWeights(module.heads, module.head_dim, q, k, v, o)

    return BlockWeights(
        block.norm1,
        attention(block.self_attn),
        block.norm2,
        attention(block.cross_attn),
        block.norm3,
        LinearWeights.of(block.fc1),
        LinearWeights.of(block.fc2),
    )


def _elastic_block(block: ElasticDecoderBlock, arithmetic: Arithmetic, bits: Bits) -> BlockWeights:
    def linear(module: ElasticLinear, quantizer: InputQuantizer) -> LinearWeights:
        return elastic_weights(module, quantizer, arithmetic, bits)

    def attention(module: ElasticAttention, queries: InputQuantizer, memory: InputQuantizer) -> AttentionWeights:
        return AttentionWeights(
            module.q.out_features // module.head_dim,
            module.head_dim,
            linear(module.q, queries),
            linear(module.k, memory),
            linear(module.v, memory),
            linear(module.o, module.output_input),
        )

    return BlockWeights(
        block.norm1,
        attention(block.self_attn, block.self_input, block.self_input),
        block.norm2,
        attention(block.cross_attn, block.cross_input, block.memory_input),
        block.norm3,
        linear(block.fc1, block.fc1_input),
        linear(block.fc2, block.fc2_input),
    )
