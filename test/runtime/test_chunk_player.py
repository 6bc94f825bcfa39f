"""Chunks of twists are played without leaving out or repeating an action, whatever the delays, and interpolated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.runtime.chunk_player import ChunkPlayer

PERIOD = 33_333_333
TICK = 10_000_000
START = 5_000_000_000_000


def chunk(*values: float) -> np.ndarray:
    rows = np.zeros((len(values), 6))
    rows[:, 0] = values
    return rows


def test_a_chunk_is_interpolated_between_its_actions_and_ends_in_nothing() -> None:
    player = ChunkPlayer()
    assert player.at(START) is None and player.starved == 0
    assert player.offer(START - 1, PERIOD, chunk(0.0, 1.0, 0.0), START) is None
    seen = []
    for i in range(30):
        played = player.at(START + i * TICK)
        seen.append(None if played is None else played.twist[0])
    assert seen[:7] == pytest.approx([0.0, 0.3, 0.6, 0.9, 1.0 - 0.2, 0.5, 0.2], abs=1e-6)
    assert seen[7:10] == pytest.approx([0.0] * 3) and seen[10:] == [None] * 20
    assert player.starved == 1 and player.consumed == 3


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_every_action_is_begun_once_and_in_order_whatever_the_delay_of_inference(seed: int) -> None:
    random = np.random.default_rng(seed)
    player = ChunkPlayer()
    now, begun = START, []
    pending: list[tuple[int, int, int]] = []  # arrival, observed, first
    for _ in range(300):
        now += int(random.integers(1, 4)) * TICK // 2
        for entry in [p for p in pending if p[0] <= now]:
            pending.remove(entry)
            assert player.first_of(entry[1]) == entry[2]
            player.offer(entry[1], PERIOD, chunk(*(float(entry[2] + i) for i in range(8))), now)
        before = player.consumed
        player.at(now)
        assert player.consumed - before in (0, 1)
        if player.consumed > before:
            row = player._current
            assert row is not None and row[0] == before
            begun.append(before)
        if len(pending) < 2 and random.random() < 0.3:
            pending.append((now + int(random.integers(0, 20)) * TICK, now, player.consumed))
    assert begun == list(range(len(begun)))


def test_an_observation_between_an_actions_time_and_its_tick_has_one_number_whenever_its_chunks_come() -> None:
    player = ChunkPlayer()
    player.offer(START, PERIOD, chunk(0.0, 1.0, 2.0), START)
    player.at(START)
    observed = START + PERIOD + 1
    assert player.first_of(observed - 2) == 1
    assert player.first_of(observed) == 2, "its time has come, its tick has not"
    player.offer_gripper(observed, np.array([0.25, 1.0]))
    player.at(observed + TICK)
    assert player.consumed == 2 and player.first_of(observed) == 2
    player.offer(observed, PERIOD, chunk(5.0, 6.0), observed + TICK + 1)
    played = player.at(START + 2 * PERIOD + TICK)
    assert played is not None and played.gripper == 0.25
    assert player.consumed == 3 and player._current is not None and player._current[0] == 5.0
    assert player.first_of(START + 9 * PERIOD) == 4, "no more than it has"


@given(st.integers(0, 2**32 - 1))
def test_what_is_said_of_actions_to_come_is_what_happens_where_ticks_are_less_than_a_period_late(seed: int) -> None:
    random = np.random.default_rng(seed)
    player, now = ChunkPlayer(), START
    player.offer(now, PERIOD, chunk(*(float(i) for i in range(40))), now)
    said: list[tuple[int, int]] = []  # stamp, count
    while player.remaining:
        player.at(now)
        ahead = int(random.integers(0, player.remaining + 1))
        following = player.next_ns
        assert following is not None
        for stamp in (following + ahead * PERIOD - 1, following + int(random.integers(0, ahead * PERIOD + 1)) - 1):
            said.append((stamp, player.consumed + 1 + (stamp - following) // PERIOD))
            assert player.first_of(stamp) == said[-1][1], "as it is told, so a chunk that comes now is numbered"
        now += int(random.integers(1, PERIOD))
    assert player.starved == 0
    for stamp, count in said:
        assert player.first_of(stamp) == count


def test_ages_belong_to_the_chunk_an_action_came_from() -> None:
    player = ChunkPlayer()
    player.offer(START - 50, PERIOD, chunk(1.0, 1.0), START)
    played = player.at(START + 7)
    assert played is not None
    assert abs(played.observed_ns - (START - 50)) < 1000 and abs(played.received_ns - START) < 1000


@pytest.mark.parametrize("gripper_first", [True, False])
def test_the_gripper_follows_the_numbers_of_its_chunk_whichever_comes_first(gripper_first: bool) -> None:
    player = ChunkPlayer()
    if gripper_first:
        player.offer_gripper(START, np.array([1.0, 0.0]))
    player.offer(START, PERIOD, chunk(0.1, 0.2), START)
    if not gripper_first:
        player.offer_gripper(START, np.array([1.0, 0.0]))
    seen = [p.gripper for i in range(6) if (p := player.at(START + i * TICK)) is not None]
    assert seen == [1.0, None, None, None, 0.0, None]


def test_chunks_that_come_too_late_or_at_another_rate_are_refused() -> None:
    player = ChunkPlayer()
    player.offer(START, PERIOD, chunk(0.1, 0.2), START)
    for i in range(12):
        player.at(START + i * TICK)
    assert "already consumed" in str(player.offer(START - 1, PERIOD, chunk(0.1), START + 200_000_000))
    assert "period" in str(player.offer(START + 100_000_000, 2 * PERIOD, chunk(0.1), START + 200_000_000))
