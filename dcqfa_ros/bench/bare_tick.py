"""A process that ticks and does nothing else: what delays it delays every process of this computer.

Runs until its standard input ends, then prints one line of JSON: ``missed``, ``max_ms`` (lateness), ``scheduler``, and
``stalls``, deadline and begin of the newest ticks that began half a period late or more (monotonic ns).
Beside a measured control tick it tells what the kernel, or the host of a virtual machine, did.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Sequence

from dcqfa_ros.bench.processes import BenchError, end, result, run_module
from dcqfa_ros.runtime.realtime import RealtimeSettings, apply
from dcqfa_ros.runtime.ticker import STALLS, Stall, Ticker

NAME = "reference tick"


def start(rate_hz: float, priority: int) -> subprocess.Popen[str]:
    """Start the process and wait for its first tick.

    :func:`dcqfa_ros.bench.processes.result` ends it and returns what it measured.

    Args:
        rate_hz: of the tick.
        priority: of SCHED_FIFO, of the measured tick: this one gets the next above; 0: neither has one.

    Raises:
        BenchError: it did not begin; says why.
    """
    process = run_module("dcqfa_ros.bench.bare_tick", str(rate_hz), str(min(99, priority + 1) if priority else 0))
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            result(process, NAME, 10.0)
            raise BenchError(f"the {NAME} did not begin")
    except BaseException:
        end(process)
        raise
    return process


def missed_alone(stalls: Sequence[Stall], others: Sequence[Stall], period_ns: int) -> int | None:
    """Ticks missed in ``stalls`` (deadline, begin; ns) whose deadline lies in none of ``others``.

    A process sees a stall from its next deadline on, so a stall of ``others`` may have begun a period before. None
    where either list is so long that it may lack the oldest.
    """
    if max(len(stalls), len(others)) >= STALLS:
        return None
    missed = (
        deadline + number * period_ns
        for deadline, begin in stalls
        for number in range(1, (begin - deadline) // period_ns + 1)
    )
    return sum(not any(start - period_ns <= late <= end for start, end in others) for late in missed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tick until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rate", type=float, help="Hz")
    parser.add_argument("priority", type=int, help="of SCHED_FIFO; 0: none")
    args = parser.parse_args(arguments)
    halt = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        halt.set()

    threading.Thread(target=listen, daemon=True).start()
    gc.disable()
    apply(RealtimeSettings(args.priority))  # what was refused shows in the scheduler told
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
