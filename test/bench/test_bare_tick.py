"""The tick that others are compared with is delayed by what delays every process, and says so."""

from __future__ import annotations

import signal
import time

from dcqfa_ros.bench import bare_tick, processes


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
