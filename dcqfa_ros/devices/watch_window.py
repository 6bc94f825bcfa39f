"""What the watch remembers of the recent past: latencies, rates of counters, since when conditions hold."""

from __future__ import annotations

from collections import deque

OLDER = 3.0
"""Where too few latencies came within the window, those of this many windows count: slow policies send few chunks."""


class LatencyWindow:
    """Latencies of the last seconds, milliseconds."""

    def __init__(self, seconds: float, fewest: int) -> None:
        """Keep ``seconds``; below ``fewest`` latencies nothing is said."""
        self._seconds, self._fewest = seconds, fewest
        self._kept: deque[tuple[float, float]] = deque(maxlen=2000)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    def add(self, now: float, latencies_ms: tuple[float, ...]) -> None:
        """Take latencies that became known at ``now``, seconds."""
        self._kept.extend((now, latency) for latency in latencies_ms)

    def recent(self, now: float) -> list[float]:
        """Return the latencies that count at ``now``, ascending; empty where too few came lately."""
        while self._kept and self._kept[0][0] <= now - OLDER * self._seconds:
            self._kept.popleft()
        recent = [latency for time, latency in self._kept if time > now - self._seconds]
        if len(recent) < self._fewest:
            recent = [latency for _, latency in self._kept][-self._fewest :]
        return sorted(recent) if len(recent) >= self._fewest else []


class RateWindow:
    """Share of one counter's growth in another's over the last seconds; a counter that fell was begun anew."""

    def __init__(self, seconds: float, fewest: int) -> None:
        """Look back ``seconds``; below ``fewest`` counts nothing is said."""
        self._seconds, self._fewest = seconds, fewest
        self._kept: deque[tuple[float, int, int]] = deque(maxlen=2000)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    def add(self, now: float, count: int, of: int) -> None:
        """Take two counters as read at ``now``."""
        if self._kept and (count < self._kept[-1][1] or of < self._kept[-1][2]):
            self._kept.clear()
        self._kept.append((now, count, of))
        while len(self._kept) > 2 and self._kept[1][0] <= now - self._seconds:
            self._kept.popleft()

    def share(self) -> float | None:
        """Return the share, None where the second counter grew too little to say."""
        if len(self._kept) < 2:
            return None
        (_, count, of), (_, last_count, last_of) = self._kept[0], self._kept[-1]
        return (last_count - count) / (last_of - of) if last_of - of >= self._fewest else None


class Holds:
    """Since when named conditions have held without a break."""

    def __init__(self) -> None:
        """Nothing holds."""
        self._since: dict[object, float] = {}

    def clear(self) -> None:
        """Forget all."""
        self._since.clear()

    def note(self, now: float, condition: object, holds: bool) -> None:
        """Take note whether a condition holds at ``now``."""
        if holds:
            self._since.setdefault(condition, now)
        else:
            self._since.pop(condition, None)

    def held(self, now: float, condition: object) -> float | None:
        """Return for how many seconds a condition has held, None where it does not."""
        since = self._since.get(condition)
        return None if since is None else now - since
