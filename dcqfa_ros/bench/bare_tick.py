"""Processes that tick and do nothing else, one per processor: while none of them runs, the computer stands still.

Each waits for a line, ticks until its standard input ends, and prints one line of JSON (:func:`main`). Beside a
measured control tick they tell what the kernel, or the host of a virtual machine, did.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dcqfa_ros.bench.processes import BenchError, end, result, run_module
from dcqfa_ros.runtime.realtime import RealtimeSettings, apply
from dcqfa_ros.runtime.ticker import STALLS, Stall

NAME = "reference tick"
_MOST = 8  # processors; beyond, one process that may run on any
_FINER = 5  # ticks per period of the measured one: a stall's begin is known to a fifth of a period
_KEPT = 20_000  # stalls of a process: a host that halts a computer does so in bursts of short ones


@dataclass(frozen=True, slots=True)
class Told:
    """What the processes have measured.

    Attributes:
        missed: periods by which they came too late, in all.
        max_ms: the greatest lateness.
        processors: that each ran on; None: any.
        stood: per process, when it last ran before a tick that came a tenth of a period late or more, and when it ran
            again (monotonic ns); the newest.
        realtime: whether each had its priority above the measured tick's and its processor: what delays such a process
            is none of the measured programs' work, but where they hold the kernel itself.
    """

    missed: int
    max_ms: float
    processors: tuple[int | None, ...]
    stood: tuple[tuple[Stall, ...], ...]
    realtime: bool


class BareTicks:
    """The running processes."""

    def __init__(self, rate_hz: float, priority: int, processor: int | None = None) -> None:
        """Start them and let all of them begin at once.

        Args:
            rate_hz: of the measured tick.
            priority: of SCHED_FIFO, of the measured tick: these get the next above; 0: none has one.
            processor: that the measured tick is kept on, so that there is one on it in any case; None: none.

        Raises:
            BenchError: one did not begin; says why. None is left.
        """
        processors: list[int | None] = sorted(os.sched_getaffinity(0))  # type: ignore[assignment]
        if len(processors) > _MOST:
            processors = [None] if processor is None else [None, processor]
        self._processors = tuple(processors)
        self._processes: list[subprocess.Popen[str]] = []
        with contextlib.ExitStack() as started:
            for each in processors:
                self._processes.append(_spawn(rate_hz, priority, each))
                started.callback(end, self._processes[-1])
            self._await_line()
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            self._await_line()
            self._stack = started.pop_all()

    def _await_line(self) -> None:
        for process in self._processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                result(process, NAME, 10.0)
                raise BenchError(f"the {NAME} did not begin")

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids."""
        return tuple(process.pid for process in self._processes)

    def result(self) -> Told:
        """End them and return what they measured.

        Raises:
            BenchError: one was lost.
        """
        told = [result(process, NAME, 10.0) for process in self._processes]
        return Told(
            sum(int(one["missed"]) for one in told),
            max(float(one["max_ms"]) for one in told),
            self._processors,
            tuple(tuple((last, again) for last, again in one["stood"]) for one in told),
            all(one["realtime"] for one in told),
        )

    def end(self) -> None:
        """Kill those that still run."""
        self._stack.close()


def _spawn(rate_hz: float, priority: int, processor: int | None) -> subprocess.Popen[str]:
    above = min(99, priority + 1) if priority else 0
    pinned = () if processor is None else ("--processor", str(processor))
    return run_module("dcqfa_ros.bench.bare_tick", str(rate_hz), str(above), *pinned)


def missed_alone(stalls: Sequence[Stall], told: Told, period_ns: int, processor: int | None = None) -> int | None:
    """Ticks that would have been missed had the time in which no reference process ran not passed.

    With a processor, the time in which that one's did not: the kernel had it, also for what the measured programs had
    asked of it, or the host of a virtual machine.

    Args:
        stalls: of the measured tick: deadline and begin, monotonic ns.
        told: of the reference processes.
        period_ns: of the measured tick.
        processor: that it was kept on; None: what halted all counts.

    Returns:
        The number; None where the processor had no reference, where the references had no priority, and so were delayed
        by what they were to judge, or where a list is so long that it may lack the oldest.
    """
    if not told.realtime or len(stalls) >= STALLS or max(map(len, told.stood)) >= _KEPT:
        return None
    if processor is not None and processor not in told.processors:
        return None
    still, *others = [one for on, one in zip(told.processors, told.stood, strict=True) if processor in (None, on)]
    for other in others:
        still = tuple(_common(still, other))
    alone = 0
    for deadline, begin in stalls:
        excused = sum(max(0, min(begin, stop) - max(deadline, start)) for start, stop in still)
        alone += (begin - deadline - excused) // period_ns
    return alone


def describe(missed: int | None, max_ms: float | None, alone: int | None) -> str:
    """One line on what these processes tell."""
    if missed is None or max_ms is None:
        return "the processes that only tick were lost"
    without = "unknown how many" if alone is None else str(alone)
    return f"processes that only tick: max {max_ms:.2f} ms, {missed} missed; without what halted all, {without} missed"


def _common(spans: Sequence[Stall], others: Sequence[Stall]) -> list[Stall]:
    """Return the spans that lie in both; either list rises, and none in it overlaps another."""
    found, first, second = [], 0, 0
    while first < len(spans) and second < len(others):
        a, b = spans[first], others[second]
        start, stop = max(a[0], b[0]), min(a[1], b[1])
        if start < stop:
            found.append((start, stop))
        if a[1] < b[1]:
            first += 1
        else:
            second += 1
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Tick from the first line on standard input until its end, then print what :class:`Told` describes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rate", type=float, help="of the measured tick, Hz")
    parser.add_argument("priority", type=int, help="of SCHED_FIFO; 0: none")
    parser.add_argument("--processor", type=int, help="that it runs on (default: any)")
    args = parser.parse_args(arguments)
    halt, period_ns = threading.Event(), round(1e9 / args.rate)
    refused = apply(RealtimeSettings(args.priority, () if args.processor is None else (args.processor,)))
    gc.disable()
    print("ready", flush=True)
    if not sys.stdin.readline():
        return 0

    def listen() -> None:
        sys.stdin.read()
        halt.set()

    threading.Thread(target=listen, daemon=True).start()
    missed = greatest = 0
    stood: deque[Stall] = deque(maxlen=_KEPT)
    step = period_ns // _FINER
    last = time.monotonic_ns()
    deadline = last + step
    print("begins", flush=True)
    while not halt.wait(max(0, deadline - time.monotonic_ns()) / 1e9):
        now = time.monotonic_ns()
        late = now - deadline
        if late < 0:
            continue
        missed, greatest = missed + late // period_ns, max(greatest, late)
        if 2 * late >= step:
            stood.append((last, now))
        deadline += (late // step + 1) * step
        last = time.monotonic_ns()
    realtime = bool(args.priority) and not refused
    told = {"missed": missed, "max_ms": round(greatest / 1e6, 3), "stood": list(stood), "realtime": realtime}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
