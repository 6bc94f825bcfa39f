"""How many actions pass between an observation and the arrival of its chunk."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable

from dcqfa_ros.runtime.histogram import percentiles

KEPT = 100  # latencies that count
PERCENTILE = 95.0


class DelayEstimator:
    """Delay from measured latencies: ``d = ceil(p95 * rate)``.

    Warm-up runs do not count: the first of an episode, and the first by another engine or number of denoising steps,
    whose latencies also replace those measured before. Until one counts, the latest warm-up run stands in for it.
    Written by one thread.
    """

    def __init__(self) -> None:
        """Know no latency."""
        self._latencies: deque[float] = deque(maxlen=KEPT)
        self._warm_up_s = 0.0
        self._computed_by: Hashable = None
        self._first = True

    def begin(self) -> None:
        """An episode begins: its first run is a warm-up."""
        self._first = True

    def add(self, latency_s: float, computed_by: Hashable) -> bool:
        """Add the time from an observation's arrival to its chunk's publication; returns whether it counts.

        Args:
            latency_s: seconds, not negative.
            computed_by: what computed the chunk; another one begins anew.
        """
        warm_up = self._first or computed_by != self._computed_by
        if computed_by != self._computed_by:
            self._latencies.clear()
        self._first, self._computed_by = False, computed_by
        if warm_up:
            self._warm_up_s = latency_s
        else:
            self._latencies.append(latency_s)
        return not warm_up

    @property
    def counted(self) -> int:
        """Runs that count."""
        return len(self._latencies)

    @property
    def p95_s(self) -> float:
        """95th percentile of the latencies that count, seconds; of a warm-up run where none does."""
        latencies = list(self._latencies)  # diagnostics ask from another thread: it may be emptied meanwhile
        return next(iter(percentiles(latencies, PERCENTILE)), self._warm_up_s)

    def actions(self, period_ns: int) -> int:
        """Return the delay in actions of ``period_ns`` nanoseconds each, rounded up."""
        return math.ceil(self.p95_s * 1e9 / period_ns - 1e-9)  # what is rounding only is no further action
