from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training.conditions import (
    BudgetError,
    Conditions,
    cheapest_subnet,
    condition_batch,
    largest_subnet,
    smallest_subnet,
)
from training.cost import CostTensors
from training.space import SearchSpace


def test_budgets_lie_between_the_smallest_and_the_largest_cost_of_a_device_in_training(
    space: SearchSpace, conditions: Conditions
) -> None:
    generator = torch.Generator().manual_seed(0)
    places, names = [], set()
    for _ in range(300):
        condition = conditions.draw(generator)
        names.add(condition.name)
        low = condition.costs.total(smallest_subnet(space)).latency_ms
        high = max(low, condition.costs.total(largest_subnet(space)).latency_ms)
        assert low * (1 - 1e-5) <= condition.latency_ms <= high * (1 + 1e-5)
        assert condition.fits(smallest_subnet(space)) or condition.latency_ms < low * (1 + 1e-5)
        if high > 1.01 * low:
            places.append(torch.log(torch.tensor(condition.latency_ms / low)) / torch.log(torch.tensor(high / low)))
    assert torch.tensor(places).mean() == pytest.approx(0.5, abs=0.06)  # log-uniform
    assert {"orin", "first"} <= names and "unseen" not in names and any(n.startswith("synthetic") for n in names)


def test_a_batch_holds_costs_relative_to_budgets(space: SearchSpace, conditions: Conditions) -> None:
    condition = conditions.between("orin", 0.5)
    batch = condition_batch(space, [condition])
    cost = condition.costs.total(largest_subnet(space))
    numbers = torch.tensor([batch.relative.shape[3] - 1] * len(space.shape.blocks))
    total = batch.fixed + batch.relative[:, :, torch.arange(len(numbers)), numbers].sum(dim=2)
    assert total[0].tolist() == pytest.approx(
        [cost.latency_ms / condition.latency_ms, cost.memory_bytes / condition.memory_bytes], rel=1e-4
    )
    assert torch.allclose(total, batch.greatest, rtol=1e-4)
    drawn = conditions.batch(torch.Generator().manual_seed(1), 64)
    assert (drawn.least <= 1.0 + 1e-5).all() and (drawn.greatest >= 1.0 - 1e-5).all()


def test_a_budget_below_the_least_network_is_refused_with_what_would_do(
    space: SearchSpace, conditions: Conditions
) -> None:
    low = conditions.between("orin", 0.0)
    named = conditions.condition("orin", low.latency_ms, low.memory_bytes)
    assert named.fits(smallest_subnet(space))
    with pytest.raises(
        BudgetError, match=r"orin: latency budget .* is below the .* ms of the network that takes least \(d2-"
    ):
        conditions.condition("orin", 0.9 * low.latency_ms, low.memory_bytes)
    with pytest.raises(BudgetError, match=r"orin: memory budget .* give at least that much"):
        conditions.condition("orin", low.latency_ms, 0.9 * low.memory_bytes)
    with pytest.raises(BudgetError, match=r"orin: latency budget nan"):
        conditions.condition("orin", float("nan"), low.memory_bytes)


def test_unknown_devices_and_none_at_all_are_refused(
    space: SearchSpace, conditions: Conditions, devices: dict[str, CostTensors]
) -> None:
    with pytest.raises(BudgetError, match="abacus: no such device; known: first, orin, unseen"):
        conditions.between("abacus", 0.5)
    with pytest.raises(BudgetError, match=r"held_out: expected one of the measured devices \(first, orin, unseen\)"):
        Conditions(space, devices, held_out="abacus")
    with pytest.raises(BudgetError, match="no device is left"):
        Conditions(space, {"orin": devices["orin"]}, held_out="orin")


def test_a_device_that_is_slow_at_four_bits_takes_budgets_that_its_smallest_subnet_exceeds(
    space: SearchSpace, devices: dict[str, CostTensors]
) -> None:
    latency = devices["orin"].latency.clone()
    latency[..., 0, :] *= 2.0
    slow = replace(devices["orin"], latency=latency)
    conditions = Conditions(space, {"orin": slow})
    cheapest, least = cheapest_subnet(slow, slow.latency)
    assert least < slow.total(smallest_subnet(space)).latency_ms
    assert conditions.condition("orin", least, 1e12).fits(cheapest)
    with pytest.raises(BudgetError, match=r"of the network that takes least \(\S*w8"):
        conditions.condition("orin", 0.9 * least, 1e12)
