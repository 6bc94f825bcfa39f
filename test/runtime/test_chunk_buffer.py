"""Chunks are merged by actions consumed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.runtime.chunk_buffer import ChunkBuffer
from dcqfa_ros.runtime.errors import PolicyError


def chunk(label: int, first: int, count: int) -> np.ndarray:
    """Actions that say which chunk they come from and which number they have."""
    return np.array([[label, first + i] for i in range(count)], float)


COMMANDS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 60), st.integers(1, 12)),
        st.tuples(st.just("next"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(COMMANDS, st.integers(4, 20))
def test_buffer_behaves_like_a_dictionary_of_numbered_actions(
    commands: list[tuple[str, int, int]], capacity: int
) -> None:
    buffer = ChunkBuffer(2, capacity)
    model: dict[int, np.ndarray] = {}
    consumed = starved = 0
    fed = False
    for label, (kind, first, count) in enumerate(commands):
        if kind == "next":
            action = buffer.next()
            expected = model.pop(consumed, None)
            assert (action is None) == (expected is None)
            if action is None:
                starved += fed
            else:
                assert np.array_equal(action, expected)
                consumed += 1
            continue
        end = consumed + len(model)
        actions = chunk(label, first, count)
        if first + count <= consumed or first > end or first + count - consumed > capacity:
            with pytest.raises(PolicyError, match="chunk"):
                buffer.push(first, actions)
        else:
            fed = True
            model = {n: a for n, a in model.items() if n < first}
            model.update({first + i: a for i, a in enumerate(actions) if first + i >= consumed})
            assert buffer.push(first, actions) == first + count - max(first, consumed)
        assert (buffer.consumed, buffer.remaining, buffer.starved) == (consumed, len(model), starved)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=20))
def test_no_action_is_skipped_or_repeated_however_late_chunks_come(delays: list[int]) -> None:
    # A policy observes, the arm goes on for a while, then the chunk of 8 comes: the arm must execute 0, 1, 2, ...
    buffer = ChunkBuffer(2)
    buffer.push(0, chunk(0, 0, 8))
    executed: list[float] = []
    for label, delay in enumerate(delays):
        observed = buffer.consumed
        for _ in range(delay):
            action = buffer.next()
            if action is not None:
                executed.append(action[1])
        buffer.push(observed, chunk(label, observed, 8))
    assert executed == list(range(len(executed)))


def test_newer_chunk_replaces_what_is_not_yet_consumed() -> None:
    buffer = ChunkBuffer(2)
    buffer.push(0, chunk(0, 0, 8))
    assert [buffer.next()[0] for _ in range(4)] == [0, 0, 0, 0]  # type: ignore[index]
    buffer.push(2, chunk(1, 2, 8))
    assert buffer.next().tolist() == [1, 4]  # type: ignore[union-attr]
    assert buffer.remaining == 5
    assert buffer.dropped == 2 + 4


def test_running_dry_is_counted_only_after_the_first_chunk() -> None:
    buffer = ChunkBuffer(2)
    assert buffer.next() is None
    assert buffer.starved == 0
    buffer.push(0, chunk(0, 0, 1))
    buffer.next()
    assert buffer.next() is None
    assert buffer.starved == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_is_named_and_nothing_changes(value: float) -> None:
    buffer = ChunkBuffer(2)
    buffer.push(0, chunk(0, 0, 4))
    bad = chunk(1, 2, 8)
    bad[3, 1] = value
    with pytest.raises(PolicyError, match=r"action 5 is .* in dimension 1"):
        buffer.push(2, bad)
    assert [buffer.next()[0] for _ in range(4)] == [0, 0, 0, 0]  # type: ignore[index]
    assert buffer.remaining == 0


@pytest.mark.parametrize("shape", [(8,), (8, 3), (0, 2), (1, 8, 2)])
def test_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PolicyError, match="expected actions of shape"):
        ChunkBuffer(2).push(0, np.zeros(shape))


def test_action_handed_out_does_not_change_when_the_buffer_goes_on() -> None:
    buffer = ChunkBuffer(2, capacity=2)
    buffer.push(0, chunk(0, 0, 1))
    action = buffer.next()
    buffer.push(1, chunk(1, 1, 2))
    assert action is not None
    assert action.tolist() == [0, 0]


def test_clear_starts_again_at_action_zero() -> None:
    buffer = ChunkBuffer(2)
    buffer.push(0, chunk(0, 0, 8))
    buffer.next()
    buffer.clear()
    assert (buffer.consumed, buffer.remaining, buffer.starved, buffer.dropped) == (0, 0, 0, 0)
    assert buffer.next() is None
    assert buffer.starved == 0


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="capacity"):
        ChunkBuffer(2, 0)


def test_peek_shows_the_next_action_without_consuming_it() -> None:
    buffer = ChunkBuffer(1)
    assert buffer.peek() is None
    buffer.push(0, np.array([[1.0], [2.0]]))
    assert buffer.peek() == buffer.peek() == np.array([1.0])
    assert buffer.next() == np.array([1.0]) and buffer.peek() == np.array([2.0])
    assert buffer.next() == np.array([2.0]) and buffer.peek() is None
