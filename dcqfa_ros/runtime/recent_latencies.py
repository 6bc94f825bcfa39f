"""The last latencies of a policy, so that whoever watches it need not wait for a whole episode's percentiles."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

KEPT = 25
COUNT, LATENCIES = "inference_count", "inference_recent_ms"


class RecentLatencies:
    """Keeps the last latencies and how many there were. Safe to use from several threads."""

    def __init__(self) -> None:
        """Know none."""
        self._lock = threading.Lock()
        self._kept: deque[float] = deque(maxlen=KEPT)
        self._count = 0

    def add(self, latency_ms: float) -> None:
        """Take the latency of one more chunk, milliseconds."""
        with self._lock:
            self._kept.append(latency_ms)
            self._count += 1

    def figures(self) -> dict[str, str]:
        """Return ``inference_count`` (chunks since the start) and ``inference_recent_ms`` (newest last)."""
        with self._lock:
            return {COUNT: str(self._count), LATENCIES: " ".join(f"{latency:.2f}" for latency in self._kept)}


def newer(values: Mapping[str, str], count_before: int | None) -> tuple[int, tuple[float, ...]] | None:
    """Return the count and the latencies (ms) that came after ``count_before``; None: none were told.

    Where more came than are kept, those kept are returned; a count that fell is that of a process begun anew.

    Raises:
        ValueError: the values do not hold what :meth:`RecentLatencies.figures` writes.
    """
    if COUNT not in values or LATENCIES not in values:
        return None
    count, latencies = int(values[COUNT]), tuple(float(text) for text in values[LATENCIES].split())
    if count < 0 or len(latencies) > count or not all(0.0 <= latency < float("inf") for latency in latencies):
        raise ValueError(f"{COUNT} {count} and {LATENCIES} {values[LATENCIES]!r} do not belong together")
    if count_before is None:
        return count, ()
    new = count if count < count_before else count - count_before
    return count, latencies[len(latencies) - min(new, len(latencies)) :]
