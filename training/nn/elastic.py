"""Elastic, quantizable transformer layers: one set of full-size parameters that runs at any width and bit width.

A layer is executed with a prefix of its heads and of its hidden channels, as views of the full parameters, and in one
of several arithmetics. Bits change no shape and copy nothing: the step sets of all bit widths lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from training.quant.batchquant import BatchQuant
from training.quant.fp8 import fp8_codes, fp8_scale
from training.quant.lsq import lsq_codes, lsq_product_codes, rescale, weight_range
from training.quant.quantizer import BITS, code_range


class Arithmetic(Enum):
    """How the linear layers of a block are executed."""

    FLOAT = "float"
    HALF = "half"  # weights and inputs rounded to float16
    FP8 = "fp8"  # E4M3 codes, scales from the full tensor
    INTEGER = "integer"  # integer codes with learned steps


@dataclass(frozen=True, slots=True)
class Width:
    """Heads and hidden channels that a block keeps, and its arithmetic."""

    heads: int
    mlp: int
    arithmetic: Arithmetic


@dataclass(frozen=True, slots=True)
class Bits:
    """Selectors of the step sets and the weight range of an integer layer, as tensors: compiled code serves all bits.

    ``weight``, ``activation``: (bits,) float32, one at the chosen width and zero elsewhere, so that a product selects
    exactly. ``weight_low``, ``weight_high``: () float32.
    """

    weight: Tensor
    activation: Tensor
    weight_low: Tensor
    weight_high: Tensor


class InputQuantizer(nn.Module):
    """Static per-tensor quantizer of an activation, one learned log-step and code range per bit width.

    Attributes:
        log_step: (bits,) float32 parameter.
        low, high: (bits,) float32 buffers; a tensor that is never much below zero uses an asymmetric range of codes
            with zero point 0.
        fp8_scale: () float32 buffer.
        batch: where it is not None, integer codes are BatchQuant's (not static, not symmetric) and log_step, low and
            high have no effect.
    """

    log_step: nn.Parameter
    low: Tensor
    high: Tensor
    fp8_scale: Tensor

    def __init__(self) -> None:
        """Make an uncalibrated quantizer with step 1."""
        super().__init__()
        self.log_step = nn.Parameter(torch.zeros(len(BITS)))
        ranges = [code_range(bits) for bits in BITS]
        self.register_buffer("low", torch.tensor([float(low) for low, _ in ranges]))
        self.register_buffer("high", torch.tensor([float(high) for _, high in ranges]))
        self.register_buffer("fp8_scale", torch.tensor(1.0))
        self.batch: BatchQuant | None = None

    def forward(self, x: Tensor, arithmetic: Arithmetic, bits: Bits) -> tuple[Tensor, Tensor | None]:
        """Return codes of ``x`` and their scale (), or ``x`` and None where it is not quantized.

        The scale is a constant: the whole gradient of the step goes through the codes, which are for products alone.
        """
        if arithmetic is Arithmetic.FLOAT:
            return x, None
        if arithmetic is Arithmetic.HALF:
            return x.to(torch.float16).to(torch.float32), None
        if arithmetic is Arithmetic.FP8:
            return fp8_codes(x.to(torch.float32), self.fp8_scale), self.fp8_scale
        chosen = bits.activation
        if self.batch is not None:
            codes, offset, step = self.batch.select(x.to(torch.float32), chosen)
            return (codes - offset) * (step / step.detach()), step.detach()  # the step's gradient goes through here
        log_step = (chosen * self.log_step).sum()
        codes = lsq_product_codes(x, log_step, (chosen * self.low).sum(), (chosen * self.high).sum())
        return codes, torch.exp(log_step.detach())


class ElasticLinear(nn.Linear):
    """A linear layer whose first rows and columns can be used alone, with one set of row steps per bit width.

    Attributes:
        log_step: (bits, out_features) float32 parameter: steps of the weight rows.
        fp8_steps: FP8 scale per row where this is a part cut out of a larger layer, else None: the scale of a row is
            that of the full row, whatever part of it is used.
    """

    log_step: nn.Parameter
    fp8_steps: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        """Make the layer with uncalibrated steps."""
        super().__init__(in_features, out_features, bias)
        self.log_step = nn.Parameter(torch.zeros(len(BITS), out_features))
        self.register_buffer("fp8_steps", None)
        self.frozen: tuple[Tensor, Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ElasticLinear:
        super()._apply(fn, recurse)
        if self.frozen is not None:
            codes, steps = self.frozen
            self.frozen = fn(codes), fn(steps)
        return self

    @torch.no_grad()
    def freeze(self, bits: Bits) -> None:
        """Quantize the whole weight once, for inference in integers; training it has no effect from here on.

        The products of codes are then summed in int32, which is exact as the float32 sums are (up to 1,024 inputs).
        """
        log_step = (bits.weight[:, None] * self.log_step).sum(0)
        codes = lsq_codes(self.weight, log_step[:, None], bits.weight_low, bits.weight_high)
        self.frozen = codes.to(torch.int8).t(), torch.exp(log_step)

    def fp8_row_steps(self, rows: int) -> Tensor:
        """FP8 scales (rows,) of the first rows, without gradient."""
        if self.fp8_steps is not None:
            return self.fp8_steps[:rows]
        return fp8_scale(self.weight.detach()[:rows], dim=1).flatten()

    def apply_to(
        self, x: Tensor, scale: Tensor | None, arithmetic: Arithmetic, bits: Bits, rows: int, columns: int
    ) -> Tensor:
        """Map (..., columns) codes (or values) of scale () to (..., rows)."""
        if self.frozen is not None:
            assert scale is not None
            codes, steps = self.frozen
            product = torch._int_mm(x.flatten(0, -2).to(torch.int8), codes).to(torch.float32)
            product = product.unflatten(0, x.shape[:-1]) * (scale * steps)
            return product if self.bias is None else product + self.bias
        weight, bias = self.weight[:rows, :columns], None if self.bias is None else self.bias[:rows]
        if arithmetic is Arithmetic.FLOAT:
            return nn.functional.linear(x, weight, bias)
        if arithmetic is Arithmetic.HALF:
            return nn.functional.linear(x, weight.to(torch.float16).to(torch.float32), bias)
        assert scale is not None
        if arithmetic is Arithmetic.FP8:
            steps = self.fp8_row_steps(rows)
            codes = fp8_codes(weight, steps[:, None])
        else:
            log_step = (bits.weight[:, None] * self.log_step[:, :rows]).sum(0)
            codes = lsq_product_codes(weight, log_step[:, None], bits.weight_low, bits.weight_high)
            steps = torch.exp(log_step.detach())
        product, scales = nn.functional.linear(x, codes), scale * steps
        return product * scales if bias is None else rescale(product, scales, bias)


@dataclass(frozen=True, slots=True)
class Units:
    """What a block can be narrowed by: the heads of an attention, or the hidden channels of an MLP.

    Attributes:
        producers: layers of which each unit is ``width`` rows.
        consumers: layers of which each unit is ``width`` columns.
        width: channels of a unit.
    """

    producers: tuple[ElasticLinear, ...]
    consumers: tuple[ElasticLinear, ...]
    width: int = 1


class ElasticBlock(nn.Module):
    """A transformer block of elastic width and bits.

    A narrower one keeps the first entries of every parameter in every dimension, so what belongs to a unit must lie
    together and in the order of the units: queries, keys and values, and the two halves of a gated MLP, are layers of
    their own. Parameters that are not sliced have one size at every width.
    """

    def units(self) -> dict[str, Units]:
        """What the block can be narrowed by, by name; their order changes nothing at full width."""
        raise NotImplementedError


class ElasticAttention(nn.Module):
    """Attention with separate q, k, v and output projections that runs with its first heads only."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, bias: bool = True) -> None:
        """Make the projections of ``heads`` heads of ``head_dim`` channels on ``dim``."""
        super().__init__()
        self.dim, self.head_dim, self.dropout = dim, head_dim, dropout
        inner = heads * head_dim
        self.q = ElasticLinear(dim, inner, bias)
        self.k = ElasticLinear(dim, inner, bias)
        self.v = ElasticLinear(dim, inner, bias)
        self.o = ElasticLinear(inner, dim, bias)
        self.output_input = InputQuantizer()

    def units(self) -> Units:
        """The heads."""
        return Units((self.q, self.k, self.v), (self.o,), self.head_dim)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, H * D) -> (B, H, T, D)."""
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def queries(self, x: Tensor, scale: Tensor | None, width: Width, bits: Bits) -> Tensor:
        """Project codes (B, T, dim) to queries (B, H, T, D)."""
        y = self.q.apply_to(x, scale, width.arithmetic, bits, width.heads * self.head_dim, self.dim)
        return self._split(y, width.heads)

    def keys_values(self, x: Tensor, scale: Tensor | None, width: Width, bits: Bits) -> tuple[Tensor, Tensor]:
        """Project codes (B, S, dim) to keys and values, each (B, H, S, D)."""
        rows = width.heads * self.head_dim
        keys, values = (m.apply_to(x, scale, width.arithmetic, bits, rows, self.dim) for m in (self.k, self.v))
        return self._split(keys, width.heads), self._split(values, width.heads)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, width: Width, bits: Bits) -> Tensor:
        """Attend from (B, H, T, D) to (B, H, S, D) under an additive mask (T, S); returns (B, T, dim).

        The products of attention stay in floating point (``algorithms.md`` section 1).
        """
        q = q * (1.0 / math.sqrt(self.head_dim))
        weights = torch.softmax(q @ keys.transpose(-1, -2) + mask.to(q.dtype), dim=-1).to(values.dtype)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        mixed = (weights @ values).transpose(1, 2).flatten(-2)
        codes, scale = self.output_input(mixed, width.arithmetic, bits)
        return self.o.apply_to(codes, scale, width.arithmetic, bits, self.dim, width.heads * self.head_dim)


class ElasticDecoderBlock(ElasticBlock):
    """Pre-norm decoder block (causal self-attention, cross-attention, GELU MLP) of elastic width and bits.

    Parameter names are those of :class:`training.nn.blocks.DecoderBlock`, so full-precision weights load as they are.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, mlp: int, attention_dropout: float) -> None:
        """Make a block of at most ``heads`` heads and ``mlp`` hidden channels on ``dim`` channels."""
        super().__init__()
        self.dim = dim
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = ElasticAttention(dim, heads, head_dim, attention_dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = ElasticAttention(dim, heads, head_dim, attention_dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.fc1 = ElasticLinear(dim, mlp)
        self.fc2 = ElasticLinear(mlp, dim)
        self.self_input = InputQuantizer()  # of q, k and v together
        self.cross_input = InputQuantizer()
        self.memory_input = InputQuantizer()  # of the cross-attention's k and v together
        self.fc1_input = InputQuantizer()
        self.fc2_input = InputQuantizer()

    def units(self) -> dict[str, Units]:
        """Heads of either attention and hidden channels."""
        return {
            "self_heads": self.self_attn.units(),
            "cross_heads": self.cross_attn.units(),
            "channels": Units((self.fc1,), (self.fc2,)),
        }

    def keys_values(self, memory: Tensor, width: Width, bits: Bits) -> tuple[Tensor, Tensor]:
        """Cross-attention keys and values (B, H, S, D) of ``memory`` (B, S, dim)."""
        codes, scale = self.memory_input(memory, width.arithmetic, bits)
        return self.cross_attn.keys_values(codes, scale, width, bits)

    def decode(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        self_mask: Tensor,
        cross_mask: Tensor,
        width: Width,
        bits: Bits,
    ) -> Tensor:
        """Run the block on ``x`` (B, T, dim) with the memory's ``keys`` and ``values`` (B, H, S, D)."""
        codes, scale = self.self_input(self.norm1(x), width.arithmetic, bits)
        q = self.self_attn.queries(codes, scale, width, bits)
        k, v = self.self_attn.keys_values(codes, scale, width, bits)
        x = x + self.self_attn.attend(q, k, v, self_mask, width, bits)
        codes, scale = self.cross_input(self.norm2(x), width.arithmetic, bits)
        q = self.cross_attn.queries(codes, scale, width, bits)
        x = x + self.cross_attn.attend(q, keys, values, cross_mask, width, bits)
        codes, scale = self.fc1_input(self.norm3(x), width.arithmetic, bits)
        hidden = nn.functional.gelu(self.fc1.apply_to(codes, scale, width.arithmetic, bits, width.mlp, self.dim))
        codes, scale = self.fc2_input(hidden, width.arithmetic, bits)
        return x + self.fc2.apply_to(codes, scale, width.arithmetic, bits, self.dim, width.mlp)

    def forward(
        self, x: Tensor, memory: Tensor, self_mask: Tensor, cross_mask: Tensor, width: Width, bits: Bits
    ) -> Tensor:
        """Run the block on ``x`` (B, T, dim) with memory tokens (B, S, dim)."""
        keys, values = self.keys_values(memory, width, bits)
        return self.decode(x, keys, values, self_mask, cross_mask, width, bits)


def integer_bits(weight: int, activation: int) -> Bits:
    """The tensors that select a weight and an activation bit width."""
    low, high = weight_range(weight)
    chosen = torch.eye(len(BITS))
    return Bits(
        chosen[BITS.index(weight)].clone(),
        chosen[BITS.index(activation)].clone(),
        torch.tensor(float(low)),
        torch.tensor(float(high)),
    )
