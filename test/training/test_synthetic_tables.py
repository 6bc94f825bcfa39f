"""Randomised devices: reproducible, of every kind, and consistent with how memory is counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Generator

from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.policy_shape import PolicyShape
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.space_counts import real_bytes
from training.subnet import Precision
from training.synthetic_tables import synthetic_table, synthetic_tensors

SPACE = SearchSpace(
    diffusion_policy_t_shape(DiffusionPolicyTConfig(), tokens=9),
    SpaceConfig(min_depth={"decoder": 2}, head_ratios=(0.25, 0.5, 0.75, 1.0), mlp_ratios=(0.25, 0.5, 0.75, 1.0)),
)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_the_same_seed_gives_the_same_devices() -> None:
    first, second = (synthetic_tensors(SPACE, generator(3), 5) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.latency, b.latency)
        assert torch.equal(a.memory, b.memory)
        assert (a.fixed_latency, a.fixed_memory) == (b.fixed_latency, b.fixed_memory)
    assert not torch.equal(first[0].latency, synthetic_table(SPACE, generator(4)).latency)


def test_every_cost_is_finite_and_positive() -> None:
    for costs in synthetic_tensors(SPACE, generator(), 300):
        assert costs.latency.shape == costs.memory.shape == (8, 4, 4, 2, 2)
        assert costs.latency.dtype == costs.memory.dtype == torch.float32
        assert torch.isfinite(costs.latency).all() and (costs.latency > 0).all()
        assert (costs.memory > 0).all() and costs.fixed_latency > 0 and costs.fixed_memory > 0


def test_devices_spread_over_orders_of_magnitude_and_all_kinds_of_gain_from_four_bits() -> None:
    drawn = synthetic_tensors(SPACE, generator(), 600, steps=16)
    full = torch.tensor([float(costs.latency[0, 3, 3, 1, 1]) for costs in drawn])
    low = torch.tensor([float(costs.latency[0, 3, 3, 0, 0]) for costs in drawn])
    assert full.max() / full.min() > 100
    gain = full / low
    assert (gain > 1.3).float().mean() > 0.1
    assert (gain < 0.8).float().mean() > 0.03
    assert ((gain - 1).abs() < 0.1).float().mean() > 0.2
    # Widths matter on some devices and hardly on others, where launches hide the arithmetic.
    width = full / torch.tensor([float(costs.latency[0, 0, 0, 1, 1]) for costs in drawn])
    assert (width > 3).float().mean() > 0.1 and (width < 1.3).float().mean() > 0.1


def test_memory_is_that_of_packed_weights_or_of_containers() -> None:
    shape = SPACE.shape
    kinds = set()
    for costs in synthetic_tensors(SPACE, generator(), 40):
        total = {bits: costs.total(SPACE.largest(Precision.INT, bits, 8)).memory_bytes for bits in (4, 8)}
        saved = total[8] - total[4]
        packed = real_bytes(shape, SPACE.largest(Precision.INT, 8, 8)) - real_bytes(
            shape, SPACE.largest(Precision.INT, 4, 8)
        )
        kinds.add(saved > 0)
        assert saved == pytest.approx(packed, rel=1e-5) or saved == 0
    assert kinds == {True, False}


def test_equal_blocks_cost_the_same_and_different_ones_do_not() -> None:
    blocks = list(SPACE.shape.blocks)
    linears = tuple(dataclasses.replace(linear, stage="chunk") for linear in blocks[0].linears)
    blocks[:2] = [dataclasses.replace(b, kind="encoder", group="encoder", linears=linears) for b in blocks[:2]]
    shape = PolicyShape("other", tuple(blocks), 1000, 1000, 1000)
    config = SPACE.config.model_copy(update={"min_depth": {"encoder": 1, "decoder": 1}})
    costs = synthetic_table(SearchSpace(shape, config), generator(), steps=16)
    assert torch.equal(costs.latency[0], costs.latency[1])
    assert torch.equal(costs.latency[2], costs.latency[7])
    assert (costs.latency[0] < costs.latency[2]).all(), "what runs once per chunk costs less than what runs 16 times"


@pytest.mark.parametrize(("n", "steps", "label"), [(0, None, "n"), (1, 0, "steps")])
def test_impossible_numbers_are_named(n: int, steps: int | None, label: str) -> None:
    with pytest.raises(ValueError, match=f"{label}: expected at least 1"):
        synthetic_tensors(SPACE, generator(), n, steps)
