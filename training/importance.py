"""Order of heads and hidden channels before slicing: a narrower block keeps the most important ones.

The permutation changes no output of the full-width network. It is applied once, before averages and optimizer exist.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from training.nn.elastic import ElasticBlock, Units

Scores = Callable[[Tensor], Tensor]


BlockOrder = Mapping[str, Tensor]
"""Positions (int64) of the units of a block, most important first, by the names of :meth:`ElasticBlock.units`."""


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


def importance_order(block: ElasticBlock, scores: Scores = l1_scores) -> dict[str, Tensor]:
    """The order of a block's units, such as its heads and hidden channels; equals keep their order."""
    return {name: _order(units, scores) for name, units in block.units().items()}


@torch.no_grad()
def apply_order(block: ElasticBlock, order: BlockOrder) -> None:
    """Permute the units of ``block`` in place, with biases and steps.

    Raises:
        ValueError: ``order`` has other units than the block.
    """
    every = block.units()
    if every.keys() != order.keys():
        raise ValueError(f"order: expected {', '.join(every)}, got {', '.join(order)}")
    for name, units in every.items():
        first = order[name][:, None] * units.width
        channels = (first + torch.arange(units.width, device=first.device)).flatten()
        for linear in units.producers:
            linear.weight.copy_(linear.weight[channels])
            linear.log_step.copy_(linear.log_step[:, channels])
            if linear.bias is not None:
                linear.bias.copy_(linear.bias[channels])
        for linear in units.consumers:
            linear.weight.copy_(linear.weight[:, channels])


def order_by_importance(block: ElasticBlock, scores: Scores = l1_scores) -> None:
    """Permute the units of ``block`` in place, most important first."""
    apply_order(block, importance_order(block, scores))


def _order(units: Units, scores: Scores) -> Tensor:
    parts = [scores(linear.weight).sum(0) for linear in units.consumers]
    parts += [scores(linear.weight).sum(1) for linear in units.producers]
    total = functools.reduce(torch.add, parts)
    return torch.argsort(total.unflatten(0, (-1, units.width)).sum(1), descending=True, stable=True)
