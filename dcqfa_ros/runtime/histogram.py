"""Percentiles: of a few values at once, and of any number of durations in constant memory and time per duration."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

RESOLUTION_NS = 10_000
BINS = 20_000  # up to 200 ms


def percentiles(values: Iterable[float], *percents: float) -> list[float]:
    """Return percentiles, linear between neighbours; empty where there are no values.

    Not ``np.percentile``: its first call imports ``numpy.ma``, 40 ms in whatever loop makes it.
    """
    ascending = sorted(values)
    return [_place(ascending, percent / 100.0 * (len(ascending) - 1)) for percent in percents] if ascending else []


def _place(ascending: list[float], place: float) -> float:
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (place - low) * (ascending[high] - ascending[low])


class Histogram:
    """Counts durations in bins of 10 us up to 200 ms; the largest is kept exactly, those beyond count as the largest.

    Not thread-safe: a reader may miss what is being added.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self._bins = np.zeros(BINS + 1, np.int64)
        self.count = 0
        self.maximum_ns = 0

    def add(self, duration_ns: int) -> None:
        """Count a duration; a negative one counts as 0."""
        duration_ns = max(0, duration_ns)
        self._bins[min(duration_ns // RESOLUTION_NS, BINS)] += 1
        self.count += 1
        self.maximum_ns = max(self.maximum_ns, duration_ns)

    def percentile_ns(self, percent: float) -> int:
        """Return the smallest bound below or at which ``percent`` of the durations lie, to 10 us; 0 where empty."""
        if not self.count:
            return 0
        wanted = percent / 100.0 * self.count
        index = int(np.searchsorted(np.cumsum(self._bins), wanted))
        return self.maximum_ns if index >= BINS else min((index + 1) * RESOLUTION_NS, self.maximum_ns)

    def figures(self, name: str) -> dict[str, str]:
        """Return ``<name>_p50_ms``, ``_p99_ms`` and ``_max_ms``; empty texts where nothing was counted."""
        values = (self.percentile_ns(50), self.percentile_ns(99), self.maximum_ns)
        return {
            f"{name}_{which}_ms": f"{value / 1e6:.3f}" if self.count else ""
            for which, value in zip(("p50", "p99", "max"), values, strict=True)
        }

    def clear(self) -> None:
        """Begin anew."""
        self._bins[:] = 0
        self.count = self.maximum_ns = 0
