"""The Push-T world: the published physics of ``gym_pusht`` stepped at 10 Hz, without a window and without ROS.

Conventions are those of the published evaluation: legacy start states, damping and centre of mass unset, score = the
maximum over time of coverage / 0.95 clipped to [0, 1], at most 300 steps, early end above 0.95 coverage.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcqfa_ros.errors import UserError
from dcqfa_ros.sim.tee import GOAL_POSE, SUCCESS_COVERAGE, Float32, Float64, check_state, key_points, legacy_state

__all__ = [
    "EPISODE_STEPS",
    "STEP_SECONDS",
    "EpisodeOverError",
    "PushTWorld",
    "SimulatorMissingError",
    "StepResult",
    "legacy_state",
]

EPISODE_STEPS = 300
STEP_SECONDS = 0.1  # one action is held for this long


class SimulatorMissingError(UserError, ImportError):
    """The simulator's packages are not installed."""


class EpisodeOverError(RuntimeError):
    """A finished episode was stepped, or an episode was stepped before the first reset."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did.

    Attributes:
        coverage: share of the goal covered now, 0..1.
        score_so_far: maximum over the episode's steps of coverage / 0.95, clipped to [0, 1].
        steps: steps taken since the reset.
        done: the episode has ended (coverage above 0.95, or the step limit).
    """

    coverage: float
    score_so_far: float
    steps: int
    done: bool


