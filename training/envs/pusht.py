"""Many Push-T worlds advanced together by whole action chunks.

They are stepped one after the other in this process: 50 episodes cost about 3 s of one core, a twelfth of what the
policy costs, so a pool of processes would gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.sim.pusht import PushTWorld, StepResult


class World(Protocol):
    """The part of :class:`PushTWorld` that closed-loop evaluation needs; ``training.stress`` wraps it.

    ``observation`` is asked once after a reset and once after every step.
    """

    @property
    def step_limit(self) -> int:
        """Steps after which an episode ends."""
        ...

    @property
    def steps(self) -> int:
        """Steps taken since the last reset."""
        ...

    @property
    def score_so_far(self) -> float:
        """Maximum over the steps since the reset of coverage / 0.95, clipped to [0, 1]."""
        ...

    @property
    def done(self) -> bool:
        """Whether only a reset continues."""
        ...

    @property
    def state(self) -> NDArray[np.float64]:
        """Agent x, y, block x, y [px] and block angle [rad], (5,)."""
        ...

    def observation(self) -> dict[str, NDArray[np.float32]]:
        """``keypoints`` (9, 2) and ``agent_position`` (2,), px."""
        ...

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Start the episode of a legacy seed and return its state."""
        ...

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Hold the target ``action`` (2,) px for one control period."""
        ...

    def displace_block(self, shift: NDArray[np.float64], turn: float) -> None:
        """Move the block by ``shift`` (2,) px and turn it by ``turn`` rad."""
        ...


@dataclass(frozen=True, slots=True)
class WorldState:
    """What one world reports after a reset or a chunk."""

    history: Mapping[str, NDArray[np.float32]]  # per key (history, *shape), newest last, raw units
    score: float
    steps: int
    done: bool


class PushTWorlds:
    """Push-T worlds of given start seeds; each has its own physics, so none depends on the others."""

    def __init__(self, seeds: Sequence[int], history: int, make_world: Callable[[], World] = PushTWorld) -> None:
        """Make one world per legacy start seed; each reports its ``history`` newest observations.

        Raises:
            UserError: the simulator is not installed.
        """
        self.seeds = tuple(seeds)
        self._history = history
        self._worlds = [make_world() for _ in self.seeds]
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
