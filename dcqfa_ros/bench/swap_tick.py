"""A control tick in a process of its own, as on a robot, where ``arm_node`` has it and ``policy_node`` the variants.

What a policy's process does (it starts a worker by ``vfork``, which keeps Python's interpreter lock until the worker's
program has been loaded; it prepares observations, compares chunks) can so delay a tick only by taking a processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.bench.swap_tick_main import ANEW, CHUNK, ERROR, MAX_MESSAGE, REPORT, TICK, TickReport
from dcqfa_ros.runtime.realtime import RealtimeSettings
from dcqfa_ros.runtime.worker import describe_exit, worker_environment

_MODULE = "dcqfa_ros.bench.swap_tick_main"
_CLOSE_TIMEOUT_S = 1.0
_ANSWER_TIMEOUT_S = 30.0
_BUFFER = 106_496  # bytes asked for; room for some 270 ticks that this process has not read yet


class TickProcess:
    """The parent's side of the control tick's process, which ends with :meth:`close`, or with this one however it ends.

    Attributes:
        missed: ticks missed since :meth:`count_anew`, as the last tick told.
    """

    def __init__(
        self,
        action_dim: int,
        period_ns: int,
        realtime: RealtimeSettings,
        on_tick: Callable[[int, int], None],
        on_lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start nothing yet.

        Args:
            action_dim: Da of the chunks.
            period_ns: of the tick.
            realtime: what the tick's thread asks for; memory can be locked, too.
            on_tick: told the stamp of each tick's observation (ns, from 0, one period apart) and the actions consumed
                by then, which is the number of the first action of a chunk computed on it; from a background thread.
            on_lost: told once why there is no tick any more, from that thread; not after :meth:`close`.
        """
        self._request: dict[str, Any] = {
            "action_dim": action_dim,
            "period_ns": period_ns,
            "realtime_priority": realtime.priority,
            "processors": realtime.cpus,
            "lock_memory": realtime.lock_memory,
        }
        self._on_tick, self._on_lost = on_tick, on_lost
        self._changed = threading.Condition()
        self._answers: list[TickReport] = []
        self._problem = ""
        self._closing = False
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self.missed = 0

    @property
    def pid(self) -> int:
        """Its process id; 0 while there is none."""
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process; whether it ticks shows by ``on_tick`` or ``on_lost``.

        Raises:
            BenchError: it cannot be started, or was before.
        """
        if self._process is not None:
            raise BenchError("the control tick's process: was started before")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", _MODULE, str(theirs.fileno()), str(os.getpid())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    cwd=os.sep,  # holds no module that could be imported by mistake
                    env=worker_environment(os.environ),
                    start_new_session=True,  # a terminal's Ctrl-C does not reach it, not even while it starts
                )
            except OSError as error:
                raise BenchError(f"the control tick's process: cannot start {sys.executable}: {error}") from error
        self._send(json.dumps(self._request).encode())
        self._thread = threading.Thread(target=self._listen, name="observations", daemon=True)
        self._thread.start()

    def push(self, first: int, actions: NDArray[np.float32]) -> None:
        """Send a chunk (n, Da) whose first action has the number ``first``; merged when the next tick begins."""
        self._send(CHUNK.pack(b"C", first) + np.ascontiguousarray(actions, "<f4").tobytes())

    def count_anew(self) -> None:
        """Forget what was counted; what is reported from now on begins with the tick that follows.

        Raises:
            BenchError: the process has ended, or does not answer.
        """
        self._ask(ANEW)

    def report(self) -> TickReport:
        """Return what the tick was like since :meth:`count_anew`.

        Raises:
            BenchError: the process has ended, or does not answer.
        """
        return self._ask(REPORT)

    def close(self) -> None:
        """End the process and reap it. Closing twice is allowed."""
        self._closing = True
        control, process, thread = self._control, self._process, self._thread
        if control is not None:
            with contextlib.suppress(OSError):  # the other side is gone
                control.shutdown(socket.SHUT_RDWR)
        if process is not None:
            try:
                process.wait(_CLOSE_TIMEOUT_S + self._request["period_ns"] / 1e9)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if thread is not None:
            thread.join(_ANSWER_TIMEOUT_S)
        if control is not None:
            control.close()

    def _send(self, message: bytes) -> None:
        control = self._control
        if control is None:
            raise BenchError("the control tick's process: not started")
        with contextlib.suppress(OSError):  # it has ended: who listens finds out why, and tells
            control.send(message)

    def _ask(self, question: bytes) -> TickReport:
        with self._changed:
            self._answers.clear()
            self._send(question)
            self._changed.wait_for(lambda: self._answers or self._problem, _ANSWER_TIMEOUT_S)
            if not self._answers:
                silent = f"the control tick's process (pid {self.pid}) did not answer in {_ANSWER_TIMEOUT_S:.0f} s"
                raise BenchError(self._problem or silent)
            return self._answers.pop()

    def _listen(self) -> None:
        problem = ""
        while not problem and (message := self._receive()):
            problem = self._take(message)
        if self._closing:
            return
        problem = problem or f"the control tick's process (pid {self.pid}) {self._how_it_ended()}"
        with self._changed:
            self._problem = problem
            self._changed.notify_all()
        self._on_lost(problem)

    def _receive(self) -> bytes:
        """Wait for the next message; empty at the end."""
        assert self._control is not None
        # A peer that ended with messages unread resets the connection ahead of its last words.
        for _ in range(2):
            with contextlib.suppress(ConnectionError):
                return self._control.recv(MAX_MESSAGE)
        return b""

    def _take(self, message: bytes) -> str:
        """Take one message; returns why there is no tick any more, where that is what it says."""
        kind = message[:1]
        if kind == ERROR:
            return message[1:].decode()
        if kind == REPORT:
            answer: dict[str, Any] = json.loads(message[1:])
            with self._changed:
                self.missed = answer["missed"]
                stalls = tuple((deadline, begin) for deadline, begin in answer["stalls"])
                self._answers.append(TickReport(**answer | {"stalls": stalls}))
                self._changed.notify_all()
        else:
            _, stamp_ns, consumed, self.missed = TICK.unpack(message)
            self._on_tick(stamp_ns, consumed)
        return ""

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            return describe_exit(self._process.wait(_CLOSE_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            return "has closed its socket"
