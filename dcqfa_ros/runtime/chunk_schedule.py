"""When a policy infers during an episode, and what its chunks look like to the arm.

Joins the plan of chunks (:mod:`dcqfa_ros.runtime.chunking`), what the arm tells of its consumption
(:mod:`dcqfa_ros.runtime.consumption`) and the measured delay (:mod:`dcqfa_ros.runtime.chunk_delay`). Stamps are those
of observations, nanoseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import ActionSpec
from dcqfa_ros.runtime.chunk_delay import DelayEstimator
from dcqfa_ros.runtime.chunking import ChunkPlan, Inference, Method, Published, Timing
from dcqfa_ros.runtime.consumption import ConsumptionLog
from dcqfa_ros.runtime.histogram import percentiles

TELL_S = 0.05  # to wait at most for the arm's count of actions at an observation
LATENCIES_KEPT = 500
ARRIVAL_PERIODS = 3  # an arm that has no action this long after a chunk was published did not get it


@dataclass(frozen=True, slots=True)
class Chunking:
    """How chunks follow each other.

    Attributes:
        method: the method.
        horizon: execution horizon, actions; 0: the bundle's ``executed``.
        delay: delay, actions; -1: as measured.
        prefix: ``diffusion.prefix`` of the bundle whose variant computes.
    """

    method: Method = Method.SYNCHRONOUS
    horizon: int = 0
    delay: int = -1
    prefix: int = 0


class ChunkFigures:
    """What one episode's chunks were like. Written by one thread."""

    def __init__(self) -> None:
        """Know no chunk."""
        self.chunks = 0
        self.starved = 0  # estimated, where the arm tells nothing
        self.timing = Timing(0, 0)
        self._inference_ms: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._jumps = 0
        self._jump_sum = self._jump_max = 0.0

    def add(self, inference_ms: float, timing: Timing, jump: float | None) -> None:
        """Note a chunk that was sent."""
        self.chunks += 1
        self.timing = timing
        self._inference_ms.append(inference_ms)
        if jump is not None:
            self._jumps += 1
            self._jump_sum += jump
            self._jump_max = max(self._jump_max, jump)

    def values(self) -> dict[str, str]:
        """For diagnostics: times in ms, delay and horizon in actions, discontinuity in units of the action."""
        p50, p99 = percentiles(list(self._inference_ms), 50, 99) or (0.0, 0.0)
        return {
            "chunks": str(self.chunks),
            "inference_p50_ms": f"{p50:.2f}",
            "inference_p99_ms": f"{p99:.2f}",
            "delay": str(self.timing.delay),
            "execution_horizon": str(self.timing.horizon),
            "timing_changed": self.timing.note,
            "discontinuity_mean": f"{self._jump_sum / self._jumps:.4g}" if self._jumps else "",
            "discontinuity_max": f"{self._jump_max:.4g}" if self._jumps else "",
        }


class ChunkSchedule:
    """Schedule of one policy. Belongs to the thread that infers; only ``consumption`` and ``figures`` are shared.

    Attributes:
        consumption: what the arm tells of the actions it has consumed.
        delay: of the chunks so far.
        figures: of the present or last episode.
        chunking: how chunks follow each other.
        wake_ns: no observation stamped earlier needs to be looked at.
    """

    def __init__(self, action: ActionSpec, period_ns: int) -> None:
        """Schedule chunks of ``action``, whose actions take ``period_ns`` each."""
        self.consumption = ConsumptionLog(period_ns)
        self.delay = DelayEstimator()
        self.figures = ChunkFigures()
        self.chunking = Chunking()
        self.wake_ns = 0
        self._plan = ChunkPlan(action, Method.SYNCHRONOUS)
        self._period_ns = period_ns
        self._again_ns = 0  # an arm without actions that was sent some before this time did not get them

    def begin(self, start_ns: int) -> None:
        """Begin an episode whose first observation carries ``start_ns``."""
        self._plan.reset()
        self.delay.begin()
        self.wake_ns = self._again_ns = start_ns

    def configure(self, chunking: Chunking) -> None:
        """Let the next chunks follow each other in another way.

        Raises:
            ValueError: the plan cannot be (:meth:`ChunkPlan.configure`); nothing is changed.
        """
        if chunking != self.chunking:
            self._plan.configure(chunking.method, chunking.horizon, chunking.prefix)
            self.chunking = chunking

    def due(self, stamp_ns: int) -> Inference | None:
        """Return what to infer on the observation stamped ``stamp_ns``; None where it is too early.

        Looks up (and, for at most ``TELL_S`` seconds, waits for) what the arm had consumed at the observation.
        """
        plan = self._plan
        known = self.consumption.at(stamp_ns, TELL_S, plan.end)
        consumed = known.actions
        if not known.told and consumed > plan.end:  # it cannot have consumed what it was never sent: it ran dry
            self.figures.starved += consumed - plan.end if plan.end else 0
            consumed = plan.end
            self.consumption.correct(stamp_ns, consumed)
        elif not plan.first <= consumed <= plan.end:
            plan.resume(consumed)
        lost = known.buffered == 0 and stamp_ns >= self._again_ns
        if consumed < plan.due and not lost:
            self._wake_at(stamp_ns, plan.due - consumed)
            return None
        given = self.chunking.delay
        return plan.begin(consumed, self.delay.actions(self._period_ns) if given < 0 else given)

    def _wake_at(self, stamp_ns: int, actions: int) -> None:
        # Half a period less, for jitter of the stamps.
        self.wake_ns = stamp_ns + max(1, actions) * self._period_ns - self._period_ns // 2

    def take(self, inference: Inference, stamp_ns: int, prediction: NDArray[np.float32]) -> Published:
        """Take a prediction for the observation stamped ``stamp_ns`` and return the chunk to publish."""
        newest, consumed = self.consumption.newest, None
        if newest is not None:
            consumed = min(max(newest.consumed, inference.first), max(self._plan.end, inference.first))
        published = self._plan.finish(inference, prediction, consumed)
        self._wake_at(stamp_ns, self._plan.due - inference.first)
        self._again_ns = stamp_ns + inference.timing.horizon * self._period_ns
        if newest is not None:  # the chunk is still on its way, or has come after the arm's last word
            self._again_ns = max(self._again_ns, newest.stamp_ns + ARRIVAL_PERIODS * self._period_ns)
        return published

    def sent(
        self, inference: Inference, published: Published, inference_ms: float, latency_s: float, computed_by: Hashable
    ) -> None:
        """Note a chunk that was published.

        Args:
            inference: it came of.
            published: the chunk.
            inference_ms: time of the inference, milliseconds.
            latency_s: from the observation's arrival to the chunk's publication, seconds.
            computed_by: what computed it; another one begins to be measured anew.
        """
        self.figures.add(inference_ms, inference.timing, published.jump)
        self.delay.add(latency_s, computed_by)

    def values(self) -> dict[str, str]:
        """Figures of the present or last episode, for diagnostics."""
        newest = self.consumption.newest
        return {
            **self.figures.values(),
            "chunking": self.chunking.method.value,
            "latency_p95_ms": f"{self.delay.p95_s * 1e3:.2f}",
            "starved_actions": str(self.figures.starved if newest is None else newest.starved),
            "consumption": "estimated: the arm publishes none" if newest is None else "told by the arm",
        }
