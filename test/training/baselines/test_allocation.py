"""Greedy demotion: the budget, the order, and who shares."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from training.baselines.allocation import CHANNEL_BITS, AllocationError, demote, demotions, kept, mean_bits

STEPS = len(CHANNEL_BITS) - 1


@st.composite
def channels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Sensitivities of any shape, also with cheap steps behind dear ones and with ties, and sizes of channels."""
    count = draw(st.integers(1, 12))
    values = draw(arrays.arrays(np.float64, (count, STEPS), elements=st.floats(0, 1e6) | st.integers(0, 3).map(float)))
    sizes = draw(arrays.arrays(np.int64, count, elements=st.sampled_from([16, 256, 1024])))
    return np.column_stack([np.zeros(count), values]), sizes


budgets = st.floats(0, 16)


def reference(sensitivity: np.ndarray, sizes: np.ndarray, budget: float) -> np.ndarray:
    """The greedy rule one step at a time, by a queue."""
    level = np.zeros(len(sizes), int)

    def cost(channel: int) -> float:
        low, high = level[channel] + 1, level[channel]
        span = CHANNEL_BITS[high] - CHANNEL_BITS[low]
        return float((sensitivity[channel, low] - sensitivity[channel, high]) / span)

    queue = [(cost(channel), channel) for channel in range(len(sizes))]
    heapq.heapify(queue)
    while mean_bits(np.asarray(CHANNEL_BITS)[level], sizes) > budget:
        _, channel = heapq.heappop(queue)
        level[channel] += 1
        if level[channel] < STEPS:
            heapq.heappush(queue, (cost(channel), channel))
    return np.asarray(CHANNEL_BITS)[level]


@settings(max_examples=20, deadline=None)
@given(channels(), budgets)
def test_the_budget_always_holds_and_no_further_step_is_made(case: Any, budget: float) -> None:
    sensitivity, sizes = case
    bits = demote(sensitivity, sizes, budget)
    assert mean_bits(bits, sizes) <= budget
    steps = demotions(sensitivity)
    made = sum(CHANNEL_BITS.index(width) for width in bits)
    if made:
        level = list(CHANNEL_BITS).index(bits[steps.channel[made - 1]])
        bits[steps.channel[made - 1]] = CHANNEL_BITS[level - 1]
        assert mean_bits(bits, sizes) > budget


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), budgets)
def test_demotion_is_that_of_the_rule_one_step_at_a_time(seed: int, budget: float) -> None:
    generator = np.random.default_rng(seed)
    sensitivity = np.column_stack([np.zeros(9), generator.lognormal(0, 2, (9, STEPS))])  # no ties
    sizes = generator.choice([16, 256], 9)
    np.testing.assert_array_equal(demote(sensitivity, sizes, budget), reference(sensitivity, sizes, budget))


@settings(max_examples=20, deadline=None)
@given(channels())
def test_demotion_order_is_monotone(case: Any) -> None:
    steps = demotions(case[0])
    assert (np.diff(steps.cost) >= 0).all()
    for channel in range(len(case[1])):
        np.testing.assert_array_equal(steps.level[steps.channel == channel], np.arange(STEPS))


@settings(max_examples=20, deadline=None)
@given(channels(), budgets, budgets)
def test_a_smaller_budget_only_demotes_further(case: Any, one: float, other: float) -> None:
    assert (demote(*case, min(one, other)) <= demote(*case, max(one, other))).all()


@settings(max_examples=20, deadline=None)
@given(channels(), budgets)
def test_equal_sensitivities_share(case: Any, budget: float) -> None:
    sensitivity, sizes = case
    sensitivity[:] = sensitivity[0]
    levels = [CHANNEL_BITS.index(width) for width in demote(sensitivity, sizes, budget)]
    assert max(levels) - min(levels) <= 1


@settings(max_examples=20, deadline=None)
@given(channels(), budgets, st.floats(1e-3, 1e3))
def test_a_channel_that_suffers_more_from_every_step_keeps_no_fewer_bits(case: Any, budget: float, by: float) -> None:
    sensitivity, sizes = np.abs(case[0]), case[1]
    worse = np.concatenate([sensitivity, sensitivity[:1] + by * np.asarray([0, 8, 12, 14, 16])])
    bits = demote(worse, np.append(sizes, sizes[0]), budget)
    assert bits[-1] >= bits[0]


def test_a_free_budget_changes_nothing_and_none_prunes_everything() -> None:
    sensitivity, sizes = np.tile([0.0, 1.0, 2.0, 4.0, 8.0], (3, 1)), [4, 4, 4]
    assert demote(sensitivity, sizes, 16.0).tolist() == [16, 16, 16]
    assert demote(sensitivity, sizes, 0.0).tolist() == [0, 0, 0]


def test_the_mean_counts_weights_and_not_channels() -> None:
    sensitivity = np.array([[0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 9.0, 18.0, 27.0, 36.0]])
    bits = demote(sensitivity, [1024, 256], 8.0)
    assert mean_bits(bits, [1024, 256]) <= 8.0
    assert bits.tolist() == [4, 16]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([[0.0, 1.0]], [4], 4.0), "sensitivity"),
        (([[0.0, 1.0, np.nan, 2.0, 3.0]], [4], 4.0), "not finite"),
        (([[0.0, 1.0, 2.0, 3.0, 4.0]], [0], 4.0), "sizes"),
        (([[0.0, 1.0, 2.0, 3.0, 4.0]], [4, 4], 4.0), "sizes"),
        (([[0.0, 1.0, 2.0, 3.0, 4.0]], [4], -1.0), "budget"),
        (([[0.0, 1.0, 2.0]], [4], 1.0, (8, 4, 2)), "budget"),
        (([[0.0, 1.0, 2.0]], [4], 8.0, (8, 8, 2)), "widths"),
    ],
)
def test_bad_input_is_refused_by_name(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(AllocationError, match=named):
        demote(*arguments)


@settings(max_examples=20, deadline=None)
@given(arrays.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 10)), st.floats(0, 1))
def test_the_most_important_share_is_kept(importance: np.ndarray, share: float) -> None:
    chosen = kept(importance, share)
    assert chosen.sum() == round(share * len(importance))
    if chosen.any() and not chosen.all():
        assert importance[chosen].min() >= importance[~chosen].max()


def test_a_share_beyond_everything_is_refused() -> None:
    with pytest.raises(AllocationError, match="share"):
        kept([1.0, 2.0], 1.5)
    with pytest.raises(AllocationError, match="importance"):
        kept([1.0, np.inf], 0.5)
