"""Control tick with monotonic deadlines, and what it measures about itself."""

from __future__ import annotations

import os
import threading
import time
from collections import deque

from dcqfa_ros.runtime.histogram import Histogram, percentiles
from dcqfa_ros.runtime.realtime import processor_ticks, scheduling, steal_share

JITTER_WINDOW = 1000
STALLS = 500  # of the newest that are kept
_TOLD = 10  # of the newest that a report names
Stall = tuple[int, int]  # deadline and begin of a late tick, monotonic ns


class Ticker:
    """Periodic deadlines on ``time.monotonic_ns``; a tick is *missed* when it begins over a full period late.

    Attributes:
        period_ns: between two deadlines.
        missed: ticks missed since :meth:`count_anew`.
        missed_in_all: ticks missed since it was made: no miss is lost where an episode ends before it was reported.
        ticks: done since it was made.
        jitter: lateness of every tick since :meth:`count_anew`.
        stalls: deadline and begin, monotonic ns, of the newest ticks since then that began half a period late or more.
    """

    def __init__(self, period_ns: int) -> None:
        """Set the period in nanoseconds; the first deadline is one period from now."""
        if period_ns <= 0:
            raise ValueError(f"tick period: expected a positive number of nanoseconds, got {period_ns}")
        self.period_ns = period_ns
        self.missed = self.missed_in_all = 0
        self.ticks = 0
        self.jitter = Histogram()
        self.stalls: deque[Stall] = deque(maxlen=STALLS)
        self._late: deque[int] = deque(maxlen=JITTER_WINDOW)
        self._busy: deque[int] = deque(maxlen=JITTER_WINDOW)
        self._begin = 0
        self._thread: int | None = None  # native id of the thread that ticks
        self._processor = processor_ticks()
        self._lock = threading.Lock()
        self.restart()

    def restart(self, after_ns: int | None = None) -> None:
        """Place the next deadline one period, or ``after_ns``, from now (after a pause that is not a miss)."""
        with self._lock:
            self._deadline = time.monotonic_ns() + (self.period_ns if after_ns is None else after_ns)

    def count_anew(self) -> None:
        """Forget misses and jitter: an episode begins."""
        with self._lock:
            self.missed = 0
            self.jitter.clear()
            self.stalls.clear()
            self._processor = processor_ticks()

    def wait(self, halt: threading.Event) -> None:
        """Sleep to the next deadline (or until ``halt`` is set) and account for lateness."""
        self._thread = threading.get_native_id()
        while True:
            with self._lock:
                deadline = self._deadline
            remaining = deadline - time.monotonic_ns()
            if remaining <= 0:
                break
            if halt.wait(remaining / 1e9):
                return
        now = time.monotonic_ns()
        with self._lock:
            if self._deadline != deadline:
                return  # restarted meanwhile
            self._deadline += (self._count(deadline, now) + 1) * self.period_ns

    def bring_forward(self, due_ns: int, after_ns: int) -> None:
        """Account for a tick that begins now, was due at ``due_ns``, and takes the place of the next.

        Args:
            due_ns: when it could begin; where its process stood still, the deadline may have come before.
            after_ns: from now to the next deadline.
        """
        now = time.monotonic_ns()
        with self._lock:
            self._count(min(due_ns, self._deadline, now), now)
            self._deadline = now + after_ns

    def _count(self, deadline: int, now: int) -> int:
        """Count a tick that begins at ``now``; returns the periods it is late."""
        late = max(0, now - deadline)
        periods = late // self.period_ns
        self.missed += periods
        self.missed_in_all += periods
        self.jitter.add(late)
        if 2 * late >= self.period_ns:
            self.stalls.append((deadline, now))
        self.ticks += 1
        self._late.append(late)
        self._begin = now
        return periods

    def done(self) -> None:
        """Note that the work of this tick has ended."""
        self._busy.append(time.monotonic_ns() - self._begin)

    def report(self) -> dict[str, str]:
        """Figures for diagnostics.

        Counts; lateness and work of the last 1,000 ticks (``late_...``, ``work_...``) and of all since
        :meth:`count_anew` (``jitter_...``), ms; load; the share of processor time that the hypervisor took since then
        (``steal_share``, 0 to 1); scheduler, priority and processors of the thread that ticks, as the system says; the
        newest ten stalls since then (:func:`stalls_of` reads them).
        """
        with self._lock:
            ticks, missed, in_all, stalls = self.ticks, self.missed, self.missed_in_all, list(self.stalls)[-_TOLD:]
        processor = processor_ticks()
        stolen = steal_share(self._processor, processor)
        # Before the first tick nothing is known about its thread.
        thread = scheduling(self._thread) if self._thread is not None else None
        return {
            "ticks": str(ticks),
            "missed_ticks": str(missed),
            "missed_ticks_in_all": str(in_all),
            **_percentiles("late", self._late),
            **_percentiles("work", self._busy),
            **self.jitter.figures("jitter"),
            "stalls": " ".join(f"{deadline / 1e9:.6f}+{(begin - deadline) / 1e6:.3f}" for deadline, begin in stalls),
            "load_1min": f"{os.getloadavg()[0]:.2f}",
            "steal_ticks": str(processor[7]) if processor else "",
            "steal_share": "" if stolen is None else f"{stolen:.4f}",
            "scheduler": thread.text if thread else "",
            "cpus": ",".join(map(str, thread.cpus)) if thread else "",
        }


def stalls_of(text: str) -> list[Stall]:
    """Read a report's stalls, each told as deadline (monotonic s) and lateness (ms): ``81234.567891+12.345``."""
    found = []
    for stall in text.split():
        due, late = stall.split("+")
        deadline = round(float(due) * 1e9)
        found.append((deadline, deadline + round(float(late) * 1e6)))
    return found


def _percentiles(name: str, values: deque[int]) -> dict[str, str]:
    texts = [f"{value / 1e6:.3f}" for value in percentiles(values, 50, 99, 100)] or ["", "", ""]
    return {f"{name}_{which}_ms": text for which, text in zip(("p50", "p99", "max"), texts, strict=True)}
