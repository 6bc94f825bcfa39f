"""Numbering, merging and continuing of action chunks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.bundle.schema import ActionSpec
from dcqfa_ros.runtime.chunk_buffer import ChunkBuffer
from dcqfa_ros.runtime.chunking import ENSEMBLE_DECAY, ChunkPlan, Inference, Method, Timing, fit_timing, soft_mask
from test.runtime.conftest import tiny_spec

ACTION = tiny_spec()[0].action  # 16 tokens, the first of them past, 8 executed
AVAILABLE = 15


def action_spec(horizon: int = 16, first: int = 1, executed: int = 8) -> ActionSpec:
    changes = {"horizon": horizon, "first_executed": first, "executed": executed}
    return ACTION.model_copy(update=changes)


def numbered(inference: Inference, offset: float = 0.0) -> np.ndarray:
    """A prediction that says of every action its number."""
    numbers = np.arange(inference.first, inference.first + inference.actions, dtype=np.float64) + offset
    return np.stack([numbers, -numbers], axis=1)


class Arm:
    """The arm's buffer, fed by a plan."""

    def __init__(self, plan: ChunkPlan) -> None:
        self.plan, self.buffer, self.executed = plan, ChunkBuffer(2), []

    def consume(self, actions: int) -> None:
        for _ in range(actions):
            action = self.buffer.next()
            if action is not None:
                self.executed.append(action)

    def chunk(self, delay: int, real_delay: int | None = None, offset: float = 0.0) -> Inference:
        inference = self.plan.begin(self.buffer.consumed, delay)
        self.consume(delay if real_delay is None else real_delay)
        published = self.plan.finish(inference, numbered(inference, offset), self.buffer.consumed)
        self.buffer.push(published.first, published.actions)
        return inference


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    horizon=st.integers(2, 20),
    first=st.integers(0, 2),
    rounds=st.lists(
        st.tuples(st.sampled_from(Method), st.integers(0, 25), st.integers(0, 40), st.integers(0, 40)),
        min_size=1,
        max_size=12,
    ),
)
def test_no_action_is_repeated_or_skipped_whatever_the_delays_starvations_and_methods(
    data: st.DataObject, horizon: int, first: int, rounds: list[tuple[Method, int, int, int]]
) -> None:
    horizon += first
    executed = data.draw(st.integers(1, horizon - first))
    plan = ChunkPlan(action_spec(horizon, first, executed), Method.ASYNCHRONOUS)
    arm = Arm(plan)
    for method, delay, real_delay, between in rounds:
        plan.configure(method, data.draw(st.integers(0, horizon)), prefix=first + 3)
        arm.consume(between)
        if arm.buffer.consumed < plan.due:
            continue
        end, due = plan.end, plan.due
        inference = plan.begin(arm.buffer.consumed, delay)
        arm.consume(real_delay)
        assert inference.first <= end, "a gap"
        published = plan.finish(inference, numbered(inference), arm.buffer.consumed)
        if len(published.actions) + published.first <= arm.buffer.consumed:
            assert real_delay >= len(published.actions), "useless although it came in time"
            continue
        arm.buffer.push(published.first, published.actions)
        assert plan.end == published.first + len(published.actions) == arm.buffer.consumed + arm.buffer.remaining
        assert plan.due > due or plan.due > inference.first
        if inference.continuation is not None:
            previous = inference.continuation.previous
            assert 0 <= inference.continuation.frozen <= len(previous) <= horizon
            numbers = np.maximum(0, np.arange(len(previous)) + inference.first - first)
            np.testing.assert_array_equal(previous[:, 0], numbers)
    np.testing.assert_allclose([a[0] for a in arm.executed], np.arange(len(arm.executed)), rtol=1e-6)


@pytest.mark.parametrize("method", [m for m in Method if m.overlaps])
@pytest.mark.parametrize("delay", [0, 1, 4, 7])
def test_an_arm_that_is_served_in_time_never_runs_dry(method: Method, delay: int) -> None:
    plan = ChunkPlan(ACTION, method, prefix=8)
    arm = Arm(plan)
    arm.chunk(0)
    for _ in range(10):
        arm.consume(plan.due - arm.buffer.consumed)
        arm.chunk(delay)
    assert arm.buffer.starved == 0


def test_synchronous_execution_uses_up_the_executed_actions_before_the_next_inference() -> None:
    plan = ChunkPlan(ACTION, Method.SYNCHRONOUS)
    arm = Arm(plan)
    assert arm.chunk(5, real_delay=0) == Inference(0, 8, Timing(0, 8), None)
    assert (plan.due, plan.end) == (8, 8)
    arm.consume(8)
    assert arm.chunk(5, real_delay=5).first == 8 and arm.buffer.starved == 5 and plan.due == 16


def test_a_continuation_holds_what_was_executed_and_what_is_left() -> None:
    plan = ChunkPlan(ACTION, Method.SOFT, execution_horizon=6)
    arm = Arm(plan)
    assert arm.chunk(0).continuation is None
    arm.consume(6)
    continuation = arm.chunk(2, offset=100.0).continuation
    assert continuation is not None and continuation.method is Method.SOFT
    np.testing.assert_array_equal(continuation.previous[:, 0], np.arange(5, 15))
    assert (continuation.frozen, continuation.horizon) == (3, 6)  # one past token and the delay
    arm.consume(4)
    continuation = plan.begin(12, 2).continuation
    assert continuation is not None  # 6 and 7 were executed while the second chunk was computed
    np.testing.assert_array_equal(continuation.previous[:, 0], np.arange(11, 21) + 100)
    np.testing.assert_array_equal([a[0] for a in arm.executed], [*range(8), *range(108, 112)])


