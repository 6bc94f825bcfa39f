"""Ending a long command at a safe point instead of in the middle of a step, and its processes with it.

A signal to a command's process group (Ctrl-C in a terminal, a terminal that is closed, ``timeout``) reaches each of its
processes; what it means is the parent's to decide. So processes are started within :func:`signals_wait`, and the first
thing that each does is :func:`follow_parent`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Set an event on INT, TERM or HUP instead of dying, so that the current step ends and the checkpoint is written.

    A second INT interrupts at once. A HUP that is ignored (``nohup``) stays ignored.
    """
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Put off what INT, TERM and HUP do until the end; a process that is started meanwhile inherits them blocked.

    Blocking alone would not do: another thread may take the signal, and its handler then runs in this one.
    ``multiprocessing.resource_tracker``, where it has to be started, unblocks INT and TERM: start it on its own before.
    """
    came: list[int] = []
    handlers: dict[int, Any] = {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if callable(signal.getsignal(number)):
                    handlers[number] = signal.signal(number, lambda number, _frame: came.append(number))
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for stopping, handler in reversed(handlers.items()):  # INT, which may raise, last
            signal.signal(stopping, handler)
        for late in came:
            signal.raise_signal(late)


def follow_parent() -> None:
    """Leave INT, TERM and HUP to the parent, which started this process within :func:`signals_wait`; end if it dies."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
