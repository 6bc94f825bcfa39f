"""The control tick's process: ``python -m dcqfa_ros.bench.swap_tick_main CONTROL_FD PARENT_PID``.

Started by :class:`dcqfa_ros.bench.swap_tick.TickProcess`, never by hand. It has one thread, which consumes one action
per period as ``arm_node``'s control thread does. Messages on the control socket (SOCK_SEQPACKET) begin with one letter:

- from the parent: first a JSON object (:func:`main`); then ``C``, a chunk; ``A``, count anew; ``R``, report;
- to the parent: ``T``, a tick; ``R``, the answer to ``A`` or ``R``, JSON; ``E``, why this process ends.

Nothing is waited for inside a tick: what has come is read at its beginning, and an observation that the parent leaves
no room for is not told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import signal
import socket
import struct
import sys
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcqfa_ros.runtime.chunk_buffer import ChunkBuffer
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.realtime import RealtimeSettings, apply
from dcqfa_ros.runtime.ticker import Ticker

MAX_MESSAGE = 65_536
CHUNK = struct.Struct("<cq")  # C, number of the first action; then float32 actions (n, Da), little-endian
TICK = struct.Struct("<cqqq")  # T, stamp of the observation (ns), actions consumed by then, ticks missed
ANEW, REPORT, ERROR = b"A", b"R", b"E"


@dataclass(frozen=True, slots=True)
class TickReport:
    """What the control tick was like since it was last told to count anew.

    Attributes:
        ticks: done.
        missed: ticks that began over a full period late, one per period.
        starved: ticks without an action.
        untold: ticks whose observation was not sent, because the parent had not read those before.
        jitter_p50_ms, jitter_p99_ms, jitter_max_ms: how late they began; 0 where there was none.
        scheduler: of the thread, as the system says.
        stalls: deadline and begin, monotonic ns, of the newest that began half a period late or more.
    """

    ticks: int
    missed: int
    starved: int
    untold: int
    jitter_p50_ms: float
    jitter_p99_ms: float
    jitter_max_ms: float
    scheduler: str
    stalls: tuple[tuple[int, int], ...]


class _Arm:
    """A control tick that consumes a policy's chunks, one action per tick."""

    def __init__(self, control: socket.socket, action_dim: int, period_ns: int) -> None:
        self._control, self._dim = control, action_dim
        self._ticker = Ticker(period_ns)
        self._buffer = ChunkBuffer(action_dim)
        self._starved = self._untold = 0
        self._before = (0, 0, 0)  # ticks, starved and untold when counting began
        self._answers: deque[bytes] = deque()

    def run(self, parent: int) -> None:
        """Tick until the parent is gone or has closed the socket."""
        ticker, halt, stamp = self._ticker, threading.Event(), 0
        self._control.setblocking(False)
        ticker.restart()
        # The parent's id is compared in case the socket's other end was inherited by a third process.
        with contextlib.suppress(ConnectionError):
            while os.getppid() == parent:
                ticker.wait(halt)
                if not self._read():
                    return
                self._starved += self._buffer.next() is None
                while self._answers and self._sent(self._answers[0]):
                    self._answers.popleft()
                self._untold += not self._sent(TICK.pack(b"T", stamp, self._buffer.consumed, ticker.missed))
                stamp += ticker.period_ns
                ticker.done()

    def _read(self) -> bool:
        """Take all messages that have come; False once the parent has closed the socket."""
        while True:
            try:
                message = self._control.recv(MAX_MESSAGE)
            except BlockingIOError:
                return True
            kind = message[:1]
            if not kind:
                return False
            if kind == b"C":
                actions = np.frombuffer(message, "<f4", offset=CHUNK.size).reshape(-1, self._dim)
                with contextlib.suppress(PolicyError):  # too late; the ticks without an action are counted
                    self._buffer.push(CHUNK.unpack_from(message)[1], actions)
                continue
            if kind == ANEW:
                self._ticker.count_anew()
                self._before = (self._ticker.ticks, self._starved, self._untold)
            self._answers.append(REPORT + json.dumps(dataclasses.asdict(self._report())).encode())

    def _report(self) -> TickReport:
        ticker = self._ticker
        ticks, starved, untold = self._before
        p50, p99, largest = (round(ticker.jitter.percentile_ns(share) / 1e6, 3) for share in (50, 99, 100))
        return TickReport(
            ticker.ticks - ticks,
            ticker.missed,
            self._starved - starved,
            self._untold - untold,
            p50,
            p99,
            largest,
            ticker.report()["scheduler"],
            tuple(ticker.stalls),
        )

    def _sent(self, message: bytes) -> bool:
        try:
            self._control.send(message)
        except BlockingIOError:
            return False
        return True


def main(argv: list[str]) -> int:
    """Tick until the parent goes; exit codes: 0 parent gone, 1 the system refuses the priority.

    The first message is a JSON object: action_dim, period_ns, realtime_priority (0: none),
    processors to run on (none: any) and lock_memory.
    """
    # As for an engine's worker: Ctrl-C reaches every process of a terminal, and when to end is the parent's decision.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(argv[0]))
    message = control.recv(MAX_MESSAGE)
    if not message:
        return 0
    request: dict[str, Any] = json.loads(message)
    refusals = apply(
        RealtimeSettings(request["realtime_priority"], tuple(request["processors"]), request["lock_memory"])
    )
    if refusals:
        control.send(ERROR + refusals[0].encode())
        return 1
    arm = _Arm(control, request["action_dim"], request["period_ns"])
    gc.collect()
    gc.freeze()  # as nodes do when they are activated
    arm.run(int(argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
