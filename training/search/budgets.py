"""Budgets of a search: what is possible on a device, and how far the closest network is from what is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.commands import ArgumentError
from training.conditions import TOLERANCE, Condition, Conditions, rounded_up, smallest_subnet, within
from training.cost import CostTensors
from training.predictor import ChoiceIndex
from training.space import SearchSpace
from training.subnet import Subnet

MEGA = 1e6
WEIGHTS = 65  # mixtures of latency and memory that are tried for networks within both budgets


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

    :meth:`Conditions.condition` compares with the smallest network, which is not the fastest one where the device
    multiplies narrow integers slowly; here the bound is that of the network that is best in the budget's own terms.

    Raises:
        ArgumentError: no network keeps one of the budgets; names the option, the closest network, how far it is off
            and what would do.
    """
    costs, space = conditions.measured[device], conditions.space
    for option, unit, scale, given, added in (
        ("--latency-ms", "ms", 1.0, budgets.latency_ms, costs.latency),
        ("--memory-mb", "MB", MEGA, budgets.memory_bytes, costs.memory),
    ):
        if given is None:
            continue
        closest = _cheapest(space, costs, added)
        cost = costs.total(closest)
        needed = cost.latency_ms if added is costs.latency else cost.memory_bytes
        if not within(needed, given):
            raise ArgumentError(
                f"{option} {given / scale:g}: the closest network ({space.name(closest)}) takes "
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


def closest_network(space: SearchSpace, condition: Condition) -> Subnet:
    """A network within both budgets, or the one that exceeds them least, among those cheapest in a mixture of both."""
    costs = condition.costs
    found = [smallest_subnet(space)]
    for share in torch.linspace(0.0, 1.0, WEIGHTS).tolist():
        latency, memory = costs.latency / condition.latency_ms, costs.memory / condition.memory_bytes
        found.append(_least(space, share * latency + (1.0 - share) * memory))
    return min(found, key=condition.excess)


def infeasible(condition: Condition, closest: Subnet) -> ArgumentError:
    """What to say where each budget can be kept alone and no network was found that keeps both."""
    cost = condition.costs.total(closest)
    return ArgumentError(
        f"--latency-ms {condition.latency_ms:g} --memory-mb {condition.memory_bytes / MEGA:g}: no network was found "
        f"that keeps both on {condition.name}; the closest ({condition.costs.space.name(closest)}) takes "
        f"{rounded_up(cost.latency_ms)} ms and {rounded_up(cost.memory_bytes / MEGA)} MB "
        f"({_percent(cost.latency_ms, condition.latency_ms)} and {_percent(cost.memory_bytes, condition.memory_bytes)})"
    )


def _percent(cost: float, budget: float) -> str:
    return "within" if within(cost, budget) else f"{100.0 * (cost / budget - 1.0):.1f} % more"


def _cheapest(space: SearchSpace, costs: CostTensors, added: Tensor) -> Subnet:
    """The network of least latency or memory; the smallest one where that is as cheap."""
    smallest, least = smallest_subnet(space), _least(space, added)

    def cost(subnet: Subnet) -> float:
        total = costs.total(subnet)
        return total.latency_ms if added is costs.latency else total.memory_bytes

    return least if cost(least) < cost(smallest) * (1.0 - TOLERANCE) else smallest


def _least(space: SearchSpace, added: Tensor) -> Subnet:
    """The network with the least sum of ``added`` (L, H, M, W, A): few blocks, each with its cheapest choice."""
    index = ChoiceIndex(space)
    values, choices = added.flatten(1).masked_fill(~index.offered, float("inf")).min(dim=1)
    kept = set(space.always_kept)
    for group, blocks in space.groups.items():
        others = sorted((block for block in blocks if block not in kept), key=lambda block: float(values[block]))
        missing = space.min_depth[group] - sum(block in kept for block in blocks)
        kept.update(others[: max(0, missing)])
    return index.decode([int(choices[i]) if i in kept else index.count for i in range(len(choices))])
