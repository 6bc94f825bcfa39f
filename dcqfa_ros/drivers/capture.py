"""What is known of a stream of pictures while it is captured: rate, age, drops, outages. Plain Python, thread-safe."""

from __future__ import annotations

import threading
import time
from collections import deque

from dcqfa_ros.runtime.histogram import percentiles

_WINDOW_FRAMES = 120  # frames over which rate and work are reported


class CaptureRecord:
    """Frames, drops and outages of one activation. Written by the capture thread, read by the executor."""

    def __init__(self, fps: float) -> None:
        """Begin with an outage: nothing has come yet."""
        self._period_ns = 1e9 / fps
        self._lock = threading.Lock()
        self._pictures: deque[tuple[int, int]] = deque(maxlen=_WINDOW_FRAMES)  # stamp and work, ns
        self._began_ns = time.monotonic_ns()
        self.frames = 0
        self.drops = 0
        self.reconnects = 0
        """Outages that ended with a picture."""
        self.outage = "the camera has not delivered yet"
        """Why there is no picture; empty while there is one."""

    def picture(self, stamp_ns: int, work_ns: int) -> bool:
        """Count a frame; True when it ends an outage, whose missing frames are not drops.

        Args:
            stamp_ns: when it was taken.
            work_ns: time from then until it was published.
        """
        with self._lock:
            recovered = bool(self.outage)
            if recovered:
                self._pictures.clear()
                self.reconnects += self.frames > 0
            elif self._pictures:
                periods = (stamp_ns - self._pictures[-1][0]) / self._period_ns
                self.drops += max(0, round(periods) - 1)
            self._pictures.append((stamp_ns, work_ns))
            self.frames += 1
            self.outage = ""
            return recovered

    def lost(self, reason: str) -> bool:
        """Note why there is no picture; True when there was one until now."""
        with self._lock:
            first = not self.outage
            self.outage = reason
            return first

    @property
    def waited_ns(self) -> int:
        """Time since the capture began."""
        return time.monotonic_ns() - self._began_ns

    def figures(self) -> tuple[float, float, float]:
        """Return rate [Hz], age of the newest frame [ms] and p99 of the work per frame [ms]; NaN where unknown."""
        with self._lock:
            pictures = list(self._pictures)
        if not pictures:
            return float("nan"), float("nan"), float("nan")
        age = (time.monotonic_ns() - pictures[-1][0]) / 1e6
        span = pictures[-1][0] - pictures[0][0]
        rate = (len(pictures) - 1) * 1e9 / span if span > 0 else float("nan")
        return rate, age, percentiles((work for _, work in pictures), 99)[0] / 1e6
