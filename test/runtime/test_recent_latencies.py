"""Latencies reach a watcher once each, whatever it missed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.runtime.recent_latencies import KEPT, RecentLatencies, newer


@given(st.lists(st.integers(0, KEPT), max_size=12))
def test_a_watcher_that_looks_often_enough_gets_every_latency_once(batches: list[int]) -> None:
    recent, heard, count, total = RecentLatencies(), [], 0, 0
    for batch in batches:
        for _ in range(batch):
            total += 1
            recent.add(float(total))
        told = newer(recent.figures(), count)
        assert told is not None
        count, latencies = told
        heard += latencies
    assert heard == [float(i + 1) for i in range(total)]


def test_who_begins_to_listen_takes_nothing_from_before() -> None:
    recent = RecentLatencies()
    recent.add(5.0)
    assert newer(recent.figures(), None) == (1, ())


def test_what_was_missed_is_missing_and_a_new_process_is_heard_from_its_beginning() -> None:
    recent = RecentLatencies()
    for i in range(100):
        recent.add(float(i))
    assert newer(recent.figures(), 10) == (100, tuple(float(i) for i in range(100 - KEPT, 100)))
    again = RecentLatencies()
    again.add(7.0)
    assert newer(again.figures(), 100) == (1, (7.0,))


def test_a_policy_that_does_not_tell_says_nothing() -> None:
    assert newer({"chunks": "3"}, 0) is None


@pytest.mark.parametrize(("count", "latencies"), [("x", "1"), ("1", "1 2"), ("1", "nan"), ("1", "-3"), ("-1", "")])
def test_malformed_values_are_refused(count: str, latencies: str) -> None:
    with pytest.raises(ValueError):
        newer({"inference_count": count, "inference_recent_ms": latencies}, 0)
