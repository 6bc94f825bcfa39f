from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from training.subnet_distribution import IMPOSSIBLE, DepthGroup, SubnetDistribution

Groups = tuple[DepthGroup, ...]
GROUPS: Groups = (DepthGroup((0, 2), (1, 2)), DepthGroup((1, 3, 4), (2, 3)))  # from a least depth up
LISTED: Groups = (DepthGroup((0, 2), (0, 2)), DepthGroup((1, 3, 4), (1, 3)))  # with gaps
WEIGHED: Groups = (DepthGroup((0, 2), (0, 2), (1.5, -0.5)), DepthGroup((1, 3, 4), (1, 2, 3), (0.0, -3.0, 2.0)))
BLOCKS, CHOICES = 5, 2
of_all = pytest.mark.parametrize("groups", [GROUPS, LISTED, WEIGHED], ids=["least", "listed", "weighed"])


def enumerated(kept: Tensor, skip: Tensor, groups: Groups) -> list[tuple[tuple[int, ...], float]]:
    """Every subnet (choice per block, CHOICES where skipped) with its probability, by counting."""
    table = torch.softmax(torch.cat([kept, skip[:, None]], dim=1).double(), dim=1)
    found = []
    for numbers in itertools.product(range(CHOICES + 1), repeat=BLOCKS):
        if all(sum(numbers[m] != CHOICES for m in group.members) in group.counts for group in groups):
            chance = torch.stack([table[block, number] for block, number in enumerate(numbers)]).prod()
            for group in groups:
                count = sum(numbers[member] != CHOICES for member in group.members)
                if group.log_weights is not None:
                    chance = chance * math.exp(group.log_weights[group.counts.index(count)])
            found.append((numbers, float(chance)))
    total = sum(chance for _, chance in found)
    return [(numbers, chance / total) for numbers, chance in found]


@of_all
@pytest.mark.parametrize("shift", [0.0, 6.0, -6.0, 40.0])
def test_moments_marginals_entropy_and_divergence_equal_those_found_by_counting(shift: float, groups: Groups) -> None:
    generator = torch.Generator().manual_seed(int(shift) + 10)
    kept = torch.randn(1, BLOCKS, CHOICES, generator=generator)
    kept[0, 3, 1] = IMPOSSIBLE
    skip = torch.randn(1, BLOCKS, generator=generator) + shift
    costs = torch.rand(1, 2, BLOCKS, CHOICES, generator=generator)
    distribution = SubnetDistribution(kept, skip, groups)
    moments = distribution.moments(costs)

    every = [(numbers, chance) for numbers, chance in enumerated(kept[0], skip[0], groups) if chance > 0.0]
    chances = torch.tensor([chance for _, chance in every], dtype=torch.float64)
    sums = torch.tensor(
        [
            [sum(float(costs[0, r, b, n]) for b, n in enumerate(numbers) if n != CHOICES) for r in range(2)]
            for numbers, _ in every
        ],
        dtype=torch.float64,
    )
    mean = chances @ sums
    torch.testing.assert_close(moments.mean[0], mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(moments.variance[0], chances @ (sums - mean).square(), rtol=1e-5, atol=1e-9)
    entropy = -(chances * chances.log()).sum()
    torch.testing.assert_close(distribution.entropy(moments)[0], entropy, rtol=1e-6, atol=1e-9)
    # The reference: each block kept or skipped evenly, its choices evenly, depths weighed.
    even = [
        math.log(0.5) * BLOCKS
        - math.log(CHOICES) * sum(number != CHOICES for number in numbers)
        + sum(
            group.log_weights[group.counts.index(sum(numbers[member] != CHOICES for member in group.members))]
            for group in groups
            if group.log_weights is not None
        )
        for numbers, _ in every
    ]
    divergence = (chances * (chances.log() - torch.tensor(even, dtype=torch.float64))).sum()
    found = distribution.divergence(moments, distribution.entropy(moments), torch.full((BLOCKS,), CHOICES))
    torch.testing.assert_close(found[0], divergence, rtol=1e-6, atol=1e-9)
    marginals = torch.zeros(BLOCKS, CHOICES + 1, dtype=torch.float64)
    for numbers, chance in every:
        for block, number in enumerate(numbers):
            marginals[block, number] += chance
    torch.testing.assert_close(distribution.marginals(moments)[0], marginals, rtol=1e-6, atol=1e-9)


def test_divergence_is_zero_for_even_genes_without_a_condition() -> None:
    groups = (DepthGroup(tuple(range(BLOCKS)), tuple(range(BLOCKS + 1))),)
    even = SubnetDistribution(torch.zeros(1, BLOCKS, 4), torch.full((1, BLOCKS), 4.0).log(), groups)
    moments = even.moments(torch.zeros(1, 1, BLOCKS, 4))
    divergence = even.divergence(moments, even.entropy(moments), torch.full((BLOCKS,), 4))
    assert divergence.item() == pytest.approx(0.0, abs=1e-9)


@of_all
def test_gradients_equal_finite_differences(groups: Groups) -> None:
    generator = torch.Generator().manual_seed(3)
    kept = torch.randn(2, BLOCKS, CHOICES, generator=generator, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(2, BLOCKS, generator=generator, dtype=torch.float64, requires_grad=True)
    costs = torch.rand(2, 2, BLOCKS, CHOICES, generator=generator, dtype=torch.float64)

    def figures(kept: Tensor, skip: Tensor) -> tuple[Tensor, ...]:
        distribution = SubnetDistribution(kept, skip, groups)
        moments = distribution.moments(costs)
        return moments.mean, moments.variance, distribution.entropy(moments), distribution.marginals(moments)

    assert torch.autograd.gradcheck(figures, (kept, skip))


@of_all
def test_gradients_stay_finite_where_choices_and_skips_are_ruled_out(groups: Groups) -> None:
    kept = torch.zeros(1, BLOCKS, CHOICES, requires_grad=True)
    masked = torch.where(torch.tensor([True, False]), kept, IMPOSSIBLE)
    distribution = SubnetDistribution(masked, torch.full((1, BLOCKS), IMPOSSIBLE), groups)
    moments = distribution.moments(torch.ones(1, 2, BLOCKS, CHOICES))
    (moments.mean.sum() + moments.variance.sum() + distribution.entropy(moments).sum()).backward()
    assert moments.kept.tolist() == [[1.0] * BLOCKS] and moments.mean[0, 0] == BLOCKS
    assert kept.grad is not None and kept.grad.isfinite().all()


@of_all
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_samples_follow_the_probabilities_found_by_counting(shift: float, groups: Groups) -> None:
    generator = torch.Generator().manual_seed(8)
    kept, skip = torch.randn(1, BLOCKS, CHOICES, generator=generator), torch.randn(1, BLOCKS, generator=generator)
    count = 20_000
    drawn = SubnetDistribution(kept, skip + shift, groups).sample(generator, count)
    chances = dict(enumerated(kept[0], skip[0] + shift, groups))
    seen: dict[tuple[int, ...], int] = {}
    for numbers in map(tuple, drawn.tolist()):
        seen[numbers] = seen.get(numbers, 0) + 1
    assert set(seen) <= set(chances)
    for numbers, chance in chances.items():
        assert abs(seen.get(numbers, 0) - count * chance) < 5 * (count * chance) ** 0.5 + 3
