"""The two clocks of a probe are read at the same moment."""

from __future__ import annotations

import types
from typing import Any

from dcqfa_ros.ros import clock_exchange as module
from dcqfa_ros.ros.clock_exchange import NodeClock
from dcqfa_ros.runtime.clock_skew import ClockLimits, ClockWatch

AHEAD_NS = 10**15


class Interrupted:
    """One true time; reading it the ``n``-th time takes ``delays[n]`` longer."""

    def __init__(self, *delays: int) -> None:
        self.now, self.delays = 0, list(delays)

    def monotonic_ns(self) -> int:
        self.now += 1_000 + (self.delays.pop(0) if self.delays else 0)
        return self.now


def clock(monkeypatch: Any, time: Interrupted) -> NodeClock:
    monkeypatch.setattr(module.time, "monotonic_ns", time.monotonic_ns)
    node: Any = types.SimpleNamespace(
        add_parameter=lambda *_: None,
        parameter=lambda _: 0.0,
        get_clock=lambda: types.SimpleNamespace(
            now=lambda: types.SimpleNamespace(nanoseconds=time.monotonic_ns() + AHEAD_NS)
        ),
    )
    return NodeClock(node)


def test_a_thread_that_is_interrupted_between_two_readings_sees_no_step(monkeypatch: Any) -> None:
    watch = ClockWatch(ClockLimits(1_000_000, 10**9))
    for delays in ((), (0, 0, 80_000_000), (0, 70_000_000), (0, 0, 60_000_000, 0, 50_000_000)):
        own, now = clock(monkeypatch, Interrupted(*delays)).now_both_ns()
        assert abs(own - now - AHEAD_NS) < 10_000
        watch.probe(own, now)
    assert watch.step() is None and watch.steps == 0


def test_under_steady_interruption_the_closest_pair_counts(monkeypatch: Any) -> None:
    own, now = clock(monkeypatch, Interrupted(*[3_000_000] * 3, *[2_000_000] * 12)).now_both_ns()
    assert abs(own - now - AHEAD_NS) <= 2_000_000
