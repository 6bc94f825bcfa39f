"""Life of one node process: signals, the executor loop, an orderly end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from dcqfa_ros.ros.parameter_files import ParameterFileError, check_parameter_files
from dcqfa_ros.runtime.realtime import SWITCH_INTERVAL_S

if TYPE_CHECKING:
    from dcqfa_ros.ros.node import ManagedNode

PARENT_VARIABLE = "DCQFA_PARENT_PID"
"""Process id of the supervisor, set for its children so that one who starts after its death notices."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
LEAVE_S = 1.2
"""How long :meth:`ManagedNode.leave` may take; a graph must be down within 3 s."""
_POLL_S = 0.5  # bounds the delay of a stop should a wake-up ever be lost
_MAX_CONSECUTIVE_ERRORS = 10


class SetupInterrupted(BaseException):
    """A stop signal arrived while a node was in ``setup()``; no ``except Exception`` on the way swallows it."""


def die_with_parent() -> bool:
    """Ask the kernel to send TERM when the parent ends, so no node outlives a killed supervisor or launch.

    Returns:
        False when the parent named by ``DCQFA_PARENT_PID`` is gone already: the caller should end at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    expected = os.environ.get(PARENT_VARIABLE)
    return expected is None or os.getppid() == int(expected)


class StopRequest:
    """Turns INT, TERM and HUP into a reason and a wake-up; the ROS context stays valid, unlike with rclpy's handler.

    The kernel's signal is written to a socket by CPython at once, even while the main thread waits inside DDS; a small
    thread reads it and wakes the executor, and then the Python handler runs.
    """

    def __init__(self) -> None:
        """Install the handlers; call from the main thread. HUP stays ignored if it was (nohup)."""
        self.reason: str | None = None
        self.attached = False
        self._may_interrupt: Callable[[], bool] = lambda: False
        self._wake: Callable[[], None] = lambda: None
        self._receive, self._send = socket.socketpair()
        self._send.setblocking(False)
        signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            signal.signal(number, self._handle)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def attach(self, may_interrupt: Callable[[], bool], wake: Callable[[], None]) -> None:
        """Wake by ``wake`` from now on, and raise :class:`SetupInterrupted` where ``may_interrupt`` says yes."""
        self.attached, self._may_interrupt, self._wake = True, may_interrupt, wake

    def detach(self) -> None:
        """Wake nobody any more: the node is about to be destroyed."""
        self._may_interrupt = lambda: False
        self._wake = lambda: None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        first = self.reason is None
        if first:
            self.reason = f"signal {signal.Signals(number).name}"
        if first and self._may_interrupt():
            raise SetupInterrupted(self.reason)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while self._receive.recv(64):
                self._wake()

    def close(self) -> None:
        """Leave the handlers in place (a second signal stays harmless) but stop waking.

        INT is ignored from now on: the interpreter's end restores the default action in place of a handler, and the
        second INT that ``ros2 launch`` sends after the terminal's own would kill a node that has ended well.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.detach()
        signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError):
            self._receive.shutdown(socket.SHUT_RDWR)
        self._send.close()
        self._receive.close()


@contextlib.contextmanager
def _context(argv: Sequence[str]) -> Iterator[None]:
    import rclpy
    from rclpy.signals import SignalHandlerOptions
    from rclpy.utilities import try_shutdown

    rclpy.init(args=list(argv), signal_handler_options=SignalHandlerOptions.NO)
    try:
        yield
    finally:
        try_shutdown()


def run_node(factory: Callable[[], ManagedNode], argv: Sequence[str] | None = None) -> int:
    """Run one node until INT, TERM or HUP, then stop it, say why, clean up and return.

    Args:
        factory: the node class, or anything that makes the node.
        argv: command line with ROS arguments; ``sys.argv`` if None.

    Returns:
        0 after a stop signal; 1 when the node could not start or its executor is broken (one line on stderr).
        A node may choose another by setting its ``exit_code`` and calling ``finish``.
    """
    name = getattr(factory, "NODE_NAME", "node")
    stop = StopRequest()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        if not die_with_parent():
            return 0
        given = sys.argv if argv is None else argv
        with _context(given):
            return _run(factory, stop, given)
    except Exception as error:  # noqa: BLE001 - last resort: a user sees one line, never a traceback
        text = " ".join(str(error).split()) or type(error).__name__
        what = "failed" if stop.attached else "could not start"
        print(f"{name}: {what}: {text}", file=sys.stderr, flush=True)
        return 1
    finally:
        stop.close()


def _run(factory: Callable[[], ManagedNode], stop: StopRequest, argv: Sequence[str]) -> int:
    from dcqfa_ros.ros.executor import StreamExecutor

    if stop.reason is not None:
        return 0
    node = factory()
    try:
        check_parameter_files(argv, node.get_name(), node.parameter_names())
    except ParameterFileError:
        node.destroy_node()
        raise
    executor = StreamExecutor()
    executor.add_node(node)
    stop.attach(lambda: node.in_setup, node.wake)
    errors = 0
    try:
        while stop.reason is None and node.finish_reason is None and errors < _MAX_CONSECUTIVE_ERRORS:
            try:
                executor.spin_once(timeout_sec=_POLL_S)
                errors = 0
            except SetupInterrupted:
                break
            except Exception as error:  # noqa: BLE001 - rclpy's own callbacks are not ours to wrap
                errors += 1
                node.report_exception(error)
        if errors:
            node.exit_code = 1
        reason = stop.reason or node.finish_reason or "executor failed repeatedly"
        deadline = time.monotonic() + LEAVE_S
        while not errors and not node.leave(reason) and time.monotonic() < deadline:
            executor.spin_once(timeout_sec=0.02)
        node.shut_down(reason)
        return node.exit_code
    finally:
        stop.detach()
        executor.shutdown(timeout_sec=0.2)
        node.destroy_node()
