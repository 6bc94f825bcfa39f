from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from training.conditions import Conditions
from training.search.cache import DistanceCache
from training.search.nsga import Genetics
from training.search.run import DeviceSearch, Outcome, Plan
from training.search.session import KnownDistances
from training.space import SearchSpace

SMALL = Genetics(24, 12, 1)
PLAN = Plan(SMALL)


class StopError(Exception):
    """Ctrl-C, for instance."""


def searched(
    space: SearchSpace, conditions: Conditions, folder: Path, measure, plan: Plan = PLAN, share: float = 0.4
) -> Outcome:
    cache = DistanceCache(folder, {"test": 1})
    try:
        distances = KnownDistances(space, cache, measure)
        return DeviceSearch(space, conditions.between("orin", share), distances).run(plan)
    finally:
        cache.close()


def test_every_network_of_the_front_fits_and_was_measured(
    space: SearchSpace, conditions: Conditions, made_up, tmp_path: Path
) -> None:
    outcome = searched(space, conditions, tmp_path, made_up)
    condition = conditions.between("orin", 0.4)
    assert outcome.front and outcome.correlation is None
    for point in outcome.front:
        subnet = space.parse(point.subnet)
        assert condition.fits(subnet) and subnet in made_up.asked
        assert point.distance == made_up.distance(subnet)
        cost = condition.costs.total(subnet)
        assert (point.latency_ms, point.memory_bytes) == (cost.latency_ms, cost.memory_bytes)
    assert len(made_up.asked) == len(set(made_up.asked)) == outcome.new
    assert set(outcome.uniform) == {"w8a8", "w4a8", "w8a4", "w4a4", "smallest"}


def test_it_beats_random_search_at_as_many_distances(
    space: SearchSpace, conditions: Conditions, made_up, tmp_path: Path
) -> None:
    outcome = searched(space, conditions, tmp_path, made_up, Plan(Genetics(32, 25, 0)))
    assert outcome.random_measured == outcome.measured > 100
    assert outcome.random_hypervolume is not None
    assert outcome.hypervolume > 1.02 * outcome.random_hypervolume > 0.0


def test_an_interrupted_search_goes_on_without_measuring_anything_twice(
    space: SearchSpace, conditions: Conditions, made_up, tmp_path: Path
) -> None:
    whole = searched(space, conditions, tmp_path / "whole", made_up)
    expected, made_up.asked = list(made_up.asked), []

    def stops(subnets):
        for value in made_up(subnets):
            if len(made_up.asked) > 60:
                made_up.asked.pop()
                raise StopError
            yield value

    with pytest.raises(StopError):
        searched(space, conditions, tmp_path / "cut", stops)
    resumed = searched(space, conditions, tmp_path / "cut", made_up)
    assert made_up.asked == expected
    assert resumed.front == whole.front and resumed.hypervolume == whole.hypervolume


def test_a_further_search_measures_no_more_than_it_may_and_repeats_itself(
    space: SearchSpace, conditions: Conditions, made_up, tmp_path: Path
) -> None:
    first = searched(space, conditions, tmp_path / "first", made_up)
    cache = DistanceCache(tmp_path / "first", {"test": 1})
    names = tuple(name for name, _ in cache.items())
    cache.close()
    shutil.copytree(tmp_path / "first", tmp_path / "cut")
    made_up.asked = []
    plan = Plan(SMALL, known=names, verify=20)
    second = searched(space, conditions, tmp_path / "first", made_up, plan, share=0.6)
    assert 3 <= len(made_up.asked) <= 20 and second.new == len(made_up.asked)
    assert second.correlation is not None and second.correlation > 0.5
    assert second.random_front == [] and second.random_hypervolume is None
    condition = conditions.between("orin", 0.6)
    assert all(condition.fits(space.parse(point.subnet)) for point in second.front)
    best = min(point.distance for point in first.front if condition.fits(space.parse(point.subnet)))
    assert min(point.distance for point in second.front) < best
    again = searched(space, conditions, tmp_path / "first", made_up, plan, share=0.6)
    assert again.new == 0 and again.front == second.front and again.correlation == second.correlation

    expected, made_up.asked = list(made_up.asked), []

    def stops(subnets):
        for count, value in enumerate(made_up(subnets)):
            if count == 7:
                made_up.asked.pop()
                raise StopError
            yield value

    with pytest.raises(StopError):
        searched(space, conditions, tmp_path / "cut", stops, plan, share=0.6)
    resumed = searched(space, conditions, tmp_path / "cut", made_up, plan, share=0.6)
    assert made_up.asked == expected and resumed.front == second.front


def test_the_random_search_can_be_left_out(space: SearchSpace, conditions: Conditions, made_up, tmp_path: Path) -> None:
    outcome = searched(space, conditions, tmp_path, made_up, Plan(SMALL, random=False))
    assert outcome.random_front == [] and outcome.random_hypervolume is None
    document = outcome.document(space)
    assert document["front"][0]["mean_bits"] >= 4.0 and document["random_hypervolume"] is None
