from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.conditions import Conditions
from training.draws import Phase
from training.sampler import ConfigurationSampler, SamplerConfig, SamplerError
from training.sampler_report import BUDGETS, Contestant, Report, sampler_report, train_samplers
from training.schedules import step_seed
from training.space import SearchSpace
from training.subnet import Precision, Subnet
from training.subnet_distribution import IMPOSSIBLE, SubnetDistribution
from training.synthetic_tables import synthetic_tensors

UPDATES = 350


@pytest.fixture(scope="session")
def samplers(space: SearchSpace, conditions: Conditions, pairs: tuple[list[Subnet], list[float]]) -> list[Contestant]:
    devices = conditions.measured | conditions.held_out
    return train_samplers(
        space,
        devices,
        conditions.synthetic,
        pairs,
        SamplerConfig(),
        held_out="unseen",
        kinds=("learned",),
        updates=UPDATES,
    )


@pytest.fixture(scope="session")
def report(samplers: list[Contestant]) -> Report:
    return sampler_report(samplers, draws=300, losses=0)


def test_draws_fit_their_budgets_on_known_devices_and_on_one_never_seen(report: Report) -> None:
    assert {(row.device, row.held_out) for row in report.rows} == {("orin", False), ("first", False), ("unseen", True)}
    assert {row.budget for row in report.rows} == set(BUDGETS) and len(report.rows) == 27
    short = [(row.device, row.budget, row.seed, row.share_within) for row in report.rows if row.share_within < 0.95]
    assert not short


def test_the_mean_cost_rises_with_the_budget(report: Report) -> None:
    assert report.monotone


def test_seeds_agree(report: Report) -> None:
    assert report.seed_difference is not None and report.seed_difference <= 0.1
    for device in ("orin", "first", "unseen"):
        for budget in BUDGETS:
            shares = [r.share_within for r in report.rows if r.device == device and r.budget == budget]
            assert max(shares) - min(shares) < 0.05


def test_the_entropy_does_not_collapse(report: Report) -> None:
    for row in report.rows:
        assert row.entropy is not None and row.entropy > 5.0
        assert row.distinct > 100  # of 300 draws
    means = [sum(row.entropy or 0.0 for row in report.rows if row.budget == budget) for budget in BUDGETS]
    assert means == sorted(means)  # more budget, more choice


def test_never_seen_synthetic_devices_fit_too(
    space: SearchSpace, samplers: list[Contestant], synthetic: list[Any]
) -> None:
    others = synthetic_tensors(space, torch.Generator().manual_seed(77), 12)
    unseen = Conditions(space, {f"other_{i}": costs for i, costs in enumerate(others)})
    sampler, generator, shares = samplers[0].sampler, torch.Generator().manual_seed(0), []
    for name in unseen.measured:
        for budget in BUDGETS:
            condition = unseen.between(name, budget)
            drawn = sampler.draw_many(condition, generator, 100)
            shares.append(sum(condition.fits(subnet) for subnet in drawn) / 100)
    assert sum(shares) / len(shares) >= 0.97
    assert min(shares) >= 0.88  # of 100 draws of each of 36 conditions


def test_draws_lose_less_than_those_of_the_other_samplers_at_the_same_budget(
    space: SearchSpace,
    conditions: Conditions,
    samplers: list[Contestant],
    pairs: tuple[list[Subnet], list[float]],
    true_loss: Callable[[Subnet], float],
) -> None:
    others = [
        Contestant(kind, 0, ConfigurationSampler(space, conditions, SamplerConfig(kind=kind), 0), true_loss)
        for kind in ("rejection", "uniform")
    ]
    learned = Contestant("learned", 0, samplers[0].sampler, true_loss)
    compared = sampler_report([learned, *others], budgets=(0.5,), draws=60, losses=60)
    cells = {(row.device, row.kind): row for row in compared.rows}
    for device in ("orin", "first", "unseen"):
        mine, rejection, uniform = (cells[device, kind] for kind in ("learned", "rejection", "uniform"))
        assert mine.share_within >= rejection.share_within >= uniform.share_within
        assert mine.loss_within is not None and rejection.loss_within is not None
        assert mine.loss_within < rejection.loss_within


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), bits=st.booleans(), width=st.booleans(), depth=st.booleans())
def test_draws_are_in_the_space_and_keep_to_the_phase(
    space: SearchSpace,
    conditions: Conditions,
    samplers: list[Contestant],
    seed: int,
    bits: bool,
    width: bool,
    depth: bool,
) -> None:
    generator, phase = torch.Generator().manual_seed(seed), Phase(bits, width, depth)
    condition = conditions.draw(generator)
    for subnet in samplers[0].sampler.draw_many(condition, generator, 5, phase):
        space.check(subnet)
        assert subnet.precision is Precision.INT
        assert depth or subnet.depth == 8
        for layer in subnet.layers:
            if layer is not None:
                assert width or (layer.heads, layer.mlp) == (4, 1024)
                assert bits or (layer.w, layer.a) == (8, 8)


