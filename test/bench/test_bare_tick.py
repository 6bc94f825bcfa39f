"""The tick that others are compared with is delayed by what delays every process, and says so."""

from __future__ import annotations

import os
import signal
import time
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.bench import bare_tick, processes
from dcqfa_ros.bench.bare_tick import BareTicks, missed_alone
from dcqfa_ros.runtime.ticker import STALLS


def test_a_process_that_stood_still_says_when_and_ends_with_its_input(monkeypatch) -> None:
    others, available = processes.children(), os.sched_getaffinity(0)
    monkeypatch.setattr(bare_tick, "_MOST", len(available))
    ticks = BareTicks(100.0, 0)
    try:
        assert [os.sched_getaffinity(pid) for pid in ticks.pids] == [{one} for one in sorted(available)], "one on each"
        os.kill(ticks.pids[-1], signal.SIGSTOP)
        begin = time.monotonic_ns()
        time.sleep(0.3)
        end = time.monotonic_ns()
        os.kill(ticks.pids[-1], signal.SIGCONT)
        time.sleep(0.1)
        told = ticks.result()
    finally:
        ticks.end()
    assert told.missed > 20 and told.max_ms > 250.0 and len(told.stood) == len(available) and not told.realtime
    assert any(last <= begin + 10**7 and end <= again for last, again in told.stood[-1])
    assert processes.children() == others


def test_where_there_are_many_processors_one_process_runs_on_any(monkeypatch) -> None:
    monkeypatch.setattr(bare_tick, "_MOST", 0)
    ticks = BareTicks(100.0, 0)
    try:
        assert [os.sched_getaffinity(pid) for pid in ticks.pids] == [os.sched_getaffinity(0)]
    finally:
        ticks.end()


def test_a_tick_that_is_kept_on_a_processor_has_a_reference_on_it_in_any_case(monkeypatch) -> None:
    monkeypatch.setattr(bare_tick, "_MOST", 0)
    available = os.sched_getaffinity(0)
    ticks = BareTicks(100.0, 0, max(available))
    try:
        assert [os.sched_getaffinity(pid) for pid in ticks.pids] == [available, {max(available)}]
        assert ticks.result().processors == (None, max(available))
    finally:
        ticks.end()


def test_a_process_that_does_not_begin_says_why_at_once_and_is_not_left() -> None:
    others = processes.children()
    with pytest.raises(processes.BenchError, match=r"the reference tick ended with code 1: .*ZeroDivisionError"):
        BareTicks(0.0, 0)
    assert processes.children() == others


def told(*stood: list[tuple[int, int]], realtime: bool = True) -> bare_tick.Told:
    return bare_tick.Told(0, 0.0, tuple(range(len(stood))), tuple(map(tuple, stood)), realtime)


def test_time_in_which_no_reference_ran_is_taken_out_of_what_was_missed() -> None:
    period = 10
    ours = [(100, 125), (200, 212), (300, 318), (400, 406)]  # missed: 110 and 120, 210, 310, none
    assert missed_alone(ours, told([]), period) == 4
    assert missed_alone(ours, told([(95, 111)]), period) == 3, "of 25, 14 are left"
    assert missed_alone(ours, told([(95, 121), (198, 203), (305, 320)]), period) == 0
    assert missed_alone(ours, told([(130, 199), (340, 350)]), period) == 4
    assert missed_alone([], told([(0, 1000)]), period) == 0
    burst = told([(99, 108), (110, 129)])
    assert missed_alone([(99, 133)], burst, period) == 0, "paused again before it could run"
    assert missed_alone([(99, 149)], burst, period) == 2


def test_a_stall_of_one_processor_excuses_nothing() -> None:
    assert missed_alone([(100, 125)], told([(95, 121)], []), 10) == 2
    assert missed_alone([(100, 125)], told([(95, 121)], [(90, 108), (112, 130)]), 10) == 0
    assert missed_alone([(100, 125)], told([(95, 121)], [(90, 103), (112, 130)]), 10) == 1


def test_a_stall_of_the_processor_that_the_tick_is_kept_on_excuses_it_there() -> None:
    one, other = [(95, 121)], [(90, 103), (112, 130)]
    assert [missed_alone([(100, 125)], told(one, other), 10, processor) for processor in (None, 0, 1)] == [1, 0, 0]
    assert missed_alone([(100, 125)], told(one, []), 10, 1) == 2
    assert missed_alone([(100, 125)], told(one, other), 10, 2) is None, "nothing is known of it"


def test_what_would_be_missed_alone_is_unknown_without_priority_or_with_too_many_stalls() -> None:
    assert missed_alone([(100, 125)], told([], realtime=False), 10) is None
    assert missed_alone([(100, 125)], told([], [(0, 6)] * bare_tick._KEPT), 10) is None
    assert missed_alone([(100, 125)] * STALLS, told([]), 10) is None


@given(st.lists(st.integers(1, 9), max_size=30), st.lists(st.integers(1, 9), max_size=30))
def test_what_two_lists_have_in_common_is_what_every_moment_says(first: list[int], second: list[int]) -> None:
    lists = []
    for steps in (first, second):
        points = list(accumulate(steps))
        lists.append(list(zip(points[::2], points[1::2], strict=False)))
    shared = {t for t in range(300) if all(any(a <= t < b for a, b in one) for one in lists)}
    assert {t for a, b in bare_tick._common(*lists) for t in range(a, b)} == shared
