"""What is watched during a soak: memory of the processes, deadlines of the arm's stream, silence of the nodes."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from dcqfa_ros.ros.diagnostics import LIFECYCLE
from test.faults.cell import FaultCell

SAMPLE_S = 2.0
LATE_PERIODS = 3.5
"""Between two frames of one stream: a tick that a command brings forward, the longer pause after it, and a frame that
was overtaken by the next leave 3.25; beyond that a deadline was missed."""
NEAR_S = 3.0  # diagnostics come once a second, and late where a computer stood still


class Watch(threading.Thread):
    """Samples memory until it is stopped."""

    def __init__(self, cell: FaultCell) -> None:
        super().__init__(name="soak watch", daemon=True)
        self._cell, self._halt = cell, threading.Event()
        self.memory: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self.began_s = time.monotonic()

    def run(self) -> None:
        while not self._halt.wait(SAMPLE_S):
            for name, process in self._cell.processes.items():
                size = resident(process.process.pid)
                if size:
                    self.memory[name].append((time.monotonic() - self.began_s, size))

    def stop(self) -> None:
        self._halt.set()
        self.join()

    def growth(self, after_s: float) -> dict[str, tuple[float, float]]:
        """Return per process: MiB at ``after_s`` and growth from then to the end, both medians over a tenth, in %."""
        found = {}
        for name, samples in self.memory.items():
            sizes = [size for at, size in samples if at >= after_s]
            tenth = max(3, len(sizes) // 10)
            first, last = np.median(sizes[:tenth]), np.median(sizes[-tenth:])
            found[name] = (float(first) / 2**20, 100.0 * float(last - first) / float(first))
        return found


def resident(pid: int) -> int:
    """Return the memory of a process that is its own, bytes; shared memory of the transport is not."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * 4096


def deadlines(cell: FaultCell, period_s: float) -> tuple[int, int, float]:
    """Return how many deadlines of the stream were missed, how many of them no diagnostic tells, and the longest gap.

    Looks at the time each frame was made, which it carries, against ``missed_ticks_in_all`` of ``arm_node``.
    """
    told = _told(cell)
    late, untold, longest, before = 0, 0, 0.0, None
    for demand in cell.arm.stream:
        if demand is None:
            before = None
            continue
        at, moves = demand
        if before is not None and moves:  # the frame after a stop begins another stream
            gap = at - before
            longest = max(longest, gap)
            if gap > LATE_PERIODS * period_s:
                late += 1
                untold += not any(abs(when - at) < NEAR_S + gap for when in told)
        before = at if moves else None
    return late, untold, longest


def _told(cell: FaultCell) -> list[float]:
    """Return the times (ROS clock, s) at which ``arm_node`` told of missed ticks that it had not told of before."""
    told, before = [], 0
    for when, missed in sorted(_counts(cell)):
        if missed > before:
            told.append(when)
        before = max(before, missed)
    return told


def _counts(cell: FaultCell) -> list[tuple[float, int]]:
    found = [(s["heard_s"], int(s["missed_ticks_in_all"])) for s in cell.states]
    for when, status in cell.arm_reports:
        found.append((when, int(status.values["missed_ticks_in_all"])))
    return found


def silences(cell: FaultCell, now_s: float) -> dict[str, float]:
    """Return the longest silence of each node's lifecycle reports, s."""
    last: dict[str, float] = {}
    longest: dict[str, float] = defaultdict(float)
    heard: list[Any] = [(when, r.node) for when, r in cell.reports if r.status.name == LIFECYCLE]
    for when, node in [*heard, *((now_s, node) for node in {node for _, node in heard})]:
        if node in last:
            longest[node] = max(longest[node], when - last[node])
        last[node] = when
    return dict(longest)
