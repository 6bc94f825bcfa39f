"""Processes that tick and do nothing else, one per processor: what delays one delays every process on its processor.

Each runs until its standard input ends, then prints one line of JSON: ``missed``, ``max_ms`` (lateness), ``scheduler``,
and ``stalls``, deadline and begin of the newest ticks that began half a period late or more (monotonic ns).
Beside a measured control tick they tell what the kernel, or the host of a virtual machine, did.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from dcqfa_ros.bench.processes import BenchError, end, result, run_module
from dcqfa_ros.runtime.realtime import RealtimeSettings, apply
from dcqfa_ros.runtime.ticker import STALLS, Stall, Ticker

NAME = "reference tick"
_MOST = 8  # processors; beyond, one process that may run on any


@dataclass(frozen=True, slots=True)
class Told:
    """What the processes have measured: ticks missed in all, the greatest lateness (ms), and the stalls of each."""

    missed: int
    max_ms: float
    stalls: tuple[tuple[Stall, ...], ...]


class BareTicks:
    """The running processes."""

    def __init__(self, rate_hz: float, priority: int) -> None:
        """Start them and wait for the first tick of each.

        Args:
            rate_hz: of the tick.
            priority: of SCHED_FIFO, of the measured tick: these get the next above; 0: none has one.

        Raises:
            BenchError: one did not begin; says why. None is left.
        """
        processors: list[int | None] = sorted(os.sched_getaffinity(0))  # type: ignore[assignment]
        if len(processors) > _MOST:
            processors = [None]
        self._processes: list[subprocess.Popen[str]] = []
        try:
            for processor in processors:
                process = _spawn(rate_hz, priority, processor)
                self._processes.append(process)
                assert process.stdout is not None
                if not process.stdout.readline():
                    result(process, NAME, 10.0)
                    raise BenchError(f"the {NAME} did not begin")
        except BaseException:
            self.end()
            raise

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
            tuple(tuple((begin, late) for begin, late in one["stalls"]) for one in told),
        )

    def end(self) -> None:
        """Kill those that still run."""
        for process in self._processes:
            end(process)


def _spawn(rate_hz: float, priority: int, processor: int | None) -> subprocess.Popen[str]:
    above = min(99, priority + 1) if priority else 0
    pinned = () if processor is None else ("--processor", str(processor))
    return run_module("dcqfa_ros.bench.bare_tick", str(rate_hz), str(above), *pinned)


def missed_alone(stalls: Sequence[Stall], others: Sequence[Sequence[Stall]], period_ns: int) -> int | None:
    """Ticks that would have been missed in ``stalls`` (deadline, begin; ns) had those of ``others`` taken no time.

    A process sees a stall from its next deadline on, so a stall of ``others`` may have begun a period before. A host
    that pauses a virtual machine does so in bursts: a process of a higher priority may run in between, and the measured
    one not. None where a list is so long that it may lack the oldest.
    """
    if max(map(len, (stalls, *others))) >= STALLS:
        return None
    shared = _union([(deadline - period_ns, begin) for one in others for deadline, begin in one])
    alone = 0
    for deadline, begin in stalls:
        excused = sum(max(0, min(begin, stop) - max(deadline, start)) for start, stop in shared)
        alone += (begin - deadline - excused) // period_ns
    return alone


def _union(spans: Sequence[Stall]) -> list[Stall]:
    """Spans that do not overlap, of the same points."""
    found: list[Stall] = []
    for span in sorted(spans):
        if found and span[0] <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], span[1])
        else:
            found.append(span)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Tick until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rate", type=float, help="Hz")
    parser.add_argument("priority", type=int, help="of SCHED_FIFO; 0: none")
    parser.add_argument("--processor", type=int, help="that it runs on (default: any)")
    args = parser.parse_args(arguments)
    halt = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        halt.set()

    threading.Thread(target=listen, daemon=True).start()
    gc.disable()
    cpus = () if args.processor is None else (args.processor,)
    apply(RealtimeSettings(args.priority, cpus))  # what was refused shows in the scheduler told
    ticker = Ticker(round(1e9 / args.rate))
    ticker.wait(threading.Event())
    ticker.done()
    print("begun", flush=True)
    while not halt.is_set():
        ticker.wait(halt)
        ticker.done()
    report = ticker.report()
    told = {"missed": ticker.missed_in_all, "max_ms": float(report["jitter_max_ms"] or 0.0)}
    print(json.dumps({**told, "scheduler": report["scheduler"], "stalls": list(ticker.stalls)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
