"""Transformer blocks of the policies: separate q, k, v linears so that heads and MLP channels can be sliced later."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention with separate q, k, v and output projections.

    The attention products stay in floating point in every variant (``algorithms.md`` section 1); only the four linears
    are ever quantized.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        """Make the projections of ``heads`` heads on ``dim`` channels; ``dropout`` acts on the attention weights."""
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.head_dim = dim // heads
        self.dropout = dropout
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, H * D) -> (B, H, T, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Project ``memory`` (B, S, dim) to keys and values, each (B, H, S, D)."""
        return self.split_heads(self.k(memory)), self.split_heads(self.v(memory))

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attend from ``x`` (B, T, dim) to keys and values (B, H, S, D) under an additive mask (T, S)."""
        q = self.split_heads(self.q(x)) * (1.0 / math.sqrt(self.head_dim))
        weights = torch.softmax(q @ keys.transpose(-1, -2) + mask.to(q.dtype), dim=-1).to(values.dtype)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        return self.o((weights @ values).transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Attend from ``x`` (B, T, dim) to ``memory`` (B, S, dim) under an additive ``mask`` (T, S)."""
        keys, values = self.keys_values(memory)
        return self.attend(x, keys, values, mask)


class DecoderBlock(nn.Module):
    """Pre-norm decoder block: causal self-attention, cross-attention, GELU MLP."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, attention_dropout: float) -> None:
        """Make a block on ``dim`` channels."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads, attention_dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = Attention(dim, heads, attention_dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, self_mask: Tensor, cross_mask: Tensor) -> Tensor:
        """Run the block on ``x`` (B, T, dim) with the memory's ``keys`` and ``values`` (B, H, S, D)."""
        h = self.norm1(x)
        x = x + self.self_attn(h, h, self_mask)
        x = x + self.cross_attn.attend(self.norm2(x), keys, values, cross_mask)
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm3(x))))
