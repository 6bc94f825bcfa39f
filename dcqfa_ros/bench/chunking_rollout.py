"""Closed-loop Push-T episodes in virtual time: the policy's chunks come late, the arm goes on meanwhile.

The arm consumes one action per control tick from the robot's own chunk buffer; when to infer, what to continue and what
to publish is the robot's own chunk plan. Only the clock is made up here, in whole ticks:

- An inference begins at a tick, on that tick's observation. With a latency of L its chunk takes effect at the first
  tick after it came, ``ceil(L * rate)`` ticks later: at 10 Hz, 50 ms and 100 ms both cost one tick.
- The policy computes one chunk at a time. An inference that becomes due meanwhile begins when the chunk before it came.
- Before the first chunk the cell waits, as ``arm_node`` does. Afterwards a tick without an action is starved: the arm
  holds its last target, and the tick counts among the episode's 300.

Start states, noise per (seed, chunk), batches and score are those of ``dcqfa eval``: synchronous execution without
latency gives the same scores. (The physics orders contacts by numbers it hands out per process, so a score may differ
in its last bit from one run to the next, there as here.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bench.chunking_metrics import EpisodeTrack, Floats
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.chunk_buffer import ChunkBuffer
from dcqfa_ros.runtime.chunking import ChunkPlan, Continuation, Inference, Method
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.sim.pusht import EPISODE_STEPS, PushTWorld

WORLDS_TOGETHER = 250  # episodes per batch, as many as in ``dcqfa eval``
_Float32 = NDArray[np.float32]


class ContinuingPolicy(Protocol):
    """The part of :class:`dcqfa_ros.runtime.policy.PolicyRuntime` that a roll-out needs."""

    def predict(
        self,
        observation: Mapping[str, NDArray[Any]],
        seeds: Sequence[int],
        chunks: Sequence[int],
        steps: int | None = None,
        tokens: int | None = None,
        continuations: Sequence[Continuation | None] | None = None,
        actions: int | None = None,
    ) -> _Float32:
        """Actions (B, actions, Da), raw units; row 0 belongs to the observation's time."""
        ...


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk on its way: it arrives at a tick. ``beyond`` is what it says for the action after its last one."""

    inference: Inference
    prediction: _Float32
    beyond: _Float32 | None
    arrives: int


class DelayedEpisode:
    """One Push-T world, the arm's buffer in front of it, and the policy's plan.

    Attributes:
        seed: start state and noise.
        track: what happened.
        done: whether the episode is over.
    """

    def __init__(self, spec: BundleSpec, seed: int, plan: ChunkPlan, history: int) -> None:
        """Put the world into the start state of ``seed``; before the start the first observation repeats.

        Raises:
            SimulatorMissingError: the simulator is not installed.
        """
        self.seed, self.plan, self.done = seed, plan, False
        self.track = EpisodeTrack()
        self._world = PushTWorld()
        self._world.reset(seed)
        first = self._world.observation()
        self._past = [first] * history
        self.track.positions.append(first["agent_position"].astype(np.float64))
        self._buffer = ChunkBuffer(spec.action.dim)
        self._coming: _Chunk | None = None
        self._beyond: _Float32 | None = None
        self._target: Floats | None = None

    def observation(self, key: str) -> _Float32:
        """The newest observations of a key, (history, *shape), oldest first."""
        return np.stack([past[key] for past in self._past])

    def ask(self, delay: int) -> Inference | None:
        """Plan an inference on the present observation, or None while one is under way or none is due."""
        if self._coming is not None or self._buffer.consumed < self.plan.due:
            return None
        return self.plan.begin(self._buffer.consumed, delay)

    def begin(self, inference: Inference, prediction: _Float32, beyond: _Float32 | None, arrives: int) -> None:
        """Let a chunk be on its way until tick ``arrives``."""
        self.track.chunks += 1
        self._coming = _Chunk(inference, prediction, beyond, arrives)

    def arrive(self, tick: int) -> None:
        """Publish the chunk that has come by ``tick``, if one has."""
        coming, buffer = self._coming, self._buffer
        if coming is None or tick < coming.arrives:
            return
        self._coming = None
        said = buffer.peek()
        if said is None and coming.inference.first == buffer.consumed and self._beyond is not None:
            said = self._beyond.astype(np.float64)
        published = self.plan.finish(coming.inference, coming.prediction, buffer.consumed)
        self._beyond = coming.beyond
        if published.jump is not None:
            self.track.jumps.append(published.jump)
        try:
            buffer.push(published.first, published.actions)
        except PolicyError:  # every action of it is consumed: the latency is longer than the chunk
            self.track.late += 1
            return
        says = buffer.peek()
        if said is not None and says is not None:
            self.track.seams.append(float(np.linalg.norm(says - said)))

    def advance(self) -> None:
        """Run one control tick: consume an action or, for want of one, hold the last target."""
        action = self._buffer.next()
        if action is None:
            if self._target is None:
                return  # no chunk has come yet: the cell waits
            self.track.starved += 1
        else:
            self._target = action
        assert self._target is not None
        self.done = self._world.step(self._target).done
        seen = self._world.observation()
        self._past = [*self._past[1:], seen]
        self.track.targets.append(self._target)
        self.track.positions.append(seen["agent_position"].astype(np.float64))
        self.track.score = self._world.score_so_far


def roll_out(
    policy: ContinuingPolicy,
    spec: BundleSpec,
    seeds: Sequence[int],
    method: Method,
    ticks: int,
    *,
    execution_horizon: int = 0,
    steps: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[EpisodeTrack]:
    """Run one episode per seed, at most :data:`WORLDS_TOGETHER` at a time.

    Args:
        policy: predicts chunks for a batch of observations.
        spec: the policy's bundle.
        seeds: legacy start seeds.
        method: how one chunk follows another.
        ticks: control ticks from an observation to the effect of its chunk; the delay is known exactly.
        execution_horizon: actions between two inferences; 0 for the bundle's executed actions.
        steps: denoising steps; None for the bundle's own.
        progress: told steps done; an episode that ends early counts as whole.

    Returns:
        What each episode did, in the order of the seeds.

    Raises:
        PolicyError: the policy refuses an input, or computes what is not finite.
        ValueError: the method does not fit the policy (``ChunkPlan``).
    """
    tracks: list[EpisodeTrack] = []
    for start in range(0, len(seeds), WORLDS_TOGETHER):
        batch = _Batch(policy, spec, seeds[start : start + WORLDS_TOGETHER], method, ticks, execution_horizon, steps)
        tracks.extend(batch.run(progress))
    return tracks


class _Batch:
    """Episodes whose inferences share policy calls."""

    def __init__(
        self,
        policy: ContinuingPolicy,
        spec: BundleSpec,
        seeds: Sequence[int],
        method: Method,
        ticks: int,
        execution_horizon: int,
        steps: int | None,
    ) -> None:
        self._policy, self._spec, self._ticks, self._steps = policy, spec, ticks, steps
        history = next(iter(spec.observations.values())).history
        self._episodes = [
            DelayedEpisode(
                spec, seed, ChunkPlan(spec.action, method, execution_horizon, spec.diffusion.prefix), history
            )
            for seed in seeds
        ]

    def run(self, progress: Callable[[int], object] | None) -> list[EpisodeTrack]:
        running, tick = list(self._episodes), 0
        while running:
            for episode in running:
                episode.arrive(tick)
            self._infer(running, tick)
            before = sum(self._weight(episode) for episode in running)
            for episode in running:
                episode.advance()
            if progress is not None:
                progress(sum(self._weight(episode) for episode in running) - before)
            running = [episode for episode in running if not episode.done]
            tick += 1
        return [episode.track for episode in self._episodes]

    @staticmethod
    def _weight(episode: DelayedEpisode) -> int:
        return EPISODE_STEPS if episode.done else episode.track.steps

    def _infer(self, running: Sequence[DelayedEpisode], tick: int) -> None:
        """Begin the inferences that are due, in one call per number of actions; without latency they arrive at once."""
        due = [(episode, inference) for episode in running if (inference := episode.ask(self._ticks)) is not None]
        for actions in sorted({inference.actions for _, inference in due}):
            group = [(episode, inference) for episode, inference in due if inference.actions == actions]
            for (episode, inference), (prediction, beyond) in zip(group, self._predict(group, actions), strict=True):
                episode.begin(inference, prediction, beyond, tick + self._ticks)
                episode.arrive(tick)

    def _predict(
        self, group: Sequence[tuple[DelayedEpisode, Inference]], actions: int
    ) -> Iterator[tuple[_Float32, _Float32 | None]]:
        """Predict for each of ``group``; beside the actions, the one after them where the chunk can tell.

        Where all of the chunk is published, the buffer itself knows what the old chunk said when the new one comes.
        Where only the executed part is, a second call looks one action further. It is for the measurement only: with
        more tokens the same actions round differently, and the arm has to be led by what the robot would compute.
        """
        first = self._spec.action.first_executed
        observation = {
            key: np.stack([episode.observation(key) for episode, _ in group]) for key in self._spec.observations
        }
        seeds, chunks = [episode.seed for episode, _ in group], [episode.track.chunks for episode, _ in group]
        continuations = [inference.continuation for _, inference in group]

        def predict(count: int) -> _Float32:
            return self._policy.predict(
                observation, seeds, chunks, steps=self._steps, continuations=continuations, actions=count
            )

        led = predict(actions)
        further = first + actions < self._spec.action.horizon
        beyond = predict(actions + 1)[:, actions] if further else None
        for row in range(len(group)):
            yield led[row].copy(), None if beyond is None else beyond[row].copy()
