"""Closed-loop runs in Push-T that are kept whole: states of every step, observations and actions of every policy call.

Any policy with ``predict`` can drive them (:class:`training.evaluate.ChunkPolicy`). Start states, steps and noise are
those of evaluation, so a run has the score that ``dcqfa eval`` gives its seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dcqfa_ros.sim.pusht import EPISODE_STEPS, PushTWorld, StepResult
from training.evaluate import WORLDS_TOGETHER, ChunkPolicy, roll_out
from training.stress import WorldWrapper

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Trajectories:
    """N episodes of at most K steps and C policy calls; what comes after an episode's end repeats its last state.

    Attributes:
        seeds: (N,) of start states and noise.
        states: (N, K + 1, 5) float64, agent x, y, block x, y [px], block angle [rad]; row 0 is the start.
        steps: (N,) executed steps.
        calls: (N,) policy calls.
        scores: (N,) maximum over the steps of coverage / 0.95, clipped to 0..1.
        observations: per key (N, C, history, *shape) float32, raw units; zeros after the last call.
        actions: (N, C, executed, 2) float32 px; zeros after the last call.
    """

    seeds: tuple[int, ...]
    states: NDArray[np.float64]
    steps: NDArray[np.int64]
    calls: NDArray[np.int64]
    scores: NDArray[np.float64]
    observations: dict[str, Float]
    actions: Float

    @property
    def called(self) -> NDArray[np.bool_]:
        """Whether there was a call, (N, C)."""
        return np.arange(self.actions.shape[1]) < self.calls[:, None]


class _Recorded(WorldWrapper):
    """A world that keeps the states it went through."""

    def __init__(self, limit: int) -> None:
        super().__init__(PushTWorld(limit))
        self.states: list[NDArray[np.float64]] = []

    def reset(self, seed: int) -> NDArray[np.float64]:
        self.states = [super().reset(seed)]
        return self.states[0]

    def step(self, action: Float) -> StepResult:
        result = super().step(action)
        self.states.append(self.state)
        return result


class _Recorder:
    """Worlds and a policy of which everything is kept: what :func:`training.evaluate.roll_out` takes for both."""

    def __init__(self, policy: ChunkPolicy, limit: int) -> None:
        self._policy, self.episode_steps = policy, limit
        self.worlds: list[_Recorded] = []  # in the order of the seeds
        self.calls: dict[int, list[tuple[dict[str, Float], Float]]] = {}  # per seed, what was seen and done

    def world(self) -> _Recorded:
        self.worlds.append(_Recorded(self.episode_steps))
        return self.worlds[-1]

    def predict(
        self, observation: Mapping[str, NDArray[Any]], seeds: Sequence[int], chunks: Sequence[int],
        steps: int | None = None,
    ) -> Float:  # fmt: skip
        actions = self._policy.predict(observation, seeds, chunks, steps=steps)
        for row, seed in enumerate(seeds):
            seen = {key: np.array(values[row]) for key, values in observation.items()}
            self.calls.setdefault(seed, []).append((seen, np.array(actions[row])))
        return actions


def record(
    policy: ChunkPolicy,
    seeds: Sequence[int],
    history: int,
    *,
    steps: int | None = None,
    limit: int = EPISODE_STEPS,
    title: str = "rollouts",
) -> Trajectories:
    """Run one episode per seed, at most :data:`WORLDS_TOGETHER` at a time with one policy call per chunk for all.

    Args:
        policy: predicts the executed actions of a chunk for a batch of observations.
        seeds: legacy start seeds, each once; noise is drawn per (seed, call).
        history: observations per policy call.
        steps: denoising steps; None for the policy's own.
        limit: steps after which an episode ends.
        title: of the progress bar.

    Raises:
        UserError: the simulator is not installed, or the policy cannot predict.
    """
    recorder = _Recorder(policy, limit)
    scores = roll_out(recorder, seeds, history, steps, recorder, title=title)
    called = [recorder.calls[seed] for seed in seeds]
    calls = np.array([len(one) for one in called])
    seen, executed = called[0][0]
    observations = {key: np.zeros((len(seeds), calls.max(), *value.shape), np.float32) for key, value in seen.items()}
    actions = np.zeros((len(seeds), calls.max(), *executed.shape), np.float32)
    for n, one in enumerate(called):
        for call, (seen, executed) in enumerate(one):
            actions[n, call] = executed
            for key, value in seen.items():
                observations[key][n, call] = value
    gone = (world.states for world in recorder.worlds)
    states = np.stack([np.stack([*s, *[s[-1]] * (limit + 1 - len(s))]) for s in gone])
    return Trajectories(
        tuple(seeds), states, np.array(scores.steps), calls, np.array(scores.scores), observations, actions
    )


def answers(policy: ChunkPolicy, visited: Trajectories, *, steps: int | None = None, title: str = "answers") -> Float:
    """What ``policy`` would have done: its actions (N, C, executed, 2) px at the observations that others visited.

    The noise of a call is that of the run, so a policy answers its own run with the actions that it executed (to float
    rounding: batches are put together anew). Zeros after the last call.
    """
    found = np.zeros_like(visited.actions)
    for call in tqdm(range(visited.actions.shape[1]), desc=title, unit="call", mininterval=1.0):
        rows = np.flatnonzero(visited.called[:, call])
        for part in np.split(rows, range(WORLDS_TOGETHER, len(rows), WORLDS_TOGETHER)):
            observation = {key: values[part, call] for key, values in visited.observations.items()}
            seeds = [visited.seeds[n] for n in part]
            found[part, call] = policy.predict(observation, seeds, [call] * len(part), steps=steps)
    return found
