"""When the watchdog trips, without sockets and clocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.watchdog.heartbeat import Beat, Monitor, Reply, Status


@given(st.booleans(), st.integers(0, 65535), st.integers(0, 2**64 - 1), st.sampled_from(Status))
def test_datagrams_are_read_as_they_were_written(armed: bool, tag: int, number: int, status: Status) -> None:
    assert Beat.decode(Beat(armed, tag, number).encode()) == Beat(armed, tag, number)
    assert Reply.decode(Reply(status, tag, number).encode()) == Reply(status, tag, number)


@given(st.binary(max_size=64))
def test_anything_else_is_no_beat(data: bytes) -> None:
    for kind in (Beat, Reply):
        decoded = kind.decode(data)
        assert decoded is None or decoded.encode() == data


def test_only_silence_while_armed_trips_and_only_once() -> None:
    monitor = Monitor(0.1)
    assert not monitor.due(100.0) and monitor.wait_s(100.0) is None
    monitor.feed(Beat(False, 1, 1), 0.0)
    assert not monitor.due(10.0)
    monitor.feed(Beat(True, 1, 2), 10.0)
    assert not monitor.due(10.099) and monitor.wait_s(10.04) == pytest.approx(0.06)
    assert monitor.due(10.101) and not monitor.due(10.2)
    monitor.feed(Beat(True, 1, 3), 10.3)
    assert monitor.tripped and not monitor.due(20.0), "still armed: it stays tripped"
    monitor.feed(Beat(False, 1, 4), 20.0)
    monitor.feed(Beat(True, 1, 5), 20.1)
    assert monitor.due(20.3)


def test_a_disarmed_stranger_cannot_switch_the_watching_off() -> None:
    monitor = Monitor(0.1)
    monitor.feed(Beat(True, 1, 1), 0.0)
    assert not monitor.feed(Beat(False, 2, 1), 0.05)
    assert monitor.strangers == 1 and monitor.due(0.101)
    assert monitor.feed(Beat(False, 2, 2), 0.2) and not monitor.tripped, "its successor begins anew"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 10.0])
def test_a_time_out_out_of_range_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="time-out"):
        Monitor(seconds)
