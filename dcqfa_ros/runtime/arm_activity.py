"""What an arm under :class:`~dcqfa_ros.runtime.arm_stream.ArmStream` is doing, why it refuses, and its settings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

from dcqfa_ros.safety.cartesian_limits import LimitError


class Activity(str, Enum):
    """What the arm is doing. All but DISARMED count as armed."""

    DISARMED = "disarmed"
    STARTING = "starting"  # the driver is being switched: to streaming, or to a move
    WAITING = "waiting"  # no command yet
    STREAMING = "streaming"
    HOLDING = "holding"  # the commands have ceased: braking, at rest, about to be stopped
    MOVING = "moving"  # the controller executes a pose or a joint trajectory
    RETREATING = "retreating"  # stopped by contact, backing away


class CommandRefusal(str, Enum):
    """Why a command was not taken."""

    DISARMED = "disarmed"
    SOURCE = "source_without_lease"
    BUSY = "busy"  # a move or the gripper's switching is under way
    OLD = "too_old"
    FUTURE = "from_the_future"
    MALFORMED = "malformed"
    LIMITS = "outside_limits"
    CONSUMED = "already_consumed"


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """Timing and speeds.

    Attributes:
        rate: of the control loop, Hz, 60 to 100 for Inovo.
        hold_after_s: without a command, braking to rest begins.
        stop_after_s: without a command, zero twist is sent and publishing ends; the stop latches.
        future_s: how far a stamp may lie ahead of this host's clock.
        pose_speed, pose_angular_speed: of moves to a pose, m/s and rad/s.
        move_timeout_s: after which a move is stopped.
    """

    rate: float
    hold_after_s: float
    stop_after_s: float
    future_s: float
    pose_speed: float
    pose_angular_speed: float
    move_timeout_s: float

    def __post_init__(self) -> None:
        """Refuse settings out of range.

        Raises:
            LimitError: names the setting.
        """
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), SETTING_RANGES[field.name]
            if not (isinstance(value, (int, float)) and low <= value <= high):
                raise LimitError(f"{field.name}: expected {low:g} to {high:g}, got {value}")
        if not self.hold_after_s < self.stop_after_s:
            raise LimitError(f"hold_after_s {self.hold_after_s} must be below stop_after_s {self.stop_after_s}")


SETTING_RANGES: dict[str, tuple[float, float]] = {
    "rate": (20.0, 500.0),
    "hold_after_s": (0.02, 1.0),
    "stop_after_s": (0.05, 5.0),
    "future_s": (0.0, 0.5),
    "pose_speed": (0.001, 0.5),
    "pose_angular_speed": (0.01, 1.0),
    "move_timeout_s": (1.0, 120.0),
}
