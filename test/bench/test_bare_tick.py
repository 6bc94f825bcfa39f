"""The tick that others are compared with is delayed by what delays every process, and says so."""

from __future__ import annotations

import signal
import time

import pytest

from dcqfa_ros.bench import bare_tick, processes
from dcqfa_ros.bench.bare_tick import missed_alone
from dcqfa_ros.runtime.ticker import STALLS


def test_a_process_that_stood_still_has_missed_ticks_and_ends_with_its_input() -> None:
    tick = bare_tick.start(100.0, 0)
    try:
        tick.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        tick.send_signal(signal.SIGCONT)
        time.sleep(0.1)
        told = processes.result(tick, "tick", 30.0)
    finally:
        processes.end(tick)
    assert told["missed"] > 0 and told["max_ms"] > 10.0 and told["scheduler"].startswith("SCHED_")
    deadline, begin = max(told["stalls"], key=lambda stall: stall[1] - stall[0])
    assert (begin - deadline) / 1e6 == pytest.approx(told["max_ms"], abs=0.2) and begin > deadline + 2 * 10**8


def test_a_process_that_does_not_begin_says_why_at_once_and_is_not_left() -> None:
    others = processes.children()
    with pytest.raises(processes.BenchError, match=r"the reference tick ended with code 1: .*ZeroDivisionError"):
        bare_tick.start(0.0, 0)
    assert processes.children() == others


def test_ticks_missed_in_a_stall_that_others_share_are_not_missed_alone() -> None:
    period = 10
    ours = [(100, 125), (200, 212), (300, 318), (400, 406)]  # missed: 110 and 120, 210, 310, none
    assert missed_alone(ours, [], period) == 4
    assert missed_alone(ours, [(95, 111)], period) == 3, "the tick of 120 was missed alone"
    assert missed_alone(ours, [(95, 121), (217, 230), (305, 320)], period) == 0
    assert missed_alone(ours, [(221, 230), (340, 350)], period) == 4
    assert missed_alone([], [(0, 1000)], period) == 0
    assert missed_alone(ours, [(0, 6)] * STALLS, period) is None
