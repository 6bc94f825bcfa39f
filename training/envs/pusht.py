"""Many Push-T worlds advanced together by whole action chunks.

They are stepped one after the other in this process: 50 episodes cost about 3 s of one core, a twelfth of what the
policy costs, so a pool of processes would gain nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.sim.pusht import PushTWorld


@dataclass(frozen=True, slots=True)
class WorldState:
    """What one world reports after a reset or a chunk."""

    history: Mapping[str, NDArray[np.float32]]  # per key (history, *shape), newest last, raw units
    score: float
    steps: int
    done: bool


class PushTWorlds:
    """Push-T worlds of given start seeds; each has its own physics, so none depends on the others."""

    def __init__(self, seeds: Sequence[int], history: int) -> None:
        """Make one world per legacy start seed; each reports its ``history`` newest observations.

        Raises:
            UserError: the simulator is not installed.
        """
        self.seeds = tuple(seeds)
        self._history = history
        self._worlds = [PushTWorld() for _ in self.seeds]
        self._past: list[list[dict[str, NDArray[np.float32]]]] = [[] for _ in self.seeds]

    def reset(self) -> list[WorldState]:
        """Put every world into its seed's start state; before the start the first observation repeats."""
        for index, (world, seed) in enumerate(zip(self._worlds, self.seeds, strict=True)):
            world.reset(seed)
            self._past[index] = [world.observation()] * self._history
        return [self._state(index) for index in range(len(self.seeds))]

    def step(self, index: int, chunk: NDArray[np.float32]) -> WorldState:
        """Execute a chunk (n, 2) of target positions, px, in one world, as far as its episode goes."""
        world, past = self._worlds[index], self._past[index]
        for action in chunk:
            done = world.step(action).done
            past.append(world.observation())
            if done:
                break
        del past[: -self._history]
        return self._state(index)

    def _state(self, index: int) -> WorldState:
        world, past = self._worlds[index], self._past[index]
        history = {key: np.stack([observation[key] for observation in past]) for key in past[0]}
        return WorldState(history, world.score_so_far, world.steps, world.done)
