"""The policy's side of an episode, without ROS: when to infer, on what, and when to send nothing more.

A session follows the arm: ``begin`` at an arming (history and chunk count start anew), ``end`` at a disarming. ``run``
is the inference loop of one thread; the other methods may be called from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.errors import NoVariantError, PolicyError, WorkerDiedError
from dcqfa_ros.runtime.synchronizer import Frame, ObservationSynchronizer, stack_history
from dcqfa_ros.runtime.variant_host import VariantHost

WAIT_S = 0.1
IDLE_S = 0.005
LATENCIES_KEPT = 500


@dataclass(frozen=True, slots=True)
class Episode:
    """One arming: the arm's number of it, the stamp of its first observation, and the seed of the policy's noise."""

    number: int
    start_ns: int
    seed: int


@dataclass(frozen=True, slots=True)
class SessionHooks:
    """What a session asks of its owner.

    Attributes:
        publish: sends a chunk: stamp of its observation (ns) and actions (n, Da) in the bundle's units.
        problem: told once per episode why no further command is sent.
        lost: told when the engine's worker has died.
        steps: denoising steps to use now; None for the bundle's.
        ageless: whether observations do not age now (a cell in lockstep waits for the policy).
    """

    publish: Callable[[int, NDArray[np.float32]], None]
    problem: Callable[[str], None]
    lost: Callable[[str], None]
    steps: Callable[[], int | None]
    ageless: Callable[[], bool]


class PolicySession:
    """Infers a chunk whenever the last one's executed actions are used up, for as long as the arm is armed."""

    def __init__(
        self,
        spec: BundleSpec,
        host: VariantHost,
        observations: ObservationSynchronizer,
        period_ns: int,
        hooks: SessionHooks,
    ) -> None:
        """Bind the parts; no episode is under way."""
        self.spec, self.host, self.observations = spec, host, observations
        self.problem = ""  # why nothing is sent in this episode
        self.chunks = 0
        self.inference_ms = 0.0  # of the chunk that is published now: what the engine's worker took
        self._hooks = hooks
        self._stride_ns = spec.action.executed * period_ns - period_ns // 2  # half a period for jitter of the stamps
        self._lock = threading.Lock()
        self._episode: Episode | None = None
        self._counted = -1  # number of the episode whose figures are being collected
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)

    def begin(self, episode: Episode) -> bool:
        """The arm was armed; the same episode told twice begins once. Returns whether it begins now."""
        with self._lock:
            if self._counted == episode.number:
                return False
            self._counted, self._episode = episode.number, episode
            self._latencies.clear()
            self.chunks, self.problem = 0, ""
            self.observations.begin(episode.start_ns)
            return True

    def end(self, number: int) -> bool:
        """The arm is disarmed; returns whether episode ``number`` had begun here, so that it has figures."""
        with self._lock:
            self._episode = None
            begun, self._counted = self._counted == number, -1
            self.observations.end()
            return begun

    def refuse(self, reason: str) -> None:
        """Send nothing more in this episode; the arm's deadman then stops the arm."""
        with self._lock:
            first = self._episode is not None and not self.problem
            self.problem = self.problem or reason
            self._episode = None
            self.observations.end()
        if first:
            self._hooks.problem(reason)

    def figures(self) -> dict[str, str]:
        """Engine, chunks sent and latency percentiles (ms) of the present or last episode."""
        p50, p99 = np.percentile(np.array(self._latencies or [0.0]), [50, 99])
        return {
            "engine": self.host.engine,
            "chunks": str(self.chunks),
            "inference_p50_ms": f"{p50:.2f}",
            "inference_p99_ms": f"{p99:.2f}",
        }

    def run(self, halt: threading.Event) -> None:
        """Infer until ``halt`` is set."""
        running: Episode | None = None
        due = chunk = 0
        while not halt.is_set():
            episode = self._episode
            if episode is None or not self.host.active:
                running = running if episode is running else None  # an exchange of variants begins no new episode
                halt.wait(IDLE_S)
                continue
            if episode is not running:
                running, due, chunk = episode, episode.start_ns, 0
            frames = self.observations.wait_for(due, WAIT_S)
            if self._fresh(frames) and frames is not None and self._infer(episode, frames, chunk, halt):
                due = frames[-1].stamp_ns + self._stride_ns
                chunk += 1

    def _fresh(self, frames: list[Frame] | None) -> bool:
        if self._hooks.ageless():
            return True
        ages = self.observations.ages_ms(time.monotonic_ns(), frames[-1].stamp_ns if frames else None)
        for key, spec in self.observations.specs.items():
            age = ages[key]
            if age is None or age > spec.max_age_ms:
                held = "has not come yet" if age is None else f"is {age:.0f} ms old"
                self.refuse(f"observation {key!r} {held}, its limit is {spec.max_age_ms:.0f} ms")
                return False
        stalled = "" if frames else self.observations.stalled(time.monotonic_ns())
        if stalled:
            self.refuse(stalled)
        return not stalled

    def _infer(self, episode: Episode, frames: list[Frame], chunk: int, halt: threading.Event) -> bool:
        begin = time.monotonic()
        observation = stack_history(frames, self.observations.specs)
        asked = time.monotonic()
        try:
            actions, _ = self.host.predict(observation, episode.seed, chunk, self._hooks.steps())
        except WorkerDiedError as error:
            if not halt.is_set():  # else it was killed to let its owner go
                self.refuse(str(error))
                self._hooks.lost(str(error))
            return False
        except NoVariantError:  # it went while this observation was prepared: the next one is used
            return False
        except PolicyError as error:
            self.refuse(str(error))
            return False
        answered = time.monotonic()
        with self._lock:
            if self._episode is not episode or halt.is_set():
                return False  # the arm was disarmed meanwhile: no command after a stop
            self.inference_ms = (answered - asked) * 1e3
            self._latencies.append((time.monotonic() - begin) * 1e3)
            self._hooks.publish(frames[-1].stamp_ns, actions)
            self.chunks += 1
        return True
