"""Closed-loop runs in Push-T that are kept whole: states of every step, observations and actions of every policy call.

Any policy with ``predict`` can drive them (:class:`training.evaluate.ChunkPolicy`). Start states, steps and noise are
those of evaluation, so a run has the score that ``dcqfa eval`` gives its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dcqfa_ros.sim.pusht import EPISODE_STEPS, PushTWorld
from training.evaluate import WORLDS_TOGETHER, ChunkPolicy

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


class _Episode:
    """One world with what it went through."""

    def __init__(self, seed: int, history: int, limit: int) -> None:
        self.seed = seed
        self.world = PushTWorld(limit)
        self.states = [self.world.reset(seed)]
        self.past = [self.world.observation()] * history  # before the start the first observation repeats
        self.seen: list[dict[str, Float]] = []
        self.actions: list[Float] = []

    def look(self) -> dict[str, Float]:
        """The newest observations, key -> (history, *shape), which are kept."""
        self.seen.append({key: np.stack([o[key] for o in self.past]) for key in self.past[0]})
        return self.seen[-1]

    def act(self, actions: Float) -> None:
        """Execute (executed, 2) px as far as the episode goes."""
        self.actions.append(np.array(actions))
        for action in actions:
            done = self.world.step(action).done
            self.states.append(self.world.state)
            self.past = [*self.past[1:], self.world.observation()]
            if done:
                break


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
        seeds: legacy start seeds; noise is drawn per (seed, call).
        history: observations per policy call.
        steps: denoising steps; None for the policy's own.
        limit: steps after which an episode ends.
        title: of the progress bar.

    Raises:
        UserError: the simulator is not installed, or the policy cannot predict.
    """
    episodes: list[_Episode] = []
    with tqdm(total=len(seeds) * limit, desc=title, unit="step", mininterval=1.0) as bar:
        for start in range(0, len(seeds), WORLDS_TOGETHER):
            together = [_Episode(seed, history, limit) for seed in seeds[start : start + WORLDS_TOGETHER]]
            active, call = together, 0
            while active:
                looks = [episode.look() for episode in active]
                observation = {key: np.stack([look[key] for look in looks]) for key in looks[0]}
                chunks = policy.predict(observation, [e.seed for e in active], [call] * len(active), steps=steps)
                for episode, actions in zip(active, chunks, strict=True):
                    before = episode.world.steps
                    episode.act(actions)
                    bar.update((limit if episode.world.done else episode.world.steps) - before)
                active, call = [episode for episode in active if not episode.world.done], call + 1
            episodes.extend(together)
    return _whole(episodes, limit)


def _whole(episodes: list[_Episode], limit: int) -> Trajectories:
    """Episodes of different lengths in arrays."""
    calls = np.array([len(e.actions) for e in episodes])
    first = episodes[0]
    states = np.stack([np.stack([*e.states, *[e.states[-1]] * (limit + 1 - len(e.states))]) for e in episodes])
    observations = {
        key: np.zeros((len(episodes), calls.max(), *value.shape), np.float32) for key, value in first.seen[0].items()
    }
    actions = np.zeros((len(episodes), calls.max(), *first.actions[0].shape), np.float32)
    for n, episode in enumerate(episodes):
        for call, (seen, executed) in enumerate(zip(episode.seen, episode.actions, strict=True)):
            actions[n, call] = executed
            for key, value in seen.items():
                observations[key][n, call] = value
    return Trajectories(
        tuple(e.seed for e in episodes),
        states,
        np.array([e.world.steps for e in episodes]),
        calls,
        np.array([e.world.score_so_far for e in episodes]),
        observations,
        actions,
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