def test_groups_keep_their_least_depth_under_any_budget(small_space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(0)
    conditions = Conditions(small_space, {}, synthetic_tensors(small_space, generator, 8))
    for kind in ("learned", "rejection", "uniform"):
        sampler = ConfigurationSampler(small_space, conditions, SamplerConfig(kind=kind, batch=4))
        for _ in range(5):
            sampler.update(generator)
        for _ in range(20):
            small_space.check(sampler.draw(conditions.draw(generator), generator))


@pytest.mark.parametrize("always_kept", [{}, {"decoder": "ends"}])
def test_depths_of_a_list_are_drawn_evenly_where_nothing_tells_them_apart(
    space: SearchSpace, always_kept: dict[str, str]
) -> None:
    changes = {"min_depth": {}, "depths": {"decoder": (2, 6, 8)}, "always_kept": always_kept}
    config = space.config.model_copy(update=changes)
    listed, generator = SearchSpace(space.shape, config), torch.Generator().manual_seed(0)
    conditions = Conditions(listed, {}, synthetic_tensors(listed, generator, 8))
    sampler = ConfigurationSampler(listed, conditions, SamplerConfig())
    condition = conditions.draw(generator)
    distribution = sampler.distribution(condition)
    skip = torch.full((1, 8), math.log(64.0))
    skip[0, list(listed.always_kept)] = IMPOSSIBLE
    free = SubnetDistribution(torch.zeros_like(distribution.choice), skip, distribution.groups)
    depths = Counter((free.sample(generator, 3000) < 64).sum(dim=1).tolist())
    assert sorted(depths) == [2, 6, 8] and max(abs(count - 1000) for count in depths.values()) < 120


def test_depths_come_from_the_list_under_any_budget(small_space: SearchSpace) -> None:
    config = small_space.config.model_copy(update={"min_depth": {"encoder": 1}, "depths": {"decoder": (1, 3)}})
    space, generator = SearchSpace(small_space.shape, config), torch.Generator().manual_seed(0)
    conditions = Conditions(space, {}, synthetic_tensors(space, generator, 8))
    drawn = []
    for kind in ("learned", "rejection", "uniform"):
        sampler = ConfigurationSampler(space, conditions, SamplerConfig(kind=kind, batch=4))
        for _ in range(5):
            assert all(math.isfinite(value) for value in sampler.update(generator).values())
        drawn += [sampler.draw(conditions.draw(generator), generator) for _ in range(40)]
    for subnet in drawn:
        space.check(subnet)
    assert {sum(layer is not None for layer in subnet.layers[2:]) for subnet in drawn} == {1, 3}


@pytest.mark.parametrize(("which", "kept", "free"), [("first", (2,), (3, 4)), ("ends", (2, 4), (3,))])
def test_blocks_that_are_always_kept_are_kept_under_any_budget(
    small_space: SearchSpace, which: str, kept: tuple[int, ...], free: tuple[int, ...]
) -> None:
    config = small_space.config.model_copy(update={"always_kept": {"decoder": which}})
    space, generator = SearchSpace(small_space.shape, config), torch.Generator().manual_seed(0)
    conditions = Conditions(space, {}, synthetic_tensors(space, generator, 8))
    for kind in ("learned", "rejection", "uniform"):
        sampler = ConfigurationSampler(space, conditions, SamplerConfig(kind=kind, batch=4))
        for _ in range(5):
            assert all(math.isfinite(value) for value in sampler.update(generator).values())
        drawn = [sampler.draw(conditions.draw(generator), generator) for _ in range(40)]
        assert all(subnet.layers[index] is not None for subnet in drawn for index in kept)
        assert any(subnet.layers[index] is None for subnet in drawn for index in free)


def test_the_penalty_on_cost_moves_the_sampler(space: SearchSpace, conditions: Conditions) -> None:
    costs = {}
    for lam in (1e-6, 20.0):
        sampler = ConfigurationSampler(space, conditions, SamplerConfig(lam=lam, average=0.0))
        for update in range(60):
            metrics = sampler.update(torch.Generator().manual_seed(step_seed(0, update)))
        costs[lam] = metrics["latency_over_budget"]
    assert costs[20.0] < 0.8 * costs[1e-6]


def test_mixed_draws_are_stratified_at_the_configured_share(space: SearchSpace, conditions: Conditions) -> None:
    sampler = ConfigurationSampler(space, conditions, SamplerConfig(stratified_share=0.4))
    generator = torch.Generator().manual_seed(0)
    condition = conditions.between("orin", 0.5)
    draws = [sampler.draw_mixed(condition, generator) for _ in range(300)]
    assert sum(draw.stratified for draw in draws) / 300 == pytest.approx(0.4, abs=0.08)
    assert all(draw.stratified for draw in draws if draw.subnet.precision is not Precision.INT)


@pytest.mark.parametrize("kind", ["learned", "rejection", "uniform"])
def test_a_sampler_continues_bit_for_bit_from_a_saved_state(
    space: SearchSpace, conditions: Conditions, pairs: tuple[list[Subnet], list[float]], kind: Any
) -> None:
    config = SamplerConfig(kind=kind, batch=4, fit_every=3)

    def advance(sampler: ConfigurationSampler, first: int, last: int) -> list[dict[str, float]]:
        metrics = []
        for step in range(first, last):
            sampler.observe(pairs[0][step : step + 2], pairs[1][step : step + 2])
            metrics.append(sampler.update(torch.Generator().manual_seed(step)))
        return metrics

    whole = ConfigurationSampler(space, conditions, config, seed=1)
    expected = advance(whole, 0, 10)[5:]
    first = ConfigurationSampler(space, conditions, config, seed=1)
    advance(first, 0, 5)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    continued = ConfigurationSampler(space, conditions, config, seed=2)
    continued.load_state_dict(torch.load(file, weights_only=True))
    assert advance(continued, 5, 10) == expected
    condition = conditions.between("orin", 0.4)
    drawn = [s.draw_many(condition, torch.Generator().manual_seed(3), 5) for s in (whole, continued)]
    assert drawn[0] == drawn[1]


def test_a_state_of_another_kind_is_refused(space: SearchSpace, conditions: Conditions) -> None:
    state = ConfigurationSampler(space, conditions, SamplerConfig(kind="uniform")).state_dict()
    with pytest.raises(SamplerError, match="kind uniform, the configuration says learned"):
        ConfigurationSampler(space, conditions, SamplerConfig()).load_state_dict(state)


def test_building_a_sampler_leaves_the_global_generator_alone(space: SearchSpace, conditions: Conditions) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    ConfigurationSampler(space, conditions, SamplerConfig(), seed=9)
    assert torch.rand(1) == expected


def test_a_loss_that_is_not_a_number_names_the_field_that_helps(space: SearchSpace, conditions: Conditions) -> None:
    sampler = ConfigurationSampler(space, conditions, SamplerConfig(batch=4))
    with torch.no_grad():
        sampler.network.base.fill_(math.nan)
    with pytest.raises(SamplerError, match=r"update 1 of the sampler: .*nan; lower supernet\.sampler\.learning_rate"):
        sampler.update(torch.Generator().manual_seed(0))
