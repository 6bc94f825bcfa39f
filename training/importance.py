"""Order of heads and hidden channels before slicing: a narrower block keeps the most important ones.

The permutation changes no output of the full-width network. It is applied once, before averages and optimizer exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.nn.elastic import ElasticAttention, ElasticDecoderBlock, ElasticLinear

Scores = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class BlockOrder:
    """Heads (H,) of self- and cross-attention and hidden channels (M,), int64, most important first."""

    self_heads: Tensor
    cross_heads: Tensor
    channels: Tensor


def l1_scores(parameter: Tensor) -> Tensor:
    """Importance of every element: its magnitude."""
    return parameter.detach().abs()


def taylor_scores(parameter: Tensor) -> Tensor:
    """Importance of every element: the first-order change of the loss without it, |w dL/dw|; needs gradients.

    Raises:
        ValueError: the parameter has no gradient.
    """
    if parameter.grad is None:
        raise ValueError("Taylor importance needs gradients: run the loss backward on calibration data first")
    return (parameter.detach() * parameter.grad).abs()


def importance_order(block: ElasticDecoderBlock, scores: Scores = l1_scores) -> BlockOrder:
    """The order of a block's heads and hidden channels; equals keep their order."""
    channels = scores(block.fc1.weight).sum(1) + scores(block.fc2.weight).sum(0)
    return BlockOrder(
        _head_order(block.self_attn, scores),
        _head_order(block.cross_attn, scores),
        torch.argsort(channels, descending=True, stable=True),
    )


@torch.no_grad()
def apply_order(block: ElasticDecoderBlock, order: BlockOrder) -> None:
    """Permute heads and hidden channels of ``block`` in place, with biases and steps."""
    for attention, heads in ((block.self_attn, order.self_heads), (block.cross_attn, order.cross_heads)):
        width = attention.head_dim
        rows = (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()
        for linear in (attention.q, attention.k, attention.v):
            _permute_rows(linear, rows)
        attention.o.weight.copy_(attention.o.weight[:, rows])
    _permute_rows(block.fc1, order.channels)
    block.fc2.weight.copy_(block.fc2.weight[:, order.channels])


def order_by_importance(block: ElasticDecoderBlock, scores: Scores = l1_scores) -> None:
    """Permute heads and hidden channels of ``block`` in place, most important first."""
    apply_order(block, importance_order(block, scores))


def _head_order(attention: ElasticAttention, scores: Scores) -> Tensor:
    total = scores(attention.o.weight).sum(0)
    for linear in (attention.q, attention.k, attention.v):
        total = total + scores(linear.weight).sum(1)
    return torch.argsort(total.unflatten(0, (-1, attention.head_dim)).sum(1), descending=True, stable=True)


def _permute_rows(linear: ElasticLinear, order: Tensor) -> None:
    linear.weight.copy_(linear.weight[order])
    linear.bias.copy_(linear.bias[order])
    linear.log_step.copy_(linear.log_step[:, order])
