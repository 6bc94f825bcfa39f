from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training.commands import ArgumentError
from training.conditions import Conditions, smallest_subnet
from training.predictor import ChoiceIndex
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
    closest = closest_network(wanted)
    assert not wanted.fits(closest)
    message = str(infeasible(wanted, closest))
    assert "no network keeps both on orin; the closest" in message
    assert space.name(closest) in message and "% more" in message and "within" in message


def test_a_network_within_both_budgets_is_found(space: SearchSpace, slow_at_four_bits: Conditions) -> None:
    costs = slow_at_four_bits.measured["orin"]
    fastest, smallest = costs.total(space.smallest(8, 4)), costs.total(space.smallest(4, 4))
    wanted = condition(slow_at_four_bits, "orin", Budgets(smallest.latency_ms, fastest.memory_bytes))
    assert wanted.fits(closest_network(wanted))


def test_a_network_that_only_a_concave_part_of_the_front_holds_is_found(
    space: SearchSpace, conditions: Conditions
) -> None:
    """Between two networks that are best in any mixture of latency and memory lies one that is best in none."""
    costs = conditions.measured["orin"]
    latency, memory = torch.full_like(costs.latency, 9.0), torch.full_like(costs.memory, 9e6)
    latency[..., 0, 0], memory[..., 0, 0] = 1.0, 5e6
    latency[..., 1, 0], memory[..., 1, 0] = 5.0, 1e6
    orin = replace(costs, latency=latency, memory=memory, fixed_latency=0.1, fixed_memory=0.0)
    wanted = condition(Conditions(space, {"orin": orin}, []), "orin", Budgets(7.2, 7.2e6))
    middle = closest_network(wanted)
    assert wanted.fits(middle)
    assert middle.depth == 2


def test_the_closest_network_is_that_of_all_networks(conditions: Conditions, space: SearchSpace) -> None:
    """Against every network of two equal blocks, the activations of which count once."""
    costs = conditions.measured["orin"]
    generator = torch.Generator().manual_seed(0)
    latency = costs.latency[:1] * (0.5 + torch.rand(costs.latency[:1].shape, generator=generator))
    orin = replace(costs, latency=latency.expand_as(costs.latency).clone())
    wanted = condition(Conditions(space, {"orin": orin}, []), "orin", Budgets())
    index = ChoiceIndex(space)
    skipped = [index.count] * (len(space.shape.blocks) - 2)
    every = [index.decode([i, j, *skipped]) for i in range(index.count) for j in range(i, index.count)]
    totals = [orin.total(subnet) for subnet in every]
    for share in (0.02, 0.1, 0.3):
        latencies, memories = [t.latency_ms for t in totals], [t.memory_bytes for t in totals]
        tight = replace(
            wanted,
            latency_ms=min(latencies) + share * (max(latencies) - min(latencies)),
            memory_bytes=min(memories) + share * (max(memories) - min(memories)),
        )
        least = min(tight.excess(subnet) for subnet in every)
        assert tight.excess(closest_network(tight)) == pytest.approx(least, abs=1e-6)
