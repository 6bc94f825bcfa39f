"""What the watch sees of the recent past, and what of it is too much."""

from __future__ import annotations

from collections.abc import Mapping

from dcqfa_ros.devices.watch_limits import WatchLimits
from dcqfa_ros.devices.watch_types import Cause, Sample
from dcqfa_ros.devices.watch_window import Holds, LatencyWindow, RateWindow
from dcqfa_ros.runtime.histogram import percentiles

_FEWEST_TICKS = 10


class Observed:
    """Latencies and counters of the present rung, judged against the thresholds.

    Attributes:
        holds: since when conditions have held: causes, and whatever the owner adds.
    """

    def __init__(self, limits: WatchLimits, budget_ms: float, period_ms: float) -> None:
        """Have seen nothing; ``budget_ms`` is what a chunk may take, ``period_ms`` one control period."""
        self._limits, self._budget_ms, self._period_ms = limits, budget_ms, period_ms
        self._latencies = LatencyWindow(limits.window_s, limits.fewest)
        self._missed = RateWindow(limits.window_s, _FEWEST_TICKS)
        self._starved = RateWindow(limits.window_s, _FEWEST_TICKS)
        self._recent: list[float] = []
        self.holds = Holds()

    def clear(self) -> None:
        """Forget all."""
        self._recent = []
        for memory in (self._latencies, self._missed, self._starved, self.holds):
            memory.clear()

    def add(self, sample: Sample) -> None:
        """Take a sample of the present rung."""
        self._latencies.add(sample.time_s, sample.latencies_ms)
        for window, count in ((self._missed, sample.missed), (self._starved, sample.starved)):
            if count is not None and sample.ticks is not None:
                window.add(sample.time_s, count, sample.ticks)

    def p95(self) -> float | None:
        """Return the 95th percentile of recent latencies, ms; None where there are too few."""
        return next(iter(percentiles(self._recent, 95)), None)

    def share(self, latency_ms: float) -> str:
        """Return a latency as a share of the budget, in words."""
        return f"{latency_ms / self._budget_ms:.0%} of the budget of {self._budget_ms:.0f} ms"

    def limit(self, sample: Sample) -> float | None:
        """Return the temperature at which to go cheaper: the operator's, else a little below the device's own limit."""
        if self._limits.temperature_c:
            return self._limits.temperature_c
        device = sample.temperature_limit_c
        return None if device is None else device - self._limits.temperature_margin_c

    def pressing(self, sample: Sample) -> dict[Cause, str]:
        """Return what is too much at the time of ``sample`` -> in words, the worst first, and note since when."""
        limits, self._recent = self._limits, self._latencies.recent(sample.time_s)
        found: dict[Cause, str] = {}
        p95, starved, missed = self.p95(), self._starved.share(), self._missed.share()
        for what, free, low in (
            ("memory", sample.memory_free_bytes, limits.memory_low_bytes),
            ("GPU memory", sample.gpu_memory_free_bytes, limits.gpu_memory_low_bytes),
        ):
            if free is not None and free < low:
                found[Cause.MEMORY] = f"{free >> 20} MiB of {what} are free, less than {low >> 20},"
        most = limits.share_down * self._budget_ms
        # One slow chunk, of the few that a slow policy computes, is not yet a load.
        if p95 is not None and p95 > most and sum(took > most for took in self._recent) >= limits.fewest:
            found[Cause.LATENCY] = f"a chunk takes {p95:.1f} ms (p95), {self.share(p95)},"
        # An inference that is done within a control period leaves no tick without an action.
        if starved is not None and p95 is not None and p95 > self._period_ms and _above(starved, limits.starved_share):
            found[Cause.STARVED] = f"the arm had no action in {starved:.0%} of its ticks"
        if missed is not None and _above(missed, limits.missed_share):
            found[Cause.MISSES] = f"{missed:.1%} of the arm's ticks were missed"
        limit = self.limit(sample)
        if sample.temperature_c is not None and limit is not None and sample.temperature_c >= limit:
            found[Cause.TEMPERATURE] = f"{sample.temperature_c:.1f} degrees, the limit is {limit:.1f},"
        if sample.throttled and p95 is not None and p95 > limits.share_up * self._budget_ms:
            found[Cause.THROTTLING] = f"the device slows itself down and a chunk takes {self.share(p95)}"
        for cause in Cause:
            self.holds.note(sample.time_s, cause, cause in found)
        return found

    def ended(self, pressing: Mapping[Cause, str]) -> set[Cause]:
        """Return which of the arm's troubles are known to be over."""
        shares = ((Cause.STARVED, self._starved.share()), (Cause.MISSES, self._missed.share()))
        return {cause for cause, share in shares if share is not None and cause not in pressing}

    def figures(self) -> dict[str, str]:
        """Return key-value pairs; empty values are unknown."""
        p50, p95 = percentiles(self._recent, 50, 95) or (None, None)
        missed, starved = self._missed.share(), self._starved.share()
        return {
            "latency_p50_ms": "" if p50 is None else f"{p50:.2f}",
            "latency_p95_ms": "" if p95 is None else f"{p95:.2f}",
            "budget_share": "" if p95 is None else f"{p95 / self._budget_ms:.3f}",
            "missed_share": "" if missed is None else f"{missed:.4f}",
            "starved_share": "" if starved is None else f"{starved:.4f}",
        }


def _above(share: float, limit: float) -> bool:
    """Tell whether a share is above a limit that is watched (0: it is not)."""
    return limit > 0.0 and share > limit
