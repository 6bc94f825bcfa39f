"""The policy's side of an episode, without ROS: when to infer, on what, and when to send nothing more.

A session follows the arm: ``begin`` at an arming (history and chunk count start anew), ``end`` at a disarming. ``run``
is the inference loop of one thread; the other methods may be called from any thread. Which chunk is due follows from
the actions that the arm has consumed (:mod:`dcqfa_ros.runtime.chunk_schedule`); the newest observation is always used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.chunk_schedule import ChunkFigures, Chunking, ChunkSchedule
from dcqfa_ros.runtime.chunking import Inference
from dcqfa_ros.runtime.consumption import Report
from dcqfa_ros.runtime.errors import NoVariantError, PolicyError, WorkerDiedError
from dcqfa_ros.runtime.synchronizer import Frame, ObservationSynchronizer, stack_history
from dcqfa_ros.runtime.variant_host import VariantHost

WAIT_S = 0.1
IDLE_S = 0.005


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
        publish: sends a chunk: its observation's frame, actions (n, Da) in the bundle's units, and what the engine's
            worker took (ms).
        problem: told once per episode why no further command is sent.
        lost: told when the engine's worker has died.
        steps: denoising steps to use now; None for the bundle's.
        ageless: whether observations do not age now (a cell in lockstep waits for the policy).
        chunking: how chunks follow each other from the next one on.
        advice: told what was changed, where delay or execution horizon do not fit the bundle's chunks.
    """

    publish: Callable[[Frame, NDArray[np.float32], float], None]
    problem: Callable[[str], None]
    lost: Callable[[str], None]
    steps: Callable[[], int | None]
    ageless: Callable[[], bool]
    chunking: Callable[[], Chunking] = Chunking
    advice: Callable[[str], None] = lambda _: None


class PolicySession:
    """Infers a chunk whenever one is due, for as long as the arm is armed."""

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
        self._hooks = hooks
        self._schedule = ChunkSchedule(spec.action, period_ns)
        self._advised = ""
        self._lock = threading.Lock()
        self._episode: Episode | None = None
        self._counted = -1  # number of the episode whose figures are being collected

    @property
    def chunks(self) -> int:
        """Chunks sent in the present or last episode."""
        return self._schedule.figures.chunks

    def begin(self, episode: Episode) -> bool:
        """The arm was armed; the same episode told twice begins once. Returns whether it begins now."""
        with self._lock:
            if self._counted == episode.number:
                return False
            self._counted, self._episode = episode.number, episode
            self._schedule.figures, self.problem, self._advised = ChunkFigures(), "", ""
            self._schedule.consumption.begin(episode.number, episode.start_ns)
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

    def consumed(self, report: Report) -> None:
        """Take the arm's word on the actions it has consumed."""
        self._schedule.consumption.note(report)

    def figures(self) -> dict[str, str]:
        """Engine, chunks, latencies (ms), delay and discontinuity of the present or last episode."""
        return {"engine": self.host.engine, **self._schedule.values()}

    def run(self, halt: threading.Event) -> None:
        """Infer until ``halt`` is set."""
        running: Episode | None = None
        schedule, chunk = self._schedule, 0
        while not halt.is_set():
            episode = self._episode
            if episode is None or not self.host.active:
                running = running if episode is running else None  # an exchange of variants begins no new episode
                halt.wait(IDLE_S)
                continue
            if episode is not running:
                running, chunk = episode, 0
                schedule.begin(episode.start_ns)
            frames = self.observations.wait_for(schedule.wake_ns, WAIT_S)
            if not self._fresh(frames) or frames is None:
                continue
            inference = self._due(frames[-1].stamp_ns)
            if inference is not None and self._infer(episode, frames, chunk, inference, halt):
                chunk += 1

    def _due(self, stamp_ns: int) -> Inference | None:
        try:
            self._schedule.configure(self._hooks.chunking())
            inference = self._schedule.due(stamp_ns)
        except ValueError as error:
            self.refuse(str(error))
            return None
        note = "" if inference is None else inference.timing.note
        if note and note != self._advised:
            self._advised = note
            self._hooks.advice(note)
        return inference

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

    def _infer(
        self, episode: Episode, frames: list[Frame], chunk: int, inference: Inference, halt: threading.Event
    ) -> bool:
        begin = time.monotonic()
        observation = stack_history(frames, self.observations.specs)
        asked, steps, stamp_ns = time.monotonic(), self._hooks.steps(), frames[-1].stamp_ns
        try:
            actions, variant = self.host.predict(
                observation,
                episode.seed,
                chunk,
                steps,
                continuation=inference.continuation,
                actions=inference.actions,
            )
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
            published = self._schedule.take(inference, stamp_ns, actions)
            self._hooks.publish(frames[-1], published.actions, (answered - asked) * 1e3)
            now = time.monotonic()
            latency_s = self._age_s(stamp_ns, now - begin)
            computed_by = self.host.engine, variant, steps
            self._schedule.sent(inference, published, (now - begin) * 1e3, latency_s, computed_by)
        return True

    def _age_s(self, stamp_ns: int, otherwise: float) -> float:
        """Time since the arrival of the observation stamped ``stamp_ns``, seconds."""
        age = self.observations.ages_ms(time.monotonic_ns(), stamp_ns)[self.observations.reference]
        return otherwise if age is None else max(otherwise, age / 1e3)
