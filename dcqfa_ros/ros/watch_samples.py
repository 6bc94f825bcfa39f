"""From the diagnostics of policy and arm to the samples of the watch. Needs no rclpy.

Arrival times are those of the receiver's monotonic clock, so steps of any host's clock do not matter here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dcqfa_ros.devices.health import Health
from dcqfa_ros.devices.watch import Sample
from dcqfa_ros.ros.bringup import AUTO
from dcqfa_ros.ros.diagnostics import EVENT, Report
from dcqfa_ros.runtime.recent_latencies import newer

POLICY, ARM = "policy_node", "arm_node"
FRESH_S = 3.5
"""Reports come at 1 Hz; whose last one is older is not heard."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An exchange that the policy could not do: ``<runtime>/<variant>`` and why."""

    engine: str
    reason: str


@dataclass(slots=True)
class _Policy:
    time_s: float
    engine: str
    steps: int | None
    pinned: str
    steps_pinned: bool


@dataclass(slots=True)
class _Arm:
    time_s: float
    ticks: int
    missed: int
    starved: int | None


class SampleCollector:
    """Remembers the last word of policy and arm, and the latencies that no sample has had yet."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        """Know nothing; ``warn`` is told once of each kind of malformed report."""
        self._warn, self._warned = warn, set[str]()
        self._policy: _Policy | None = None
        self._arm: _Arm | None = None
        self._count: int | None = None
        self._chunks: int | None = None
        self._latencies: list[float] = []
        self.per_chunk = True  # whether the policy tells each latency

    def take(self, report: Report, now_s: float) -> Refusal | None:
        """Take one report as heard at ``now_s``; returns a refused exchange where it tells of one."""
        values = report.status.values
        kind = f"{report.node}: {report.status.name}"
        try:
            if kind == f"{POLICY}: policy":
                self._take_policy(values, now_s)
            elif kind == f"{ARM}: arm":
                self._take_arm(values, now_s)
            elif kind == f"{POLICY}: {EVENT}":
                return _refusal(values)
        except (KeyError, ValueError) as error:
            if kind not in self._warned:
                self._warned.add(kind)
                self._warn(f"malformed report of {kind} ignored, and further ones: {error!r}")
        return None

    def _take_policy(self, values: Mapping[str, str], now_s: float) -> None:
        if "engine" not in values:  # not configured
            self._policy = None
            return
        requested = values.get("requested", AUTO)
        by_hand = int(values.get("steps_requested") or 0)
        steps = int(values["steps"]) if values.get("steps") else None
        if by_hand < 0 or (steps is not None and steps < 1):
            raise ValueError(f"steps {steps}, steps_requested {by_hand}")
        told = newer(values, self._count)
        chunks, p50 = int(values["chunks"]), float(values["inference_p50_ms"])
        if chunks < 0 or not 0.0 <= p50 < math.inf:
            raise ValueError(f"chunks {chunks}, inference_p50_ms {p50}")
        pinned = "" if requested == AUTO else f"the policy's variant is pinned to {requested!r}: it is left alone"
        policy = _Policy(now_s, values["engine"], steps, pinned, by_hand > 0)
        if told is not None:
            self._count, latencies = told
        else:  # percentiles of the whole episode: the median stands for each new chunk
            new = 0 if self._chunks is None else chunks if chunks < self._chunks else chunks - self._chunks
            latencies = (p50,) * min(new, 10)
        self.per_chunk, self._chunks = told is not None, chunks
        before = self._policy
        if before is None or (before.engine, before.steps) != (policy.engine, policy.steps):
            self._latencies.clear()  # nobody says which of these which engine computed
        else:
            self._latencies += latencies
        self._policy = policy

    def _take_arm(self, values: Mapping[str, str], now_s: float) -> None:
        if "missed_ticks" not in values:  # not configured, or without a control thread
            self._arm = None
            return
        starved = values.get("starved_ticks", values.get("starved"))
        counts = int(values["ticks"]), int(values["missed_ticks"]), 0 if starved is None else int(starved)
        if min(counts) < 0:
            raise ValueError(f"negative counts {counts}")
        self._arm = _Arm(now_s, counts[0], counts[1], None if starved is None else counts[2])

    def sample(self, now_s: float, health: Health) -> Sample:
        """Return what is known now; the latencies in it are not told again."""
        policy = self._policy if self._policy and now_s - self._policy.time_s <= FRESH_S else None
        arm = self._arm if self._arm and now_s - self._arm.time_s <= FRESH_S else None
        latencies, self._latencies = tuple(self._latencies), []
        hottest = health.hottest
        return Sample(
            now_s,
            "" if policy is None else policy.engine,
            None if policy is None else policy.steps,
            () if policy is None else latencies,
            "" if policy is None else policy.pinned,
            policy is not None and policy.steps_pinned,
            None if arm is None else arm.ticks,
            None if arm is None else arm.missed,
            None if arm is None else arm.starved,
            None if hottest is None else hottest.celsius,
            None if hottest is None else hottest.limit,
            health.throttled,
            health.memory_available_bytes,
            health.gpu_memory_available_bytes,
        )


def _refusal(values: Mapping[str, str]) -> Refusal | None:
    """Return the exchange that an event reports as failed."""
    if "swap_id" not in values or values.get("outcome") != "failed":
        return None
    return Refusal(f"{values['runtime']}/{values['requested']}", values.get("reason", ""))
