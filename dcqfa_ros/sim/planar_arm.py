"""The simulated planar arm: an ``ArmDriver`` over the Push-T world."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import ArrayLike

from dcqfa_ros.drivers.protocols import ArmObservation, DriverError
from dcqfa_ros.sim.cell_state import CellStateWriter
from dcqfa_ros.sim.pusht import EPISODE_STEPS, PushTWorld
from dcqfa_ros.sim.tee import Float32, Float64


class SimulatedPlanarArm:
    """Position-controlled end effector on the Push-T table. Time is discrete: one tick is 0.1 s of the world.

    After an episode's end the cell stands still: further ticks return the final observation unchanged until ``reset``,
    so late commands can neither move the block nor change the score.
    """

    def __init__(self, step_limit: int = EPISODE_STEPS, seed: int = 0, shared_as: str | None = None) -> None:
        """Choose the episode's length and who sees the cell; ``connect`` loads the simulator.

        Args:
            step_limit: ticks after which an episode ends.
            seed: start state in which ``connect`` puts the cell.
            shared_as: name under which the cell shows its state to simulated cameras on this host
                (``cell_state.cell_state_name``), or None to show it to nobody.
        """
        if step_limit < 1:
            raise ValueError(f"step_limit: expected at least 1, got {step_limit}")
        self._step_limit = step_limit
        self._seed = seed
        self._shared_as = shared_as
        self._world: PushTWorld | None = None
        self._writer: CellStateWriter | None = None
        self._target: Float64 | None = None
        self._observation: ArmObservation | None = None

    @property
    def name(self) -> str:
        """Short name for messages."""
        return "simulated planar arm"

    @property
    def state(self) -> Float64:
        """Agent x, y, block x, y [px] and block angle [rad], shape (5,), float64: what a picture is drawn from.

        Raises:
            DriverError: not connected.
        """
        return self._connected().state

    def connect(self) -> None:
        """Load the simulator, reset the cell and start showing its state; nothing happens when already connected.

        Raises:
            SimulatorMissingError: the simulator's packages are not installed.
            CellStateError: another cell of the same name runs on this host.
        """
        if self._world is not None:
            return
        world = PushTWorld(self._step_limit)
        world.reset(self._seed)
        if self._shared_as is not None:
            self._writer = CellStateWriter(self._shared_as)
        self._world = world
        self._take_observation()

    def reset(self, seed: int) -> ArmObservation:
        """Start the published episode of ``seed`` and return its first observation (step 0, score 0).

        Raises:
            DriverError: not connected.
            ValueError: ``seed`` is outside 0..2**32-1.
        """
        self._connected().reset(seed)
        self._target = None
        return self._take_observation()

    def observe(self) -> ArmObservation:
        """Return the observation of the present state; the world does not advance, but cameras see that it lives.

        Raises:
            DriverError: not connected.
        """
        world = self._connected()
        assert self._observation is not None  # connect() has taken one
        if self._writer is not None:
            self._writer.write(world.state, self._target)
        return self._observation

    def step(self, action: ArrayLike) -> ArmObservation:
        """Hold the target ``action`` (2,) px for one tick and return what came of it.

        Raises:
            DriverError: not connected.
            ValueError: the action is not two finite numbers; nothing has moved.
        """
        target = np.array(action, dtype=np.float64)
        if target.shape != (2,) or not np.isfinite(target).all():
            raise ValueError(f"{self.name}: action: expected two finite numbers (x, y in px), got {target.tolist()}")
        last = self.observe()
        world = self._connected()
        if world.done:
            return last
        world.step(target)
        self._target = target
        return self._take_observation()

    def hold(self) -> ArmObservation:
        """Execute one tick towards the last target, or towards the present position before the first command.

        Raises:
            DriverError: not connected.
        """
        last = self.observe()
        return self.step(last.target if self._target is None else self._target)

    def close(self) -> None:
        """Release the world and stop showing its state; safe to call at any time and more than once."""
        writer, self._writer = self._writer, None
        self._world, self._observation, self._target = None, None, None
        if writer is not None:
            writer.close()

    def _connected(self) -> PushTWorld:
        if self._world is None:
            raise DriverError(f"{self.name}: not connected, call connect() first")
        return self._world

    def _take_observation(self) -> ArmObservation:
        world = self._connected()
        arrays = world.observation()
        agent = _read_only(arrays["agent_position"])
        stamp = time.monotonic_ns()
        self._observation = ArmObservation(
            stamp_ns=stamp,
            step=world.steps,
            agent=agent,
            keypoints=_read_only(arrays["keypoints"]),
            target=agent if self._target is None else _read_only(self._target.astype(np.float32)),
            coverage=world.coverage,
            score=world.score_so_far,
            done=world.done,
        )
        if self._writer is not None:
            self._writer.write(world.state, self._target, stamp)
        return self._observation


def _read_only(array: Float32) -> Float32:
    array.flags.writeable = False
    return array
