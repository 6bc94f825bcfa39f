"""Thresholds and times of the watch, checked together."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dcqfa_ros.errors import UserError

MIB = 1 << 20


class WatchError(UserError, ValueError):
    """Thresholds that make no sense together; names them and what is expected."""


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """When to act.

    Attributes:
        share_down: p95 of a chunk's latency above this share of the budget is too much.
        share_up: a better rung must be expected below this share.
        hold_down_s: for how long something must be too much; longer than the window, else one slow chunk is enough.
        hold_up_s: for how long going back must look possible, at first.
        dwell_s: least time between two changes.
        prove_s: going back has failed when the policy goes cheaper within this time.
        wait_most_s: hold_up_s doubles with every failure up to this.
        window_s: latencies and rates of this long count.
        fewest: so many latencies (ticks) are needed to say anything.
        silent_s: a policy without a chunk for this long is silent: nothing is decided.
        gap_s: without a sample for this long, all is observed anew.
        swap_timeout_s: a change that has not come about after this long counts as refused.
        starved_share: share of ticks in which the arm had no action; 0: not watched.
        missed_share: share of ticks that were missed; 0: not watched.
        temperature_c: go cheaper at this temperature; 0: at the device's own limit.
        temperature_margin_c: so far below the device's own limit.
        temperature_hysteresis_c: going back needs it this much cooler.
        memory_low_bytes: less free memory is too little; 0: not watched.
        memory_ok_bytes: so much must be left free after going back.
        gpu_memory_low_bytes: as memory_low_bytes, of a GPU with memory of its own.
    """

    share_down: float = 0.9
    share_up: float = 0.6
    hold_down_s: float = 6.0
    hold_up_s: float = 10.0
    dwell_s: float = 15.0
    prove_s: float = 60.0
    wait_most_s: float = 600.0
    window_s: float = 4.0
    fewest: int = 3
    silent_s: float = 10.0
    gap_s: float = 5.0
    swap_timeout_s: float = 120.0
    starved_share: float = 0.3
    missed_share: float = 0.05
    temperature_c: float = 0.0
    temperature_margin_c: float = 2.0
    temperature_hysteresis_c: float = 5.0
    memory_low_bytes: int = 128 * MIB
    memory_ok_bytes: int = 256 * MIB
    gpu_memory_low_bytes: int = 128 * MIB

    def as_values(self) -> dict[str, str]:
        """Return key-value pairs for diagnostics; memory in MiB."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            k.replace("_bytes", "_mb"): str(v >> 20) if k.endswith("_bytes") else f"{v:g}" for k, v in values.items()
        }

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            WatchError: a value is negative or not finite, or thresholds for down and up leave no room between them.
        """
        for f in fields(self):
            value = getattr(self, f.name)
            if not 0.0 <= value < float("inf"):
                raise WatchError(f"{f.name}: expected 0 or more, got {value}")
        if not 0.0 < self.share_up < self.share_down:
            raise WatchError(
                f"share_up: expected more than 0 and less than share_down {self.share_down}, got {self.share_up}"
            )
        if self.memory_ok_bytes < self.memory_low_bytes:
            raise WatchError(
                f"memory_ok: expected at least memory_low, {self.memory_low_bytes >> 20} MiB, "
                f"got {self.memory_ok_bytes >> 20}"
            )
        if self.window_s <= 0.0 or self.fewest < 1:
            raise WatchError("window_s: expected more than 0, and fewest: at least 1")
        if self.prove_s < self.dwell_s + self.hold_down_s:
            least = self.dwell_s + self.hold_down_s
            raise WatchError(f"prove_s: expected at least dwell_s + hold_down_s, {least:g}, got {self.prove_s:g}")
