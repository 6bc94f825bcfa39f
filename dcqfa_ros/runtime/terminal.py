"""Keys from a terminal, one by one and without waiting; the terminal is as it was before, however this ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import termios
from collections.abc import Iterator
from typing import Any

from dcqfa_ros.errors import UserError


class TerminalError(UserError, OSError):
    """There is no terminal to read keys from, or it went away; the message says what to do."""


def has_terminal(descriptor: int = 0) -> bool:
    """Whether keys typed at ``descriptor`` reach this process: a terminal with this process in its foreground."""
    with contextlib.suppress(OSError):
        return os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp()
    return False


class KeyTerminal:
    """A terminal that hands over every key at once, without echo. Ctrl-C stays a signal; Ctrl-Z does nothing."""

    def __init__(self, descriptor: int = 0) -> None:
        """Remember which descriptor to read; :meth:`open` changes the terminal."""
        self._fd = descriptor
        self._before: list[Any] | None = None

    def open(self) -> None:
        """Switch echo and line editing off.

        Raises:
            TerminalError: no terminal, or this process is in its background.
        """
        if self._before is not None:
            return
        if not has_terminal(self._fd):
            raise TerminalError(
                "teleoperation by keyboard needs a terminal with this program in its foreground; "
                "use a gamepad (--input joy) where there is none"
            )
        before = termios.tcgetattr(self._fd)
        changed = termios.tcgetattr(self._fd)
        changed[3] &= ~(termios.ICANON | termios.ECHO)
        # A suspended process cannot take its last twist back: the key that suspends is off.
        disabled = os.fpathconf(self._fd, "PC_VDISABLE")
        changed[6][termios.VSUSP] = bytes([disabled & 0xFF])
        changed[6][termios.VMIN], changed[6][termios.VTIME] = 1, 0
        self._before = before
        atexit.register(self.close)
        termios.tcsetattr(self._fd, termios.TCSADRAIN, changed)

    def read(self) -> bytes:
        """Return what was typed since the last call, b"" when nothing was; never waits.

        Raises:
            TerminalError: not open, or the terminal is gone.
        """
        if self._before is None:
            raise TerminalError("the terminal is not open: call open() first")
        try:
            if not select.select([self._fd], [], [], 0.0)[0]:
                return b""
            data = os.read(self._fd, 4096)
        except OSError as error:
            raise TerminalError(f"the terminal is gone ({error.strerror}): start teleoperation again") from error
        if not data:
            raise TerminalError("the terminal was closed: start teleoperation again")
        return data

    def close(self) -> None:
        """Give the terminal back as it was. Safe to call at any time and more than once."""
        before, self._before = self._before, None
        if before is not None:
            atexit.unregister(self.close)
            restore(self._fd, before)


def restore(descriptor: int, attributes: list[Any]) -> None:
    """Set a terminal's attributes, whatever the process's place in it; a terminal that is gone needs nothing."""
    with contextlib.suppress(OSError, termios.error):
        termios.tcsetattr(descriptor, termios.TCSANOW, attributes)


@contextlib.contextmanager
def kept_terminal(descriptor: int = 0) -> Iterator[None]:
    """Give the terminal back as it was when the body ends: for a parent whose child may be killed while it reads keys.

    Does nothing where ``descriptor`` is no terminal.
    """
    try:
        before = termios.tcgetattr(descriptor)
    except (OSError, termios.error):
        yield
        return
    try:
        yield
    finally:
        restore(descriptor, before)
