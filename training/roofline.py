"""Roofline of a block: the work of each of its linears, and the time a device needs for it.

A kernel takes the longer of computing and moving its data, plus a launch. That is how tables of devices that are not at
hand are modelled (:mod:`training.modelled_tables`) and random ones drawn (:mod:`training.synthetic_tables`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.policy_shape import BlockShape, linear_size
from training.subnet import Layer

FLOAT_KERNELS = 6
"""Launches of a block at a denoising step besides its linears: three norms and the products of attention, two of each
kind of attention; residuals and activation functions are fused into the linears, as TensorRT and ONNX Runtime do."""


@dataclass(frozen=True, slots=True)
class BlockWork:
    """Work of one block for every choice of heads (H) and hidden channels (M); K linears. Sizes in elements.

    Attributes:
        inputs: (H, M, K) float64, input features.
        outputs: (H, M, K) float64, output features.
        tokens: (K,) float64, rows per run.
        quantized: (K,) bool, false for linears that stay in floating point in every form.
        per_chunk: (K,) bool, true for linears that run once per chunk rather than at every denoising step.
        attention_flops: (H,) float64, floating-point operations of the attention products per run of the block, which
            is at every denoising step unless all linears run once per chunk.
    """

    inputs: Tensor
    outputs: Tensor
    tokens: Tensor
    quantized: Tensor
    per_chunk: Tensor
    attention_flops: Tensor

    @property
    def once(self) -> bool:
        """True for a block that runs once per chunk as a whole, such as an observation encoder's."""
        return bool(self.per_chunk.all())


def block_work(block: BlockShape, heads: Sequence[int], widths: Sequence[int]) -> BlockWork:
    """Tabulate the work of ``block`` for head counts (H,) and hidden channels (M,)."""
    sizes = torch.tensor(
        [[[linear_size(block, linear, Layer(h, m, 8, 8)) for linear in block.linears] for m in widths] for h in heads],
        dtype=torch.float64,
    )
    pairs = block.tokens * (block.tokens + block.memory_tokens)  # of query and key, self- and cross-attention
    return BlockWork(
        inputs=sizes[..., 0],
        outputs=sizes[..., 1],
        tokens=torch.tensor([linear.tokens for linear in block.linears], dtype=torch.float64),
        quantized=torch.tensor([linear.quantized for linear in block.linears]),
        per_chunk=torch.tensor([linear.stage == "chunk" for linear in block.linears]),
        attention_flops=torch.tensor([4.0 * pairs * h * block.head_dim for h in heads], dtype=torch.float64),
    )


def up_to_tiles(sizes: Tensor, tile: Tensor) -> Tensor:
    """Round sizes up to whole tiles: what a matrix kernel really computes."""
    return torch.ceil(sizes / tile) * tile
