"""A search of one device: genetic search, random search beside it, and the fronts that they leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.conditions import Condition
from training.draws import stratified_subnet
from training.predictor import rank_correlation
from training.schedules import step_seed
from training.search.front import Point, front, hypervolumes
from training.search.nsga import Genetics, evolve
from training.search.predicted import DistancePredictor
from training.search.session import KnownDistances
from training.space import SearchSpace
from training.space_counts import mean_bits
from training.subnet import Precision, SpaceError, Subnet

LEAST_KNOWN = 20  # fewer predict nothing
VERIFIED = 50  # true distances that a further device may cost
UNIFORM = ("w8a8", "w4a8", "w8a4", "w4a4", "smallest")  # whole networks at one pair of bits, and the least one
TRIES = 100  # random draws per network that must fit
RANDOM_STREAM = 0x9E3779B9
BEYOND = 1e6


@dataclass(frozen=True, slots=True)
class Plan:
    """What one search does.

    Attributes:
        genetics: size and seed.
        known: networks whose distances the search predicts the others' from; None measures every network.
        verify: how many of the predicted ones are measured.
        random: search at random too, with as many distances; only beside a search that measures every network.
    """

    genetics: Genetics
    known: tuple[str, ...] | None = None
    verify: int = VERIFIED
    random: bool = True


@dataclass(slots=True)
class Outcome:
    """What a search found. Every point has a measured distance.

    Attributes:
        front: networks within both budgets that no other measured one beats in all objectives.
        random_front: the same of the random search.
        uniform: whole networks at one pair of bits, by name as asked for, within the budgets or not.
        measured, random_measured: networks within the budgets whose distances were used, from the cache or not.
        new: distances that were not in the cache.
        hypervolume, random_hypervolume: shares of the box around both sets that their fronts dominate.
        correlation: Spearman's, of predictions with the distances measured afterwards; None where fewer than three
            were predicted, or all alike.
        points: every measured network within the budgets.
    """

    front: list[Point]
    random_front: list[Point]
    uniform: dict[str, Point]
    measured: int
    random_measured: int
    new: int
    hypervolume: float
    random_hypervolume: float | None
    correlation: float | None
    points: list[Point]

    def document(self, space: SearchSpace) -> dict[str, Any]:
        """For JSON."""

        def row(point: Point) -> dict[str, Any]:
            return asdict(point) | {"mean_bits": mean_bits(space.shape, space.parse(point.subnet))}

        return {
            "front": [row(point) for point in self.front],
            "random_front": [row(point) for point in self.random_front],
            "uniform": {name: row(point) for name, point in self.uniform.items()},
            "measured": self.measured,
            "random_measured": self.random_measured,
            "new_distances": self.new,
            "hypervolume": self.hypervolume,
            "random_hypervolume": self.random_hypervolume,
            "rank_correlation": self.correlation,
        }


class DeviceSearch:
    """Searches for one device with measured distances, and predicted ones where the plan says so."""

    def __init__(
        self,
        space: SearchSpace,
        condition: Condition,
        distances: KnownDistances,
    ) -> None:
        """Take what a search needs.

        Args:
            space: of the supernet.
            condition: device and budgets.
            distances: known ones and those to come.
        """
        self.space, self.condition = space, condition
        self.distances, self.cache = distances, distances.cache
        self._needed: dict[str, Subnet] = {}

    def run(self, plan: Plan, proposals: Sequence[Subnet] = ()) -> Outcome:
        """Search; an interrupted one goes on where it was, because all its distances are in the cache.

        Args:
            plan: what to do.
            proposals: networks to begin with, of the configuration sampler for instance.
        """
        uniform = self._uniform()
        start = [*uniform.values(), *proposals]
        correlation = None
        if plan.known is None:
            evolve(self.space, start, self._objectives, self._budgets, plan.genetics)
        else:
            correlation = self._predicted_search(plan, plan.known, start)
        found = self._points(self._needed.values())
        searched, measured = front(found), len(self._needed)
        drawn: list[Point] = []
        random_measured = 0
        if plan.random and plan.known is None:
            networks = self._random(measured, plan.genetics.seed)
            self.distances(networks)
            drawn, random_measured = self._points(networks), len(networks)
        volumes = hypervolumes(found, drawn)
        self.distances(list(uniform.values()))
        return Outcome(
            front=searched,
            random_front=front(drawn),
            uniform={name: self._point(subnet) for name, subnet in uniform.items()},
            measured=measured,
            random_measured=random_measured,
            new=self.distances.new,
            hypervolume=volumes[0],
            random_hypervolume=volumes[1] if drawn else None,
            correlation=correlation,
            points=found,
        )

    @property
    def _budgets(self) -> tuple[float, float]:
        return self.condition.latency_ms, self.condition.memory_bytes

    def _uniform(self) -> dict[str, Subnet]:
        """The uniform networks that the space has."""
        found = {}
        for name in UNIFORM:
            try:
                found[name] = self.space.parse(name)
            except SpaceError:
                continue
        return found

    def _costs(self, subnets: Sequence[Subnet]) -> NDArray[np.float64]:
        costs = [self.condition.costs.total(subnet) for subnet in subnets]
        return np.array([(cost.latency_ms, cost.memory_bytes) for cost in costs], dtype=np.float64).reshape(-1, 2)

    def _objectives(self, subnets: Sequence[Subnet]) -> NDArray[np.float64]:
        """Rows of distance, latency and memory; networks beyond the budgets are ranked by cost and not measured."""
        costs = self._costs(subnets)
        fits = [self.condition.fits(subnet) for subnet in subnets]
        inside = [subnet for subnet, fit in zip(subnets, fits, strict=True) if fit]
        values = iter(self.distances(inside))
        self._needed |= {self.space.name(subnet): subnet for subnet in inside}
        # Constraints are compared first: what stands here for a network beyond the budgets only has to be finite.
        column = np.array([next(values) if fit else BEYOND for fit in fits])
        return np.concatenate([column[:, None], costs], axis=1)

    def _predicted_search(self, plan: Plan, names: Sequence[str], start: Sequence[Subnet]) -> float | None:
        """Search on predicted distances, then measure the most promising networks; returns the rank correlation.

        Nothing but the named networks is taken from the cache, so that an interrupted search repeats itself.
        """
        known = {name: self.space.parse(name) for name in names}
        known = {name: subnet for name, subnet in known.items() if subnet.precision is Precision.INT}
        values = dict(zip(known, self.distances(list(known.values())), strict=True))
        model = DistancePredictor(self.space, list(known.values()), list(values.values()))
        seen: dict[str, Subnet] = {}

        def objectives(subnets: Sequence[Subnet]) -> NDArray[np.float64]:
            named = [self.space.name(subnet) for subnet in subnets]
            guessed = model.predict(subnets)
            distances = [values.get(name, guess) for name, guess in zip(named, guessed, strict=True)]
            seen.update(zip(named, subnets, strict=True))
            return np.concatenate([np.array(distances)[:, None], self._costs(subnets)], axis=1)

        fitting = {name: subnet for name, subnet in known.items() if self.condition.fits(subnet)}
        points = self._points(fitting.values())
        best = _thinned(front(points), plan.genetics.population // 2)
        begin = [*start[: plan.genetics.population // 4], *(fitting[point.subnet] for point in best)]
        evolve(self.space, begin, objectives, self._budgets, plan.genetics)
        new = {name: s for name, s in seen.items() if name not in known and self.condition.fits(s)}
        guesses = dict(zip(new, model.predict(list(new.values())), strict=True))
        chosen = _promising(points, self._guessed(new, guesses), plan.verify)
        measured = self.distances([new[name] for name in chosen])
        self._needed |= fitting | {name: new[name] for name in chosen}
        return rank_correlation([guesses[name] for name in chosen], measured)

    def _guessed(self, subnets: Mapping[str, Subnet], guesses: Mapping[str, float]) -> list[Point]:
        costs = self._costs(list(subnets.values()))
        return [Point(name, guesses[name], *row) for name, row in zip(subnets, costs.tolist(), strict=True)]

    def _points(self, subnets: Iterable[Subnet]) -> list[Point]:
        """Measured networks within the budgets."""
        return [self._point(subnet) for subnet in subnets if self.condition.fits(subnet)]

    def _point(self, subnet: Subnet) -> Point:
        name, cost = self.space.name(subnet), self.condition.costs.total(subnet)
        return Point(name, self.cache[name], cost.latency_ms, cost.memory_bytes)

    def _random(self, count: int, seed: int) -> list[Subnet]:
        """At most ``count`` different networks within the budgets, drawn with even depths, widths and bits."""
        generator = torch.Generator().manual_seed(step_seed(seed, 0) ^ RANDOM_STREAM)
        found: dict[Subnet, None] = {}
        for _ in range(TRIES * count):
            if len(found) == count:
                break
            subnet = stratified_subnet(self.space, generator, whole_network=False)
            if self.condition.fits(subnet):
                found[subnet] = None
        return list(found)


def _promising(known: Sequence[Point], guessed: Sequence[Point], count: int) -> list[str]:
    """Names of the ``count`` guessed points to measure: those of the front first, then those of what is left of it."""
    chosen: list[str] = []
    left = list(guessed)
    names = {point.subnet for point in guessed}
    while left and len(chosen) < count:
        layer = [point for point in front([*known, *left]) if point.subnet in names]
        if not layer:  # measured networks beat all that are left
            layer = front(left)
        layer = _thinned(layer, count - len(chosen))
        chosen.extend(point.subnet for point in layer)
        taken = set(chosen)
        left = [point for point in left if point.subnet not in taken]
    return chosen


def _thinned(points: Sequence[Point], count: int) -> list[Point]:
    """At most ``count`` of the points, evenly spread in their order, both ends included."""
    if len(points) <= count:
        return list(points)
    return [points[round(i * (len(points) - 1) / max(1, count - 1))] for i in range(count)]
