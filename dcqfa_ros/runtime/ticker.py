"""Control tick with monotonic deadlines, and what it measures about itself."""

from __future__ import annotations

import os
import threading
import time
from collections import deque

import numpy as np

JITTER_WINDOW = 1000


class Ticker:
    """Periodic deadlines on ``time.monotonic_ns``; a tick is *missed* when it begins over a full period late."""

    def __init__(self, period_ns: int) -> None:
        """Set the period in nanoseconds; the first deadline is one period from now."""
        if period_ns <= 0:
            raise ValueError(f"tick period: expected a positive number of nanoseconds, got {period_ns}")
        self.period_ns = period_ns
        self.missed = 0
        self.ticks = 0
        self._late: deque[int] = deque(maxlen=JITTER_WINDOW)
        self._busy: deque[int] = deque(maxlen=JITTER_WINDOW)
        self._begin = 0
        self._lock = threading.Lock()
        self.restart()

    def restart(self, after_ns: int | None = None) -> None:
        """Place the next deadline one period, or ``after_ns``, from now (after a pause that is not a miss)."""
        with self._lock:
            self._deadline = time.monotonic_ns() + (self.period_ns if after_ns is None else after_ns)

    def wait(self, halt: threading.Event) -> None:
        """Sleep to the next deadline (or until ``halt`` is set) and account for lateness."""
        while True:
            with self._lock:
                deadline = self._deadline
            remaining = deadline - time.monotonic_ns()
            if remaining <= 0:
                break
            if halt.wait(remaining / 1e9):
                return
        now = time.monotonic_ns()
        late = max(0, now - deadline)
        with self._lock:
            if self._deadline != deadline:
                return  # restarted meanwhile
            periods = late // self.period_ns
            self.missed += periods
            self._deadline = deadline + (periods + 1) * self.period_ns
        self.ticks += 1
        self._late.append(late)
        self._begin = now

    def done(self) -> None:
        """Note that the work of this tick has ended."""
        self._busy.append(time.monotonic_ns() - self._begin)

    def report(self) -> dict[str, str]:
        """Figures for diagnostics: counts, lateness and work percentiles in milliseconds, load, scheduler."""
        late, busy = _percentiles(self._late), _percentiles(self._busy)
        return {
            "ticks": str(self.ticks),
            "missed_ticks": str(self.missed),
            "late_p50_ms": late[0],
            "late_p99_ms": late[1],
            "work_p50_ms": busy[0],
            "work_p99_ms": busy[1],
            "load_1min": f"{os.getloadavg()[0]:.2f}",
            "steal_ticks": str(_steal()),
            "scheduler": _scheduler(),
        }


def _percentiles(values: deque[int]) -> tuple[str, str]:
    data = np.array(values, dtype=np.float64)
    if not len(data):
        return "", ""
    p50, p99 = np.percentile(data, [50, 99]) / 1e6
    return f"{p50:.3f}", f"{p99:.3f}"


def _steal() -> int:
    """Clock ticks stolen by the hypervisor since boot, summed over processors (Linux; 0 elsewhere)."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return int(file.readline().split()[8])
    except (OSError, IndexError, ValueError):
        return 0


def _scheduler() -> str:
    names = {
        getattr(os, n): n
        for n in ("SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_IDLE")
        if hasattr(os, n)
    }
    return names.get(os.sched_getscheduler(0), "unknown") if hasattr(os, "sched_getscheduler") else "unknown"
