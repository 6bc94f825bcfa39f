"""Bits of the whole network's layers: searched against uniform and against greedy allocation at equal average bits.

Greedy allocation follows QVLA (``algorithms.md`` section 7), on layers in place of channels: how much the distance to
the teacher grows when one operand of one block alone goes from the most to the fewest bits, then demotion in ascending
order of that growth per bit saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.search.front import Point, front
from training.search.nsga import Genetics, evolve
from training.space import SearchSpace
from training.space_counts import mean_bits
from training.subnet import Layer, Precision, Subnet

Distances = Callable[[Sequence[Subnet]], list[float]]
LEVELS = (4.0, 5.0, 6.0, 7.0, 8.0)  # average bits at which the methods are compared
EVEN = 1e-9
METHODS = ("searched", "greedy", "uniform")


@dataclass(frozen=True, slots=True)
class Allocation:
    """A whole network's bits: its name, average bits over weights and activations, and distance to the teacher."""

    subnet: str
    bits: float
    distance: float


@dataclass(frozen=True, slots=True)
class MixedOutcome:
    """Allocations of each method, by average bits, ascending.

    Attributes:
        searched: those that no other measured one beats in bits and distance.
        greedy: every step of the demotion.
        uniform: one pair of bits for all layers.
        measured: distances that the search needed.
    """

    searched: list[Allocation]
    greedy: list[Allocation]
    uniform: list[Allocation]
    measured: int

    def at(self, method: str, bits: float) -> Allocation | None:
        """The allocation of a method with the least distance among those of at most ``bits`` on average."""
        allowed = [a for a in getattr(self, method) if a.bits <= bits + EVEN]
        return min(allowed, key=lambda allocation: allocation.distance) if allowed else None

    def compared(self) -> list[dict[str, Any]]:
        """For each level of :data:`LEVELS` what each method reaches with at most that many bits."""
        rows = []
        for bits in LEVELS:
            found = {method: self.at(method, bits) for method in METHODS}
            rows.append({"bits": bits} | {m: None if a is None else asdict(a) for m, a in found.items()})
        return rows


def whole_space(space: SearchSpace) -> SearchSpace:
    """The networks of ``space`` that keep everything and differ in bits alone."""
    depth = {group: len(blocks) for group, blocks in space.groups.items()}
    config = space.config.model_copy(
        update={"min_depth": depth, "depths": {}, "head_ratios": (1.0,), "mlp_ratios": (1.0,)}
    )
    return SearchSpace(space.shape, config)


def average_bits(space: SearchSpace, subnet: Subnet) -> float:
    """Mean of weight bits and activation bits, each weighted by the parameters of its layer."""
    layers = tuple(None if layer is None else replace(layer, w=layer.a) for layer in subnet.layers)
    activations = mean_bits(space.shape, Subnet(layers, subnet.precision))
    return 0.5 * (mean_bits(space.shape, subnet) + activations)


def greedy_path(space: SearchSpace, distances: Distances) -> list[Subnet]:
    """Networks from the most to the fewest bits, one operand of one block demoted in each step."""
    low = (space.weight_bits[0], space.activation_bits[0])
    start = space.largest(Precision.INT, space.weight_bits[-1], space.activation_bits[-1])
    places = [
        (block, operand)
        for block in range(len(start.layers))
        for operand, choices in enumerate((space.weight_bits, space.activation_bits))
        if len(choices) > 1
    ]
    alone = [_demoted(start, [place], low) for place in places]
    base, *lowered = distances([start, *alone])
    saved = [average_bits(space, start) - average_bits(space, subnet) for subnet in alone]
    order = sorted(range(len(places)), key=lambda index: ((lowered[index] - base) / saved[index], places[index]))
    return [_demoted(start, [places[i] for i in order[:count]], low) for count in range(len(places) + 1)]


def search_bits(space: SearchSpace, distances: Distances, genetics: Genetics) -> MixedOutcome:
    """Search the bits of the whole network, and allocate them greedily and uniformly.

    Args:
        space: of the supernet.
        distances: to the teacher.
        genetics: size and seed of the search.
    """
    space = whole_space(space)
    known: dict[Subnet, float] = {}

    def measured(subnets: Sequence[Subnet]) -> list[Allocation]:
        values = distances(subnets)
        return [
            Allocation(space.name(subnet), average_bits(space, subnet), value)
            for subnet, value in zip(subnets, values, strict=True)
        ]

    def objectives(subnets: Sequence[Subnet]) -> NDArray[np.float64]:
        rows = measured(subnets)
        known.update((subnet, row.distance) for subnet, row in zip(subnets, rows, strict=True))
        return np.array([(row.distance, row.bits, row.bits) for row in rows]).reshape(len(rows), 3)

    uniform = [space.largest(Precision.INT, w, a) for w in space.weight_bits for a in space.activation_bits]
    most = float(max(space.weight_bits[-1], space.activation_bits[-1]))
    evolve(space, uniform, objectives, (most, most), genetics)
    points = []
    for subnet, distance in known.items():
        bits = average_bits(space, subnet)
        points.append(Point(space.name(subnet), distance, bits, bits))
    searched = [Allocation(point.subnet, point.latency_ms, point.distance) for point in front(points)]
    return MixedOutcome(
        searched=_ascending(searched),
        greedy=_ascending(measured(greedy_path(space, distances))),
        uniform=_ascending(measured(uniform)),
        measured=len(known),
    )


def _ascending(allocations: Sequence[Allocation]) -> list[Allocation]:
    return sorted(allocations, key=lambda allocation: (allocation.bits, allocation.distance))


def _demoted(start: Subnet, places: Sequence[tuple[int, int]], low: tuple[int, int]) -> Subnet:
    """``start`` with operand 0 (weights) or 1 (activations) of some blocks at the fewest bits."""
    layers: list[Layer | None] = list(start.layers)
    for block, operand in places:
        layer = layers[block]
        assert layer is not None
        layers[block] = replace(layer, w=low[0]) if operand == 0 else replace(layer, a=low[1])
    return Subnet(tuple(layers), start.precision)
