"""Only the control thread becomes real-time; what the system refuses is said, and the loop goes on."""

from __future__ import annotations

import os
import resource
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.runtime import realtime
from dcqfa_ros.runtime.histogram import RESOLUTION_NS, Histogram
from dcqfa_ros.runtime.realtime import RealtimeError, RealtimeSettings, apply, scheduling
from dcqfa_ros.runtime.ticker import Ticker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="real-time scheduling of threads is Linux only")


def in_thread(work: Any) -> Any:
    """Run ``work`` in a thread of its own, whose scheduling ends with it."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_the_settings_change_the_calling_thread_and_no_other() -> None:
    cpu = min(os.sched_getaffinity(0))

    def work() -> tuple[list[str], realtime.Scheduling]:
        return apply(RealtimeSettings.of(5, str(cpu), False)), scheduling()

    before = scheduling()
    refusals, seen = in_thread(work)
    assert seen.cpus == (cpu,)
    if refusals:  # no right to real-time priorities here
        assert seen.scheduler == before.scheduler
        assert "realtime_priority 5 refused" in refusals[0] and "docs/realtime.md" in refusals[0]
    else:
        assert (seen.scheduler, seen.priority, seen.text) == ("SCHED_FIFO", 5, "SCHED_FIFO 5")
    assert scheduling() == before


def test_whoever_holds_the_interpreter_lock_gets_a_priority_below() -> None:
    seen: dict[str, list[realtime.Scheduling]] = {}
    begun, done = threading.Event(), threading.Event()

    def other() -> None:
        begun.set()
        done.wait(10.0)
        seen["other"] = [scheduling()]
        seen["child"] = in_thread(lambda: [scheduling()])  # begun by a thread that has a priority

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(10.0)
    before = scheduling()
    try:

        def control() -> str:
            refusals = apply(RealtimeSettings(5))
            return refusals[0] if refusals else realtime.cover(5)

        refusal = in_thread(control)
        here = scheduling()
        done.set()
        thread.join()
    finally:
        realtime.uncover(5)
    assert scheduling() == before
    if refusal:
        assert "realtime_priority 5 refused" in refusal
        assert here.priority == seen["other"][0].priority == 0
    else:
        assert here.text == seen["other"][0].text == "SCHED_FIFO 4"
        assert seen["child"][0].priority == 0


def test_no_priority_covers_nothing() -> None:
    before = scheduling()
    assert realtime.cover(0) == ""
    assert scheduling() == before


def test_what_is_refused_is_said_and_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    told = in_thread(lambda: apply(RealtimeSettings(50, (9999,), True)))
    assert len(told) == 3
    assert "there is no processor 9999" in told[0]
    assert "realtime_priority 50 refused: Operation not permitted" in told[1]
    assert "lock_memory refused: the limit (memlock) is 65536 bytes" in told[2]


@pytest.mark.parametrize(("priority", "cpus"), [(100, ""), (-1, ""), (0, "one"), (0, "-1"), (0, "1;2")])
def test_settings_that_no_system_grants_are_refused_by_name(priority: int, cpus: str) -> None:
    with pytest.raises(RealtimeError, match="realtime_priority" if priority else "cpu_affinity"):
        RealtimeSettings.of(priority, cpus, False)


def test_nothing_asked_for_changes_nothing() -> None:
    before = scheduling()
    assert apply(RealtimeSettings.of(0, " ", False)) == []
    assert scheduling() == before


def test_the_ticker_reports_the_scheduling_of_the_thread_that_ticks() -> None:
    ticker, halt, cpu = Ticker(1_000_000), threading.Event(), max(os.sched_getaffinity(0))
    assert ticker.report()["scheduler"] == ""
    ticked = threading.Event()

    def run() -> None:
        apply(RealtimeSettings(0, (cpu,)))
        ticker.wait(halt)
        ticker.done()
        ticked.set()
        halt.wait(10.0)

    thread = threading.Thread(target=run)
    thread.start()
    assert ticked.wait(10.0)
    report = ticker.report()
    halt.set()
    thread.join()
    assert report["cpus"] == str(cpu)
    assert report["scheduler"].startswith("SCHED_")
    assert float(report["jitter_max_ms"]) >= float(report["jitter_p50_ms"]) >= 0.0
    assert ticker.report()["scheduler"] == "unknown", "the thread has ended"


def test_jitter_and_misses_are_counted_anew() -> None:
    ticker = Ticker(100)
    ticker.restart(-1000)
    ticker.wait(threading.Event())
    assert ticker.missed and ticker.jitter.count == 1
    ticker.count_anew()
    assert not ticker.missed and ticker.report()["jitter_p99_ms"] == ""


@given(st.lists(st.integers(-5, 400_000_000), min_size=1, max_size=200), st.sampled_from([50.0, 99.0, 100.0]))
def test_percentiles_are_true_to_the_resolution(durations: list[int], percent: float) -> None:
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    exact = float(np.percentile(np.maximum(durations, 0), percent, method="inverted_cdf"))
    found = histogram.percentile_ns(percent)
    assert histogram.maximum_ns == max(0, *durations)
    assert exact <= found <= max(exact + RESOLUTION_NS, histogram.maximum_ns if exact >= 200_000_000 else 0)
