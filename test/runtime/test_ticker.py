"""The control tick counts what it misses."""

from __future__ import annotations

import threading

import pytest

from dcqfa_ros.runtime import ticker as module
from dcqfa_ros.runtime.ticker import Ticker


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


@pytest.mark.parametrize("on_system_time", [False, True])
def test_a_pause_is_ended_by_its_event_and_never_lasts_longer_than_asked(monkeypatch, on_system_time):
    monkeypatch.setattr(module, "_WAITS_ON_SYSTEM_TIME", on_system_time)
    wake = threading.Event()
    assert not module.pause(wake, 0.0) and not module.pause(wake, 0.001)
    threading.Timer(0.05, wake.set).start()
    ticker = Ticker(10**12)
    ticker.wait(wake)
    assert wake.is_set() and ticker.ticks == 0 and module.pause(wake, 100.0)


def test_where_events_wait_on_the_systems_clock_none_is_waited_for(monkeypatch):
    class Hung(threading.Event):
        def wait(self, timeout=None):
            raise AssertionError("a clock that is set back would keep this waiting")

    monkeypatch.setattr(module, "_WAITS_ON_SYSTEM_TIME", True)
    ticker = Ticker(5_000_000)
    ticker.wait(Hung())
    assert ticker.ticks == 1
