from __future__ import annotations

from dataclasses import replace

import pytest

from training.commands import ArgumentError
from training.conditions import Conditions, smallest_subnet
from training.search.budgets import Budgets, closest_network, condition, infeasible
from training.space import SearchSpace

MEGA = 1e6


@pytest.fixture
def slow_at_four_bits(space: SearchSpace, conditions: Conditions) -> Conditions:
    """A device that multiplies 4-bit weights in twice the time of 8-bit ones."""
    costs = conditions.measured["orin"]
    latency = costs.latency.clone()
    latency[..., 0, :] *= 2.0
    return Conditions(space, {"orin": replace(costs, latency=latency)}, [])


def test_budgets_that_are_not_given_exclude_nothing(space: SearchSpace, conditions: Conditions) -> None:
    wanted = condition(conditions, "orin", Budgets())
    assert wanted.fits(space.parse("w8a8")) and wanted.fits(smallest_subnet(space))


def test_the_closest_network_is_the_fastest_one_and_not_always_the_smallest(
    space: SearchSpace, slow_at_four_bits: Conditions
) -> None:
    costs = slow_at_four_bits.measured["orin"]
    fastest, smallest = costs.total(space.smallest(8, 4)), costs.total(space.smallest(4, 4))
    assert fastest.latency_ms < smallest.latency_ms
    between = 0.5 * (fastest.latency_ms + smallest.latency_ms)
    assert condition(slow_at_four_bits, "orin", Budgets(between)).latency_ms == between
    with pytest.raises(ArgumentError, match=r"the closest network \(w8a\d\S*\) takes \S+ ms on orin, 100.0 % more"):
        condition(slow_at_four_bits, "orin", Budgets(0.5 * fastest.latency_ms))


def test_budgets_that_exclude_each_other_are_told_with_the_closest_network(
    space: SearchSpace, slow_at_four_bits: Conditions
) -> None:
    costs = slow_at_four_bits.measured["orin"]
    fastest, smallest = costs.total(space.smallest(8, 4)), costs.total(space.smallest(4, 4))
    wanted = condition(slow_at_four_bits, "orin", Budgets(fastest.latency_ms, smallest.memory_bytes))
    closest = closest_network(space, wanted)
    assert not wanted.fits(closest)
    message = str(infeasible(wanted, closest))
    assert "no network was found that keeps both on orin; the closest" in message
    assert space.name(closest) in message and "% more" in message and "within" in message


def test_a_network_within_both_budgets_is_found(space: SearchSpace, slow_at_four_bits: Conditions) -> None:
    costs = slow_at_four_bits.measured["orin"]
    fastest, smallest = costs.total(space.smallest(8, 4)), costs.total(space.smallest(4, 4))
    wanted = condition(slow_at_four_bits, "orin", Budgets(smallest.latency_ms, fastest.memory_bytes))
    assert wanted.fits(closest_network(space, wanted))
