"""Push-T made harder, so that errors which add up over a long episode show: noise, delays, time, a hand at the block.

Every stress is a wrapper of a world with one level; level 0 (or the published 300 steps) is the world itself, bit for
bit. What is drawn depends on the start seed and the step alone and never on the policy, so networks stay comparable in
pairs. Scores keep their published meaning: the maximum over the steps of coverage / 0.95, clipped to [0, 1].
"""

from __future__ import annotations

from collections import deque
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.sim.pusht import EPISODE_STEPS, PushTWorld, StepResult
from training.envs.pusht import World

NOISE_STREAM, NUDGE_STREAM = 0x4E4F, 0x4E55  # keep the draws of a seed apart from each other
NUDGE_EVERY = 50  # steps between two nudges, 5 s
NUDGE_ARM_PX = 60.0  # half the T's bar: a nudge turns the block so far that its bar's end moves by the level
KEPT_PX = (100.0, 400.0)  # the block's published start range, which a nudge does not push it out of

MOST_NOISE_PX, MOST_DELAY, MOST_STEPS, MOST_NUDGE_PX = 100.0, 50, 3000, 150.0


class WorldWrapper:
    """A world that does what the one inside does."""

    def __init__(self, world: World) -> None:
        """Wrap ``world``."""
        self.inner = world

    @property
    def step_limit(self) -> int:
        """That of the world inside."""
        return self.inner.step_limit

    @property
    def steps(self) -> int:
        """Those of the world inside."""
        return self.inner.steps

    @property
    def score_so_far(self) -> float:
        """That of the world inside."""
        return self.inner.score_so_far

    @property
    def done(self) -> bool:
        """Whether the world inside is."""
        return self.inner.done

    @property
    def state(self) -> NDArray[np.float64]:
        """True state of the world inside, (5,)."""
        return self.inner.state

    def observation(self) -> dict[str, NDArray[np.float32]]:
        """What the world inside shows."""
        return self.inner.observation()

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Start the episode of a legacy seed and return the state, (5,)."""
        return self.inner.reset(seed)

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Hold the target ``action`` (2,) px for one control period."""
        return self.inner.step(action)

    def displace_block(self, shift: NDArray[np.float64], turn: float) -> None:
        """Move the block by ``shift`` (2,) px and turn it by ``turn`` rad."""
        self.inner.displace_block(shift, turn)


class NoisyObservations(WorldWrapper):
    """Every coordinate of an observation is off by its own Gaussian error, as a detector's would be.

    The level is the standard deviation in px, for key points and agent alike. Errors are drawn anew at every step and
    depend on the seed and the step; physics and score are those of the true state.
    """

    def __init__(self, world: World, level: float) -> None:
        """Wrap ``world``; ``level`` in px, at least 0."""
        super().__init__(world)
        self._level, self._seed = level, 0

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Start the episode of ``seed``."""
        self._seed = seed
        return super().reset(seed)

    def observation(self) -> dict[str, NDArray[np.float32]]:
        """The inner world's with errors added."""
        generator = np.random.default_rng([NOISE_STREAM, self._seed, self.steps])
        return {
            key: values + (self._level * generator.standard_normal(values.shape)).astype(np.float32)
            for key, values in self.inner.observation().items()
        }


class DelayedActions(WorldWrapper):
    """A commanded target reaches the controller ``level`` steps (of 0.1 s) late.

    Until the first one arrives the agent holds where it started. Observations are not delayed.
    """

    def __init__(self, world: World, level: int) -> None:
        """Wrap ``world``; ``level`` in steps, at least 0."""
        super().__init__(world)
        self._level = level
        self._waiting: deque[NDArray[np.float32]] = deque()

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Start the episode of ``seed``; what was on its way is forgotten."""
        state = super().reset(seed)
        held = np.asarray(state[:2], np.float32)
        self._waiting = deque([held] * self._level)
        return state

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Send ``action`` on its way and execute the one that arrives."""
        self._waiting.append(np.array(action, np.float32))
        result = super().step(self._waiting[0])  # an action that is refused does not count as arrived
        self._waiting.popleft()
        return result


class NudgedBlock(WorldWrapper):
    """Every :data:`NUDGE_EVERY` steps something moves the block by ``level`` px and turns it.

    The direction is uniform and the turn is as large at the bar's end as the shift, either way. A nudge that would push
    the block out of the range of published starts is cut off there. Directions depend on the seed and the nudge's
    number.
    """

    def __init__(self, world: World, level: float) -> None:
        """Wrap ``world``; ``level`` in px, at least 0."""
        super().__init__(world)
        self._level, self._seed = level, 0

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Start the episode of ``seed``."""
        self._seed = seed
        return super().reset(seed)

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Nudge where it is time to, then step."""
        if self._level and self.steps and self.steps % NUDGE_EVERY == 0 and not self.done:
            generator = np.random.default_rng([NUDGE_STREAM, self._seed, self.steps // NUDGE_EVERY])
            angle = generator.uniform(0.0, 2 * np.pi)
            turn = float(generator.choice([-1.0, 1.0])) * self._level / NUDGE_ARM_PX
            block = self.state[2:4]
            wanted = block + self._level * np.array([np.cos(angle), np.sin(angle)])
            low, high = np.minimum(block, KEPT_PX[0]), np.maximum(block, KEPT_PX[1])
            self.displace_block(np.clip(wanted, low, high) - block, turn)
        return super().step(action)


class Stress(StrictModel):
    """What makes the worlds of an evaluation harder; the default is the published task.

    Attributes:
        observation_noise_px: see :class:`NoisyObservations`.
        action_delay_steps: see :class:`DelayedActions`.
        block_nudge_px: see :class:`NudgedBlock`.
        episode_steps: steps after which an episode ends; the published task has 300.
    """

    observation_noise_px: Annotated[float, Field(ge=0.0, le=MOST_NOISE_PX)] = 0.0
    action_delay_steps: Annotated[int, Field(ge=0, le=MOST_DELAY)] = 0
    block_nudge_px: Annotated[float, Field(ge=0.0, le=MOST_NUDGE_PX)] = 0.0
    episode_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = EPISODE_STEPS

    def world(self) -> World:
        """A new world under this stress.

        Raises:
            SimulatorMissingError: the simulator is not installed.
        """
        world: World = PushTWorld(self.episode_steps)
        if self.action_delay_steps:
            world = DelayedActions(world, self.action_delay_steps)
        if self.block_nudge_px:
            world = NudgedBlock(world, self.block_nudge_px)
        if self.observation_noise_px:
            world = NoisyObservations(world, self.observation_noise_px)
        return world

    def described(self) -> str:
        """The stress in words; empty for the published task."""
        parts = []
        if self.observation_noise_px:
            parts.append(f"observations off by {self.observation_noise_px:g} px (standard deviation)")
        if self.action_delay_steps:
            parts.append(f"actions {self.action_delay_steps} steps late")
        if self.block_nudge_px:
            parts.append(f"block nudged by {self.block_nudge_px:g} px every {NUDGE_EVERY} steps")
        if self.episode_steps != EPISODE_STEPS:
            parts.append(f"{self.episode_steps} steps")
        return ", ".join(parts)


STANDARD = Stress()