def _environment() -> Any:
    """Return a new ``gym_pusht`` environment; its packages are imported on first use and open no window.

    The two SDL variables must be in place before pygame is imported; a value the user chose is kept.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pygame's use of pkg_resources
            warnings.simplefilter("ignore", UserWarning)
            from gym_pusht.envs.pusht import PushTEnv
    except ImportError as error:
        raise SimulatorMissingError(
            f"the Push-T simulator cannot be imported ({error}); install it with: pip install 'gym_pusht==0.1.8' "
            "'pymunk>=6.6,<7'"
        ) from error
    return PushTEnv(obs_type="state", render_mode="rgb_array", block_cog=None, damping=None)


class PushTWorld:
    """One Push-T table. Deterministic: equal start states and actions give bit-identical states on one machine.

    The physics bodies and constants are the environment's own. Only the loop around them is written out here, with the
    same arithmetic in the same order, because the environment builds observations, contact counts and the goal's
    geometry anew at every step (tests hold the two bit-identical; this one is about four times as fast).
    """

    def __init__(self, step_limit: int = EPISODE_STEPS) -> None:
        """Load the simulator; ``reset`` starts an episode.

        Args:
            step_limit: steps after which an episode ends.

        Raises:
            SimulatorMissingError: ``gym_pusht`` or a package it needs is not installed.
            ValueError: ``step_limit`` is below 1.
        """
        if step_limit < 1:
            raise ValueError(f"step_limit: expected at least 1, got {step_limit}")
        self.step_limit = step_limit
        self._env = _environment()
        self._substeps = round(STEP_SECONDS / self._env.dt)
        self._shape_vertices: NDArray[np.float64] = np.empty((0, 0, 2))
        self._goal: Any = None
        self._steps = 0
        self._score = 0.0
        self._coverage = 0.0
        self._running = False

    @property
    def steps(self) -> int:
        """Steps taken since the last reset."""
        return self._steps

    @property
    def score_so_far(self) -> float:
        """Maximum over the steps since the reset of coverage / 0.95, clipped to [0, 1]; 0 before the first step."""
        return self._score

    @property
    def coverage(self) -> float:
        """Share of the goal covered in the current state, 0..1."""
        return self._coverage

    @property
    def done(self) -> bool:
        """True before the first reset and after the end of an episode: only a reset continues."""
        return not self._running

    @property
    def state(self) -> Float64:
        """Agent x, y, block x, y [px] and block angle [rad, 0..2 pi), shape (5,), float64.

        Raises:
            EpisodeOverError: the world was never reset.
        """
        if self._goal is None:
            raise EpisodeOverError("the Push-T world has no state yet: reset it first")
        agent, block = self._env.agent, self._env.block
        return np.array([*agent.position, *block.position, block.angle % (2 * np.pi)], dtype=np.float64)

    def observation(self) -> dict[str, Float32]:
        """Return ``keypoints`` (9, 2) and ``agent_position`` (2,), float32, px, table frame, of the current state."""
        state = self.state
        return {"keypoints": key_points(state[2:]), "agent_position": state[:2].astype(np.float32)}

    def reset(self, seed: int) -> Float64:
        """Start the published episode of ``seed`` and return its state (see ``legacy_state``)."""
        return self.reset_to(legacy_state(seed))

    def reset_to(self, state: ArrayLike) -> Float64:
        """Place agent and block, advance the physics by one 0.01 s step as published, and return the state (5,).

        Bodies that overlap are pushed apart by that step, so the returned state may differ from the one given.

        Raises:
            ValueError: ``state`` is not five finite numbers.
        """
        start = check_state(state)
        self._env.reset(options={"reset_to_state": start})
        if self._goal is None:
            self._prepare_coverage()
        self._steps, self._score, self._running = 0, 0.0, True
        self._coverage = self._measure_coverage()
        return self.state

    def step(self, action: ArrayLike) -> StepResult:
        """Hold the target ``action`` (2,) px for 0.1 s and return what came of it.

        The target may lie outside the table, as in the published environment; limits belong to the arm.

        Raises:
            ValueError: the action's shape is not (2,) or a coordinate is NaN or infinite; nothing has moved.
            EpisodeOverError: the episode has ended, or none was started.
        """
        target = np.asarray(action, dtype=np.float64)
        if target.shape != (2,) or not np.isfinite(target).all():
            raise ValueError(f"action: expected two finite numbers (x, y in px), got {target.tolist()}")
        if not self._running:
            raise EpisodeOverError("no Push-T episode is running: reset the world first")
        self._integrate(float(target[0]), float(target[1]))
        self._coverage = self._measure_coverage()
        self._steps += 1
        self._score = max(self._score, min(max(self._coverage / SUCCESS_COVERAGE, 0.0), 1.0))
        self._running = self._coverage <= SUCCESS_COVERAGE and self._steps < self.step_limit
        return StepResult(self._coverage, self._score, self._steps, not self._running)

    def displace_block(self, shift: ArrayLike, turn: float) -> None:
        """Move the block by ``shift`` (2,) px and turn it by ``turn`` rad, as a hand would between two steps.

        Nothing is scored before the next step, whose physics pushes apart what overlaps.

        Raises:
            ValueError: the shift is not two finite numbers, or the turn is none; nothing has moved.
            EpisodeOverError: no episode is running.
        """
        vector = np.asarray(shift, dtype=np.float64)
        if vector.shape != (2,) or not np.isfinite([*vector, turn]).all():
            raise ValueError(f"shift and turn: expected three finite numbers, got {vector.tolist()} and {turn}")
        if not self._running:
            raise EpisodeOverError("no Push-T episode is running: reset the world first")
        block = self._env.block
        block.position = (block.position.x + float(vector[0]), block.position.y + float(vector[1]))
        block.angle += float(turn)
        self._env.space.reindex_shapes_for_body(block)

    def _integrate(self, target_x: float, target_y: float) -> None:
        """Run the environment's PD control and physics for one action."""
        env = self._env
        agent, space, dt, stiffness, damping = env.agent, env.space, env.dt, env.k_p, env.k_v
        for _ in range(self._substeps):
            x, y = agent.position
            vx, vy = agent.velocity
            agent.velocity = (
                vx + (stiffness * (target_x - x) + damping * (0.0 - vx)) * dt,
                vy + (stiffness * (target_y - y) + damping * (0.0 - vy)) * dt,
            )
            space.step(dt)

    def _prepare_coverage(self) -> None:
        """Keep what coverage needs and no episode changes: the shapes' vertices and the goal's geometry."""
        env = self._env
        self._shape_vertices = np.array([[tuple(v) for v in shape.get_vertices()] for shape in env.block.shapes])
        self._goal = self._geometry(env.get_goal_pose_body(np.array(GOAL_POSE)))
        self._goal_area = self._goal.area

    def _geometry(self, body: Any) -> Any:
        """Return the T placed at ``body`` as a shapely multi-polygon."""
        import shapely

        corners = [[tuple(body.local_to_world(tuple(v))) for v in shape] for shape in self._shape_vertices.tolist()]
        return shapely.multipolygons(shapely.polygons(np.array(corners)))

    def _measure_coverage(self) -> float:
        return float(self._goal.intersection(self._geometry(self._env.block)).area / self._goal_area)
