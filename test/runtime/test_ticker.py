"""The control tick counts what it misses."""

from __future__ import annotations

import threading

import pytest

from dcqfa_ros.runtime import ticker as module
from dcqfa_ros.runtime.ticker import Ticker, stalls_of


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 0

    def monotonic_ns(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic_ns", clock.monotonic_ns)
    return clock


def test_a_tick_is_missed_only_when_it_is_over_a_full_period_late(clock):
    ticker, halt = Ticker(100), threading.Event()
    clock.now = 199
    ticker.wait(halt)
    assert ticker.missed == 0
    clock.now = 300  # next deadline is 200: exactly one period late
    ticker.wait(halt)
    assert ticker.missed == 1
    clock.now = 950  # next deadline is 400: five whole periods late
    ticker.wait(halt)
    assert ticker.missed == 1 + 5 and ticker.ticks == 3
    assert list(ticker.stalls) == [(100, 199), (200, 300), (400, 950)]
    clock.now = 1_049  # half a period is 50
    ticker.wait(halt)
    assert len(ticker.stalls) == 3
    ticker.count_anew()
    assert not ticker.stalls and ticker.missed == 0 and stalls_of(ticker.report()["stalls"]) == []


def test_the_newest_stalls_are_told_and_read_back(clock):
    ms = 1_000_000
    ticker, halt = Ticker(10 * ms), threading.Event()
    for number in range(1, 13):
        clock.now = number * 1_000 * ms + 6 * ms
        ticker.restart(1)
        clock.now += 12 * ms
        ticker.wait(halt)
    told = stalls_of(ticker.report()["stalls"])
    assert len(told) == 10 and told[-1] == (12_006 * ms, 12_018 * ms) and told[0][0] == 3_006 * ms


@pytest.mark.parametrize(
    ("due", "now", "missed", "stall"),
    [
        (150, 152, 0, None),
        (150, 160, 0, None),
        (150, 205, 0, (150, 205)),
        (150, 255, 1, (150, 255)),
        (260, 320, 1, (200, 320)),
    ],
    ids=["in time", "a little late", "half a period", "over a period", "the deadline came before"],
)
def test_a_tick_brought_forward_counts_from_when_it_was_due_and_moves_the_next(clock, due, now, missed, stall):
    ticker, halt = Ticker(100), threading.Event()
    clock.now = 100
    ticker.wait(halt)  # the next deadline is 200
    clock.now = now
    ticker.bring_forward(due, 125)
    assert (ticker.missed, ticker.ticks, list(ticker.stalls)) == (missed, 2, [stall] if stall else [])
    clock.now = now + 125
    ticker.wait(halt)
    assert ticker.ticks == 3 and ticker.missed == missed and ticker.jitter.count == 3, "not late for its own deadline"


def test_a_pause_after_restart_is_no_miss(clock):
    ticker, halt = Ticker(100), threading.Event()
    clock.now = 10_000
    ticker.restart()
    clock.now = 10_100
    ticker.wait(halt)
    assert ticker.missed == 0


def test_waiting_ends_at_once_when_halted():
    ticker, halt = Ticker(10**12), threading.Event()
    halt.set()
    ticker.wait(halt)
    assert ticker.ticks == 0


def test_the_report_holds_lateness_work_load_and_scheduler(clock):
    ticker, halt = Ticker(1_000_000), threading.Event()
    clock.now = 1_500_000
    ticker.wait(halt)
    clock.now = 3_500_000
    ticker.done()
    report = ticker.report()
    assert report["late_p50_ms"] == "0.500" and report["work_p99_ms"] == "2.000"
    assert {"ticks", "missed_ticks", "load_1min", "steal_ticks", "scheduler"} <= set(report)


def test_a_period_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="period"):
        Ticker(0)