def test_a_starved_arm_leaves_only_the_past_tokens_to_continue() -> None:
    plan = ChunkPlan(ACTION, Method.TRAINED, prefix=4)
    arm = Arm(plan)
    arm.chunk(0)
    arm.consume(40)
    inference = plan.begin(arm.buffer.consumed, 3)
    assert inference.first == 15 and inference.continuation is not None
    assert (len(inference.continuation.previous), inference.continuation.frozen) == (1, 1)


@pytest.mark.parametrize("past", [1, 3])
def test_a_resumed_plan_continues_nothing_until_its_past_tokens_are_known(past: int) -> None:
    """A policy that was restarted within an episode, whose first chunk is lost: the arm has still consumed as many."""
    plan = ChunkPlan(action_spec(first=past), Method.SOFT, execution_horizon=1)
    plan.resume(40)
    inference = plan.begin(40, 1)
    plan.finish(inference, np.zeros((inference.actions, 2), np.float32), 40)
    for consumed in range(40, 40 + past):
        assert plan.begin(consumed, 1).continuation is None
    continuation = plan.begin(40 + past, 1).continuation
    assert continuation is not None and len(continuation.previous) == 16 - past


def test_ensembling_weighs_the_oldest_prediction_most() -> None:
    plan = ChunkPlan(ACTION, Method.ENSEMBLE, execution_horizon=4)
    arm = Arm(plan)
    for offset in (0.0, 10.0, 40.0):
        arm.consume(plan.due - arm.buffer.consumed)
        arm.chunk(0, offset=offset)
    weights = np.exp(-ENSEMBLE_DECAY * np.arange(3))
    assert arm.buffer.next()[0] == pytest.approx(8 + weights @ [0.0, 10.0, 40.0] / weights.sum(), rel=1e-6)
    arm.consume(7)  # number 16 was predicted by the last two only
    assert arm.buffer.next()[0] == pytest.approx(16 + weights[:2] @ [10.0, 40.0] / weights[:2].sum(), rel=1e-6)


def test_the_jump_between_two_chunks_is_measured_where_the_arm_changes_over() -> None:
    plan = ChunkPlan(ACTION, Method.ASYNCHRONOUS)
    first = plan.begin(0, 0)
    assert plan.finish(first, numbered(first), 0).jump is None
    second = plan.begin(8, 2)
    published = plan.finish(second, numbered(second, offset=5.0), 10)  # 9, then 15
    assert published.taken == 10 and published.jump == pytest.approx(math.hypot(6, -6))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_the_soft_mask_is_the_published_one(tokens: int, frozen: int, horizon: int, known: int) -> None:
    known = max(known, frozen)
    if frozen > tokens:
        with pytest.raises(ValueError, match="frozen"):
            soft_mask(tokens, frozen, horizon, known)
        return
    mask = soft_mask(tokens, frozen, horizon, known)
    last = min(tokens - horizon, known)
    for i, weight in enumerate(mask):
        if i < frozen:
            assert weight == 1.0
        elif i < last:
            c = (last - i) / (last - frozen + 1)
            assert weight == pytest.approx(c * (math.exp(c) - 1) / (math.e - 1))
        else:
            assert weight == 0.0
    assert (np.diff(mask) <= 0).all()


@settings(deadline=None)
@given(
    st.sampled_from(Method), st.integers(1, 40), st.integers(0, 60), st.integers(1, 40), st.none() | st.integers(0, 9)
)
def test_delay_and_execution_horizon_are_brought_into_their_limits_and_it_is_said(
    method: Method, horizon: int, delay: int, available: int, prefix: int | None
) -> None:
    timing = fit_timing(method, horizon, delay, available, prefix)
    if not method.overlaps:
        assert (timing.delay, timing.horizon) == (0, min(horizon, available))
    else:
        assert timing.delay <= min(delay, available if prefix is None else prefix)
        assert timing.delay <= timing.horizon <= available - timing.delay
        assert (timing.note == "") == ((timing.delay, timing.horizon) == (delay, horizon))


def test_one_action_per_chunk_is_possible() -> None:
    assert fit_timing(Method.ASYNCHRONOUS, 8, 3, 1).horizon == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": Method.TRAINED}, "more than 1 clean leading tokens"),
        ({"method": Method.TRAINED, "prefix": 1}, "diffusion.prefix is 1"),
        ({"method": Method.SOFT, "execution_horizon": -1}, "execution horizon -1"),
        ({"method": Method.SOFT, "prefix": -1}, "prefix -1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ChunkPlan(ACTION, **arguments)


def test_wrong_bookkeeping_is_refused_and_changes_nothing() -> None:
    plan = ChunkPlan(ACTION, Method.ASYNCHRONOUS)
    with pytest.raises(ValueError, match="expected 0 to 0 consumed"):
        plan.begin(1, 0)
    first = plan.begin(0, 0)
    with pytest.raises(ValueError, match=r"shape \(15, 2\), got \(8, 2\)"):
        plan.finish(first, np.zeros((8, 2)))
    plan.finish(first, numbered(first), 0)
    late, early = plan.begin(9, 1), plan.begin(8, 1)
    with pytest.raises(ValueError, match="expected 9 to 15 consumed actions at publication, got 16"):
        plan.finish(late, numbered(late), 16)
    plan.finish(late, numbered(late), 10)
    with pytest.raises(ValueError, match=r"began at action 8, a later one \(9\)"):
        plan.finish(early, numbered(early), 10)
    with pytest.raises(ValueError, match="expected 9 to 24 consumed"):
        plan.begin(8, 0)
    assert (plan.due, plan.end) == (17, 24)
