"""Deadman: a stop when nothing came for too long."""

from __future__ import annotations


class Deadman:
    """Expires ``timeout_s`` after the last feed. Times are monotonic nanoseconds, given by the caller."""

    def __init__(self, timeout_s: float) -> None:
        """Set the time-out in seconds.

        Raises:
            ValueError: the time-out is not positive and finite.
        """
        if not 0.0 < timeout_s < float("inf"):
            raise ValueError(f"deadman time-out: expected a positive number of seconds, got {timeout_s}")
        self.timeout_ns = int(timeout_s * 1e9)
        self._fed_ns: int | None = None

    def feed(self, now_ns: int) -> None:
        """Note a sign of life."""
        self._fed_ns = now_ns

    def disable(self) -> None:
        """Stop watching until the next feed."""
        self._fed_ns = None

    def expired(self, now_ns: int) -> bool:
        """Whether the time-out has passed since the last feed."""
        return self._fed_ns is not None and now_ns - self._fed_ns > self.timeout_ns
