"""What a six-axis arm offers to its node: over its own transport (hardware or emulator), or behind ROS 2 controllers.

Poses are those of the tool centre point in the frame ``world``, quaternions (x, y, z, w), metres, radians, seconds.
Times are ``time.monotonic_ns`` of this host. Nothing here limits motion: every command has passed ``dcqfa_ros.safety``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class ArmReadiness(str, Enum):
    """How far an arm is from executing motion commands."""

    DISCONNECTED = "disconnected"  # no transport; nothing is known
    STOPPED = "stopped"  # the emergency stop is open: motion is forbidden by the controller
    SAFE_STOPPED = "safe_stopped"  # the safe stop is open, the emergency stop is not
    FAULT = "fault"  # the controller reports a fault
    OFF = "off"  # not brought up: the bus or the drives are off
    READY = "ready"  # drives enabled; commands are executed


@dataclass(frozen=True, slots=True)
class ArmState:
    """What is known of an arm at one moment. Arrays are read-only, float64.

    Attributes:
        stamp_ns: monotonic arrival time of the newest joint positions, or of the newest pose where that is older.
        readiness: whether the arm would move.
        detail: why it would not, for people; empty when ready.
        joints: (6,) rad.
        joint_velocities: (6,) rad/s.
        position: (3,) m.
        orientation: (4,) unit quaternion (x, y, z, w).
        linear: (3,) m/s, in ``world``.
        angular: (3,) rad/s, in ``world``.
        gripper: opening, 0 closed .. 1 open; None without a gripper.
        gripper_holds: the gripper stalled on something; None without a gripper.
    """

    stamp_ns: int
    readiness: ArmReadiness
    detail: str
    joints: Floats
    joint_velocities: Floats
    position: Floats
    orientation: Floats
    linear: Floats
    angular: Floats
    gripper: float | None
    gripper_holds: bool | None


class MotionOutcome(str, Enum):
    """How a move to a pose or along joints ended."""

    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class MotionResult:
    """End of a move: outcome and the controller's words."""

    outcome: MotionOutcome
    message: str


class MotionHandle(Protocol):
    """A move under way."""

    def done(self) -> bool:
        """Whether the move has ended."""

    def result(self, timeout_s: float | None = None) -> MotionResult:
        """Wait for the end.

        Raises:
            TimeoutError: it has not ended within ``timeout_s`` seconds; the move goes on.
        """

    def cancel(self) -> None:
        """Ask the controller to end the move. Does not wait."""


class CartesianArmDriver(Protocol):
    """A six-axis arm under Cartesian velocity control.

    ``send_twist``, ``stop`` and ``state`` may be called from any thread and never wait for the network; the others may
    take seconds and are called from one thread.
    """

    @property
    def name(self) -> str:
        """Short name for messages, such as ``Inovo arm at 192.168.1.7``."""

    @property
    def stops(self) -> int:
        """How often the arm was stopped or lost so far: a move that was decided on before such an end is void."""

    def connect(self) -> None:
        """Open the transport, subscribe to the state and wait for the first one. Nothing moves.

        Raises:
            DriverError: the arm cannot be reached or says nothing.
        """

    def bring_up(self) -> None:
        """Reset what may be reset, switch power and drives on and activate the gripper. Nothing moves.

        Raises:
            DriverError: a step was refused or timed out; it names the step and what to do.
        """

    def state(self) -> ArmState:
        """The newest state; ``readiness`` is DISCONNECTED (with the last known figures) while the transport is lost.

        Raises:
            DriverError: never connected.
        """

    def send_twist(self, linear: Floats, angular: Floats) -> int:
        """Hand one velocity demand (m/s and rad/s in ``world``) to the transport; returns its monotonic time, ns.

        Raises:
            DriverError: the transport is lost, or streaming was not started by :meth:`start_streaming`.
        """

    def start_streaming(self) -> None:
        """Switch the controller to velocity commands and send a first zero twist.

        Raises:
            DriverError: the arm is not ready or refuses.
        """

    def stop(self) -> None:
        """Send zero twist at once, cancel moves, and end streaming: nothing is sent after it until it is started again.

        Never raises; where the transport is lost there is nothing to stop.
        """

    def move_to_pose(
        self, position: Floats, orientation: Floats, *, speed: float, angular_speed: float, since: int | None = None
    ) -> MotionHandle:
        """Start a straight move of the tool centre point at most at ``speed`` m/s and ``angular_speed`` rad/s.

        Args:
            position: goal (3,), m.
            orientation: goal (4,).
            speed: m/s.
            angular_speed: rad/s.
            since: :attr:`stops` when the move was decided on; None: now.

        Raises:
            DriverError: the arm is not ready, was stopped since, or the transport is lost; nothing was sent.
        """

    def follow_joints(self, times_s: Floats, positions: Floats, *, since: int | None = None) -> MotionHandle:
        """Start following joint positions (n, 6) rad at ``times_s`` (n,) after now; ``since`` as for a pose.

        Raises:
            DriverError: the arm is not ready, was stopped since, or the transport is lost; nothing was sent.
        """

    def move_gripper(self, opening: float) -> None:
        """Ask the gripper for an opening, 0 closed .. 1 open. Does not wait.

        Raises:
            DriverError: there is no gripper, or the transport is lost.
        """

    def close(self) -> None:
        """Stop, then release the transport. Safe to call at any time and more than once; ``connect`` works again."""
