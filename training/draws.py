"""Stratified draws of subnets: depth, width and bits are chosen first, then layers are filled to meet them.

Independent uniform draws per layer average out: of eight layers with four widths each hardly one network in a hundred
exceeds 0.6 of the full cost, and the networks that are deployed in the end, the uniform ones near the extremes, are
hardly ever trained. So targets are drawn evenly over their whole range, and the layers from the least committed
(maximum-entropy) distribution with that mean, which is the uniform network where a target is extreme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.space import SearchSpace
from training.subnet import FLOAT_BITS, Layer, Precision, Subnet

WHOLE_NETWORK_SHARE = 0.125  # of the draws: FP8 and what else the space has for the network as a whole
TIED_SHARE = 0.5  # of the draws: heads and MLP share one target, and so do weight and activation bits
EXTREME_SHARE = 0.045  # of the targets: exactly the least, and as many exactly the greatest


@dataclass(frozen=True, slots=True)
class Phase:
    """What may vary at this point of a training run; what may not is at its greatest value.

    Attributes:
        bits: weight and activation bits, and whole-network precisions.
        width: heads and MLP channels.
        depth: blocks kept.
    """

    bits: bool = True
    width: bool = True
    depth: bool = True


def stratified_subnet(
    space: SearchSpace, generator: torch.Generator, phase: Phase | None = None, *, whole_network: bool = True
) -> Subnet:
    """Draw a subnet whose depth, mean width and mean bits are each evenly spread over their range.

    Args:
        space: where it is drawn from.
        generator: a CPU generator; every call takes the same number of values from it, whatever is drawn.
        phase: what may vary (default: everything).
        whole_network: draw whole-network precisions too, where the space has any.
    """
    phase = phase or Phase()
    blocks = len(space.shape.blocks)
    uniform = iter(torch.rand(8 + 5 * blocks, generator=generator, dtype=torch.float64).tolist())
    kind, which = next(uniform), next(uniform)
    heads, mlp = _pair(next(uniform), next(uniform), next(uniform), phase.width)
    weights, activations = _pair(next(uniform), next(uniform), next(uniform), phase.bits)
    order = [next(uniform) for _ in range(blocks)]
    kept = _kept(space, order, generator, phase.depth)

    whole = space.precisions[:-1]
    precision = Precision.INT
    if whole_network and phase.bits and whole and kind < WHOLE_NETWORK_SHARE:
        precision = whole[int(which * len(whole))]

    known: dict[tuple[tuple[int, ...], float], list[float]] = {}  # blocks have the same choices as a rule

    def fill(choices: tuple[int, ...], target: float) -> int:
        if (choices, target) not in known:
            known[choices, target] = tilted(choices, target)
        return _pick(choices, known[choices, target], next(uniform))

    layers: list[Layer | None] = []
    for index in range(blocks):
        head_count = fill(space.head_choices[index], heads)
        channels = fill(space.mlp_choices[index], mlp)
        w, a = fill(space.weight_bits, weights), fill(space.activation_bits, activations)
        if precision is not Precision.INT:
            w = a = FLOAT_BITS[precision]
        layers.append(Layer(head_count, channels, w, a) if index in kept else None)
    return Subnet(tuple(layers), precision)


def _pair(first: float, second: float, tied: float, elastic: bool) -> tuple[float, float]:
    """Turn uniform values into two targets in [0, 1], equal in a share of the cases; both 1 where nothing may vary."""
    if not elastic:
        return 1.0, 1.0
    return _target(first), _target(first if tied < TIED_SHARE else second)


def _target(uniform: float) -> float:
    """Spread a uniform value over [0, 1] so that both ends have a probability of their own."""
    return min(1.0, max(0.0, (uniform - EXTREME_SHARE) / (1.0 - 2.0 * EXTREME_SHARE)))


def _kept(space: SearchSpace, order: Sequence[float], generator: torch.Generator, elastic: bool) -> set[int]:
    """Draw the depth of every group evenly from its choices, then which of its blocks are kept."""
    kept: set[int] = set()
    depths = torch.rand(len(space.groups), generator=generator, dtype=torch.float64).tolist()
    for (group, members), value in zip(space.groups.items(), depths, strict=True):
        choices = space.depth_choices[group]
        depth = choices[int(value * len(choices))] if elastic else len(members)
        kept.update(sorted(members, key=lambda index: (index not in space.always_kept, order[index]))[:depth])
    return kept


def _pick(choices: Sequence[int], probabilities: Sequence[float], uniform: float) -> int:
    """The choice at quantile ``uniform``."""
    cumulative, last = 0.0, choices[0]
    for choice, probability in zip(choices, probabilities, strict=True):
        cumulative += probability
        if uniform < cumulative:
            return choice
        if probability > 0.0:
            last = choice
    return last  # the sum is rounded


def tilted(choices: Sequence[int], target: float) -> list[float]:
    """Probabilities (of maximum entropy) of the ascending ``choices`` whose mean lies at ``target`` of their range.

    Args:
        choices: at least one value, ascending.
        target: 0 (always the first) to 1 (always the last).
    """
    if len(choices) == 1:
        return [1.0]
    if target in (0.0, 1.0):
        last = len(choices) - 1
        return [float(index == last * int(target)) for index in range(len(choices))]
    span = choices[-1] - choices[0]
    places = [(choice - choices[0]) / span for choice in choices]
    if len(choices) == 2:
        return [1.0 - target, target]
    low, high = -700.0, 700.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        weights = _exponential(places, middle)
        if sum(p * w for p, w in zip(places, weights, strict=True)) < target:
            low = middle
        else:
            high = middle
    return weights


def _exponential(places: Sequence[float], slope: float) -> list[float]:
    """Softmax of ``slope`` times ``places`` (both ends of the interval are places 0 and 1)."""
    top = max(0.0, slope)
    weights = [math.exp(slope * place - top) for place in places]
    total = sum(weights)
    return [weight / total for weight in weights]
