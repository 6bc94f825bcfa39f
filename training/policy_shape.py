"""What search space, tables, sampler and counts know of a policy: its elastic blocks at full size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.subnet import Layer

Slice = Literal["full", "heads", "mlp"]


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear layer of a block at full size.

    Attributes:
        name: module path within the block.
        in_features: channels of its input.
        out_features: channels of its output.
        in_slice: what the input shrinks with: nothing (``full``), the heads kept or the hidden channels kept.
        out_slice: the same of the output.
        bias: whether it has one.
        stage: ``chunk`` if it runs once per action chunk (keys and values of conditioning tokens, encoders), ``step``
            if it runs at every denoising step.
        tokens: tokens it processes per run.
        quantized: False for a layer that is neither quantized nor sliced, such as the modulation of an adaptive norm.
    """

    name: str
    in_features: int
    out_features: int
    in_slice: Slice
    out_slice: Slice
    bias: bool
    stage: Literal["chunk", "step"]
    tokens: int
    quantized: bool = True


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One transformer block at full size.

    Attributes:
        name: module path, such as ``blocks.0``.
        kind: type of block: the key into look-up tables.
        group: blocks whose depth is counted together, such as ``encoder``.
        dim: channels of the residual stream, never sliced.
        heads: attention heads.
        head_dim: channels of a head.
        mlp: hidden channels of the MLP.
        tokens: tokens that the block processes and that attend to each other.
        memory_tokens: tokens it attends to besides (cross-attention); 0 without cross-attention.
        linears: its linear layers; what is sliced and quantized is among them.
        float_parameters: all other parameters (norms), never sliced and never quantized.
        elastic: False for a block that is never skipped nor narrowed: only its bits are chosen.
    """

    name: str
    kind: str
    group: str
    dim: int
    heads: int
    head_dim: int
    mlp: int
    tokens: int
    memory_tokens: int
    linears: tuple[LinearShape, ...]
    float_parameters: int
    elastic: bool = True


@dataclass(frozen=True, slots=True)
class PolicyShape:
    """A policy as its elastic blocks, in order of execution, and the sum of the rest.

    Attributes:
        backbone: name of the policy's architecture.
        blocks: the blocks.
        fixed_parameters: parameters outside the blocks.
        fixed_flops_chunk: floating point operations outside the blocks per action chunk.
        fixed_flops_step: the same per denoising step.
        fixed_bits: bits in which networks of integer or FP8 precision store what lies outside the blocks.
    """

    backbone: str
    blocks: tuple[BlockShape, ...]
    fixed_parameters: int
    fixed_flops_chunk: int
    fixed_flops_step: int
    fixed_bits: int = 32


def linear_size(block: BlockShape, linear: LinearShape, layer: Layer) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer of ``block`` at the width of ``layer``."""

    def kept(features: int, by: Slice) -> int:
        if by == "heads":
            return features * layer.heads // block.heads
        return features * layer.mlp // block.mlp if by == "mlp" else features

    return kept(linear.in_features, linear.in_slice), kept(linear.out_features, linear.out_slice)
