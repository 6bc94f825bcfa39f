"""Waiting for a device that is not there yet: one that boots slower than the computer, or is about to be plugged in."""

from __future__ import annotations

import time
from collections.abc import Callable

from dcqfa_ros.drivers.protocols import DriverError

RETRY_S = 0.2


def connect_patiently(
    connect: Callable[[], None],
    patience_s: float,
    absent: type[DriverError] | tuple[type[DriverError], ...],
    waiting: Callable[[str], None] = lambda _: None,
) -> None:
    """Call ``connect`` until it succeeds, again and again while it raises ``absent``, at most for ``patience_s``.

    Args:
        connect: connects the device.
        patience_s: how long to wait, seconds; 0 tries once.
        absent: errors that may go away by waiting.
        waiting: told once why it waits.

    Raises:
        DriverError: what ``connect`` raised last, or first where it is none of ``absent``.
    """
    end = time.monotonic() + patience_s
    told = False
    while True:
        try:
            connect()
            return
        except absent as error:
            if time.monotonic() + RETRY_S > end:
                raise
            if not told:
                told = True
                waiting(f"{error}; waiting for it up to {patience_s:g} s")
        time.sleep(RETRY_S)
