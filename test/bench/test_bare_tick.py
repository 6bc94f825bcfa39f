"""The tick that others are compared with is delayed by what delays every process, and says so."""

from __future__ import annotations

import os
import signal
import time

import pytest

from dcqfa_ros.bench import bare_tick, processes
from dcqfa_ros.bench.bare_tick import BareTicks, missed_alone
from dcqfa_ros.runtime.ticker import STALLS


def test_a_process_that_stood_still_has_missed_ticks_and_ends_with_its_input() -> None:
    others, available = processes.children(), os.sched_getaffinity(0)
    ticks = BareTicks(100.0, 0)
    try:
        assert [os.sched_getaffinity(pid) for pid in ticks.pids] == [{one} for one in sorted(available)], "one on each"
        os.kill(ticks.pids[-1], signal.SIGSTOP)
        time.sleep(0.3)
        os.kill(ticks.pids[-1], signal.SIGCONT)
        time.sleep(0.1)
        told = ticks.result()
    finally:
        ticks.end()
    assert told.missed > 20 and told.max_ms > 200.0 and len(told.stalls) == len(available)
    deadline, begin = max(told.stalls[-1], key=lambda stall: stall[1] - stall[0])
    assert (begin - deadline) / 1e6 == pytest.approx(told.max_ms, abs=0.2) and begin > deadline + 2 * 10**8
    assert processes.children() == others


def test_where_there_are_many_processors_one_process_runs_on_any(monkeypatch) -> None:
    monkeypatch.setattr(bare_tick, "_MOST", 0)
    ticks = BareTicks(100.0, 0)
    try:
        assert [os.sched_getaffinity(pid) for pid in ticks.pids] == [os.sched_getaffinity(0)]
    finally:
        ticks.end()


def test_a_process_that_does_not_begin_says_why_at_once_and_is_not_left() -> None:
    others = processes.children()
    with pytest.raises(processes.BenchError, match=r"the reference tick ended with code 1: .*ZeroDivisionError"):
        BareTicks(0.0, 0)
    assert processes.children() == others


def test_ticks_missed_in_a_stall_that_others_share_are_not_missed_alone() -> None:
    period = 10
    ours = [(100, 125), (200, 212), (300, 318), (400, 406)]  # missed: 110 and 120, 210, 310, none
    assert missed_alone(ours, [], period) == 4
    assert missed_alone(ours, [[], [(95, 111)]], period) == 3, "the tick of 120 was missed alone"
    assert missed_alone(ours, [[(95, 121), (305, 320)], [(217, 230)]], period) == 0
    assert missed_alone(ours, [[(221, 230)], [(340, 350)]], period) == 4
    assert missed_alone([], [[(0, 1000)]], period) == 0
    assert missed_alone(ours, [[], [(0, 6)] * STALLS], period) is None
    burst = [[(100, 108), (110, 129)], [(101, 108)]]
    assert missed_alone([(99, 133)], burst, period) == 0, "paused again before it could run"
    assert missed_alone([(99, 145)], burst, period) == 1
