"""Device time to monotonic time of this host, by the smallest delay seen, and without the host's wall clock."""

from __future__ import annotations

from collections import deque

_BUCKET_NS = 1_000_000_000
_BUCKETS = 10  # 10 s: 50 ppm of drift are then 0.5 ms
_JUMP_NS = 1_000_000_000


class DeviceClock:
    """Maps a device's time stamps to ``time.monotonic_ns`` of this host.

    The offset is the smallest difference between arrival and device time over the last 10 s: delays on the way only
    ever add. So a stamp is late by the smallest delay of the transfer, and the jitter of arrival is gone; drift between
    the clocks is followed. A device time that jumps (restart, counter wrap, a recording that begins again) starts over.
    Not thread-safe.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self.reset()

    def reset(self) -> None:
        """Forget the offset; for a device that was connected again."""
        self._buckets: deque[tuple[int, int]] = deque(maxlen=_BUCKETS)  # (number of the second, smallest offset)
        self._last_ns: int | None = None
        self._device_ns = 0
        self.resets = getattr(self, "resets", -1) + 1
        """How often the device time has jumped or the device was connected again."""

    def stamp(self, device_ns: int, arrival_ns: int) -> int:
        """Return when the frame was taken: monotonic ns, later than the previous one and not after its arrival.

        Args:
            device_ns: the frame's time on the device, ns, any origin.
            arrival_ns: monotonic time at which it reached this process.
        """
        offset = arrival_ns - device_ns
        if self._buckets and (device_ns < self._device_ns or abs(offset - self.offset_ns) > _JUMP_NS):
            last = self._last_ns
            self.reset()
            self._last_ns = last
        self._device_ns = device_ns
        second = arrival_ns // _BUCKET_NS
        if self._buckets and self._buckets[-1][0] == second:
            self._buckets[-1] = (second, min(self._buckets[-1][1], offset))
        else:
            self._buckets.append((second, offset))
        stamp = device_ns + self.offset_ns
        if self._last_ns is not None and stamp <= self._last_ns:
            stamp = self._last_ns + 1
        self._last_ns = min(stamp, arrival_ns)
        return self._last_ns

    @property
    def offset_ns(self) -> int:
        """Monotonic time of this host minus device time, ns; 0 before the first stamp."""
        return min((offset for _, offset in self._buckets), default=0)
