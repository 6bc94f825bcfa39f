"""Budgets of a search: what is possible on a device, and how far the closest network is from what is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.commands import ArgumentError
from training.conditions import Condition, Conditions, cheapest_subnet, rounded_up, smallest_subnet, within
from training.predictor import ChoiceIndex
from training.subnet import Subnet

MEGA = 1e6
Partial = tuple[NDArray[np.float64], NDArray[np.int64]]  # sums (N, 2) of choices so far, and the choices (N, L)


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a network may cost; None for any.

    Attributes:
        latency_ms: milliseconds per chunk.
        memory_bytes: bytes.
    """

    latency_ms: float | None = None
    memory_bytes: float | None = None


def condition(conditions: Conditions, device: str, budgets: Budgets) -> Condition:
    """Device and budgets; one that is not given is above what any network costs.

    Raises:
        ArgumentError: no network keeps one of the budgets; names the option, the closest network, how far it is off
            and what would do.
    """
    costs = conditions.measured[device]
    for option, unit, scale, given, added in (
        ("--latency-ms", "ms", 1.0, budgets.latency_ms, costs.latency),
        ("--memory-mb", "MB", MEGA, budgets.memory_bytes, costs.memory),
    ):
        if given is None:
            continue
        closest, needed = cheapest_subnet(costs, added)
        if not within(needed, given):
            raise ArgumentError(
                f"{option} {given / scale:g}: the closest network ({costs.space.name(closest)}) takes "
                f"{rounded_up(needed / scale)} {unit} on {device}, {100.0 * (needed / given - 1.0):.1f} % more; give "
                f"at least {rounded_up(needed / scale)}"
            )
    most_latency = costs.fixed_latency + float(costs.latency.flatten(1).amax(dim=1).sum())
    most_memory = costs.fixed_memory + float(costs.memory.flatten(1).amax(dim=1).sum())
    return Condition(
        device,
        costs,
        most_latency if budgets.latency_ms is None else budgets.latency_ms,
        most_memory if budgets.memory_bytes is None else budgets.memory_bytes,
    )


def closest_network(condition: Condition) -> Subnet:
    """A network within both budgets where there is one, else the one that exceeds them least.

    Further blocks only cost more, so few are kept. The largest buffer of activations counts once: for each size that it
    may have, the networks that do not exceed it are compared, by sums over blocks of which none is worse in both.
    """
    activation = condition.costs.activation
    found = [smallest_subnet(condition.costs.space)]
    for most in activation.unique().tolist():
        found.extend(_undominated(condition, activation <= most))
    return min(found, key=condition.excess)


def infeasible(condition: Condition, closest: Subnet) -> ArgumentError:
    """What to say where each budget can be kept alone and no network keeps both."""
    cost = condition.costs.total(closest)
    return ArgumentError(
        f"--latency-ms {condition.latency_ms:g} --memory-mb {condition.memory_bytes / MEGA:g}: no network keeps both "
        f"on {condition.name}; the closest ({condition.costs.space.name(closest)}) takes "
        f"{rounded_up(cost.latency_ms)} ms and {rounded_up(cost.memory_bytes / MEGA)} MB "
        f"({_percent(cost.latency_ms, condition.latency_ms)} and {_percent(cost.memory_bytes, condition.memory_bytes)})"
    )


def _percent(cost: float, budget: float) -> str:
    return "within" if within(cost, budget) else f"{100.0 * (cost / budget - 1.0):.1f} % more"


def _undominated(condition: Condition, allowed: Tensor) -> list[Subnet]:
    """Networks of the fewest blocks that no other one beats in sums of latency and of memory.

    Args:
        condition: device and budgets.
        allowed: (L, H, M) bool, head counts and hidden widths to take.
    """
    costs, space = condition.costs, condition.costs.space
    index = ChoiceIndex(space)
    both = torch.stack([costs.latency.flatten(1), costs.memory.flatten(1)], dim=2).double().numpy()
    offered = (index.offered & allowed[..., None, None].expand_as(costs.latency).flatten(1)).numpy()
    sums, numbers = np.zeros((1, 2)), np.zeros((1, len(both)), np.int64)
    for group, blocks in space.groups.items():
        needed = space.least_depths[group]  # no fewer than are always kept
        kept: dict[int, Partial] = {0: (sums, numbers)}  # by blocks that are kept so far
        for block in blocks:
            choices = np.flatnonzero(offered[block])
            choices = choices[_front(both[block, choices])]
            grown: dict[int, list[Partial]] = {}
            for count, (cost, chosen) in kept.items():
                if block not in space.always_kept:
                    grown.setdefault(count, []).append((cost, _with(chosen, block, np.array([index.count]))))
                if count < needed:
                    more = (cost[:, None] + both[block, choices]).reshape(-1, 2)
                    grown.setdefault(count + 1, []).append((more, _with(chosen, block, choices)))
            kept = {count: _joined(parts) for count, parts in grown.items()}
        if needed not in kept or not len(kept[needed][0]):
            return []
        sums, numbers = kept[needed]
    return [index.decode(row) for row in numbers.tolist()]


def _with(chosen: NDArray[np.int64], block: int, choices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows (N * C, L) of ``chosen`` (N, L), each with every one of ``choices`` (C,) for ``block``."""
    rows = np.repeat(chosen, len(choices), axis=0)
    rows[:, block] = np.tile(choices, len(chosen))
    return rows


def _joined(parts: Sequence[Partial]) -> Partial:
    sums, numbers = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    best = _front(sums)
    return sums[best], numbers[best]


def _front(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows of ``costs`` (N, 2) that no other row beats; of equal ones the first."""
    order = np.lexsort((costs[:, 1], costs[:, 0]))
    second = costs[order, 1]
    before = np.minimum.accumulate(np.concatenate([[np.inf], second[:-1]]))
    return order[second < before]
