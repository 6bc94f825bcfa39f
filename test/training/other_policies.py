"""Two small policies of other families, written against :class:`ElasticPolicy` alone.

One has gated MLPs without any bias behind a tower of fixed size, the other an encoder that a decoder looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from training.nn.elastic import (
    Bits,
    ElasticAttention,
    ElasticBlock,
    ElasticDecoderBlock,
    ElasticLinear,
    InputQuantizer,
    Units,
    Width,
)
from training.nn.elastic_policy import ElasticPolicy
from training.policy_shape import BlockShape, LinearShape, PolicyShape, Slice
from training.quant.elastic_calibration import calibrate_inputs, calibrate_weights

DIM, HEADS, HEAD_DIM, MLP, TOKENS, INPUTS, ACTIONS = 16, 4, 4, 32, 5, 6, 3
Sizes = Sequence[tuple[int, int]]
Kept = Sequence[tuple[int, tuple[int, int]]]


class SelfAttentionBlock(ElasticBlock):
    """Norm, attention, norm, MLP: with biases and GELU, or gated and without any bias."""

    def __init__(self, heads: int, mlp: int, *, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = ((nn.RMSNorm if gated else nn.LayerNorm)(DIM) for _ in range(2))
        self.attn = ElasticAttention(DIM, heads, HEAD_DIM, 0.0, bias=not gated)
        self.gate = ElasticLinear(DIM, mlp, bias=False) if gated else None
        self.up = ElasticLinear(DIM, mlp, bias=not gated)
        self.down = ElasticLinear(mlp, DIM, bias=not gated)
        self.attn_input, self.up_input, self.down_input = (InputQuantizer() for _ in range(3))

    def units(self) -> dict[str, Units]:
        producers = (self.up,) if self.gate is None else (self.gate, self.up)
        return {"heads": self.attn.units(), "channels": Units(producers, (self.down,))}

    def forward(self, x: Tensor, mask: Tensor, width: Width, bits: Bits) -> Tensor:
        codes, scale = self.attn_input(self.norm1(x), width.arithmetic, bits)
        q = self.attn.queries(codes, scale, width, bits)
        keys, values = self.attn.keys_values(codes, scale, width, bits)
        x = x + self.attn.attend(q, keys, values, mask, width, bits)
        codes, scale = self.up_input(self.norm2(x), width.arithmetic, bits)
        hidden = self.up.apply_to(codes, scale, width.arithmetic, bits, width.mlp, DIM)
        if self.gate is None:
            hidden = nn.functional.gelu(hidden)
        else:
            gate = self.gate.apply_to(codes, scale, width.arithmetic, bits, width.mlp, DIM)
            hidden = nn.functional.silu(gate) * hidden
        codes, scale = self.down_input(hidden, width.arithmetic, bits)
        return x + self.down.apply_to(codes, scale, width.arithmetic, bits, DIM, width.mlp)


def linears(attention: str, mlp: Sequence[tuple[str, Slice, Slice]], bias: bool, memory: bool) -> list[LinearShape]:
    """Linear layers of a block as it declares them."""
    inner, shapes = HEADS * HEAD_DIM, []
    for name in (attention, "cross_attn") if memory else (attention,):
        shapes += [LinearShape(f"{name}.{p}", DIM, inner, "full", "heads", bias, "step", TOKENS) for p in "qkv"]
        shapes.append(LinearShape(f"{name}.o", inner, DIM, "heads", "full", bias, "step", TOKENS))
    sizes = {"full": DIM, "mlp": MLP}
    for name, rows_in, rows_out in mlp:
        shapes.append(LinearShape(name, sizes[rows_in], sizes[rows_out], rows_in, rows_out, bias, "step", TOKENS))
    return shapes


def declared(name: str, kind: str, shapes: Sequence[LinearShape], memory: int = 0, elastic: bool = True) -> BlockShape:
    """A block; its kind is its group, too."""
    floats = 2 * DIM
    return BlockShape(name, kind, kind, DIM, HEADS, HEAD_DIM, MLP, TOKENS, memory, tuple(shapes), floats, elastic)


class TinyLlama(ElasticPolicy):
    """Blocks without bias behind a tower whose size is fixed; reads (B, T, INPUTS), answers (B, T, ACTIONS)."""

    mask: Tensor

    def __init__(self, towers: Sizes = ((HEADS, MLP),) * 2, layers: Sizes = ((HEADS, MLP),) * 4) -> None:
        super().__init__()
        self.counts, self.sizes = (len(towers), len(layers)), (*towers, *layers)
        self.embedding = nn.Linear(INPUTS, DIM)
        self.vision = nn.ModuleDict({"blocks": nn.ModuleList(SelfAttentionBlock(*s, gated=False) for s in towers)})
        self.layers = nn.ModuleList(SelfAttentionBlock(*s, gated=True) for s in layers)
        self.norm = nn.RMSNorm(DIM)
        self.head = nn.Linear(DIM, ACTIONS)
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), -1e4).triu(1), persistent=False)
        self.begin()

    @property
    def shape(self) -> PolicyShape:
        tower = linears("attn", [("up", "full", "mlp"), ("down", "mlp", "full")], True, False)
        gated = linears("attn", [("gate", "full", "mlp"), ("up", "full", "mlp"), ("down", "mlp", "full")], False, False)
        blocks = [declared(f"vision.blocks.{i}", "tower", tower, elastic=False) for i in range(self.counts[0])]
        blocks += [declared(f"layers.{i}", "llama", gated) for i in range(self.counts[1])]
        return PolicyShape("tiny_llama", tuple(blocks), INPUTS * DIM + DIM * ACTIONS, 100, 100, fixed_bits=16)

    def blueprint(self, kept: Kept) -> Callable[[], TinyLlama]:
        towers, layers = ([s for i, s in kept if (i < self.counts[0]) is tower] for tower in (True, False))
        return partial(TinyLlama, towers, layers)

    def forward(self, tokens: Tensor) -> Tensor:
        x, blocks = self.embedding(tokens), self.elastic_blocks()
        for index, width, bits in self.plan():
            mask = self.mask.new_zeros(()) if index < self.counts[0] else self.mask
            x = blocks[index](x, mask, width, bits)
        return self.head(self.norm(x))


class TinyMdt(ElasticPolicy):
    """An encoder of the context and a decoder of noisy actions that looks at it; two groups of elastic depth."""

    mask: Tensor

    def __init__(self, encoder: Sizes = ((HEADS, MLP),) * 2, decoder: Sizes = ((HEADS, MLP),) * 3) -> None:
        super().__init__()
        self.counts, self.sizes = (len(encoder), len(decoder)), (*encoder, *decoder)
        self.context, self.actions = nn.Linear(INPUTS, DIM), nn.Linear(ACTIONS, DIM)
        self.encoder = nn.ModuleList(SelfAttentionBlock(*s, gated=False) for s in encoder)
        self.decoder = nn.ModuleList(ElasticDecoderBlock(DIM, h, HEAD_DIM, m, 0.0) for h, m in decoder)
        self.head = nn.Linear(DIM, ACTIONS)
        self.register_buffer("mask", torch.zeros(TOKENS, TOKENS), persistent=False)
        self.begin()

    @property
    def shape(self) -> PolicyShape:
        encoder = linears("attn", [("up", "full", "mlp"), ("down", "mlp", "full")], True, False)
        decoder = linears("self_attn", [("fc1", "full", "mlp"), ("fc2", "mlp", "full")], True, True)
        blocks = [declared(f"encoder.{i}", "encoder", encoder) for i in range(self.counts[0])]
        blocks += [declared(f"decoder.{i}", "decoder", decoder, TOKENS) for i in range(self.counts[1])]
        return PolicyShape("tiny_mdt", tuple(blocks), 2 * INPUTS * DIM, 100, 100)

    def blueprint(self, kept: Kept) -> Callable[[], TinyMdt]:
        encoder, decoder = ([s for i, s in kept if (i < self.counts[0]) is first] for first in (True, False))
        return partial(TinyMdt, encoder, decoder)

    def forward(self, context: Tensor, noisy: Tensor) -> Tensor:
        memory, x, blocks = self.context(context), self.actions(noisy), self.elastic_blocks()
        for index, width, bits in self.plan():
            if index < self.counts[0]:
                memory = blocks[index](memory, self.mask, width, bits)
            else:
                x = blocks[index](x, memory, self.mask, self.mask, width, bits)
        return self.head(x)


def arguments(policy: ElasticPolicy, batch: int = 3, seed: int = 1) -> tuple[Tensor, ...]:
    """What ``policy`` is called with."""
    generator = torch.Generator().manual_seed(seed)
    channels = (INPUTS,) if policy.shape.backbone == "tiny_llama" else (INPUTS, ACTIONS)
    return tuple(torch.randn(batch, TOKENS, count, generator=generator) for count in channels)


@torch.no_grad()
def calibrated(policy: ElasticPolicy) -> ElasticPolicy:
    """``policy`` with random weights of visible size and fitted quantizers."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if not name.endswith("log_step") and "norm" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / DIM**0.5)
    calibrate_weights(policy)
    calibrate_inputs(policy, [arguments(policy, 16, seed) for seed in range(2, 5)])
    return policy.eval()
