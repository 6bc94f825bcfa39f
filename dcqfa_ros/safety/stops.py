"""Why an arm does not move: one list of machine-readable reasons, and the latch that holds the first until reset."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum


class StopCode(str, Enum):
    """Machine-readable reason why the arm does not move."""

    # Ends that are nobody's fault.
    NEVER_ARMED = "never_armed"  # since the node was started, or since the arm came back
    OPERATOR = "operator"  # disarmed on request
    SUCCESS = "success"  # simulated cell: goal reached
    STEP_LIMIT = "step_limit"  # simulated cell: episode over
    SHUTDOWN = "shutdown"  # node deactivated or ended
    # The operator.
    OPERATOR_STOP = "operator_stop"  # stop service or topic
    # Commands.
    COMMAND_TIMEOUT = "command_timeout"  # deadman: no usable command for too long
    OBSERVATION_AGE = "observation_age"  # the command being executed rests on an observation that is too old
    NOT_FINITE = "not_finite"  # NaN or infinity in a command
    TWO_PUBLISHERS = "two_publishers"  # two processes send the same commands
    # Time: stamps of the policy's host, or of this one, cannot be relied on.
    CLOCK_UNKNOWN = "clock_unknown"  # the distance between the two clocks is not known
    CLOCK_SKEW = "clock_skew"  # it is too large
    CLOCK_STEP = "clock_step"  # one of them was set while the arm was armed
    # Contact.
    FORCE = "force"
    TORQUE = "torque"
    # Health of what the arm relies on.
    WRENCH_LOST = "wrench_lost"  # no reading of the force/torque sensor for too long
    WRENCH_NOT_FINITE = "wrench_not_finite"
    CAMERA_LOST = "camera_lost"  # no picture of a watched camera for too long
    WATCHDOG_LOST = "watchdog_lost"  # the watchdog process is gone, or has lost the controller
    # The arm itself.
    WORKSPACE = "workspace"  # measured outside the workspace box although every command was bounded
    SPEED = "speed"  # measured faster than any command allowed
    JOINT_LIMIT = "joint_limit"  # a joint measured beyond its end, and going on, in a move of the controller's own
    ARM_LOST = "arm_lost"  # connection lost, or its state stopped coming
    ARM_OFF = "arm_off"  # bus or drives switched off
    ARM_FAULT = "arm_fault"  # the controller reports a fault
    ESTOP = "estop"  # emergency stop open
    SAFE_STOP = "safe_stop"  # safe stop open
    DRIVER = "driver"  # the driver refused a command
    FAULT = "fault"  # the node stopped itself

    @property
    def normal(self) -> bool:
        """Whether nothing went wrong: such an end needs no reset before the arm is armed again."""
        return self in _NORMAL


_NORMAL = frozenset((StopCode.NEVER_ARMED, StopCode.OPERATOR, StopCode.SUCCESS, StopCode.STEP_LIMIT, StopCode.SHUTDOWN))


@dataclass(frozen=True, slots=True)
class Stop:
    """Why the arm was disarmed: the reason for machines, and one sentence for people."""

    code: StopCode
    text: str


class StopLatch:
    """Holds the first abnormal stop until :meth:`reset`; thread-safe.

    A normal end (``StopCode.normal``) is remembered as the last one but holds nothing.
    """

    def __init__(self) -> None:
        """Begin with nothing latched: the arm has never been armed."""
        self._lock = threading.Lock()
        self._last = Stop(StopCode.NEVER_ARMED, "not armed since start")
        self._held: Stop | None = None
        self.counts: dict[str, int] = {}

    @property
    def last(self) -> Stop:
        """The latched stop, or the last end where nothing is latched."""
        with self._lock:
            return self._held or self._last

    @property
    def held(self) -> Stop | None:
        """The latched stop, if any."""
        with self._lock:
            return self._held

    def trip(self, stop: Stop) -> bool:
        """Take ``stop`` in; returns False where an earlier one is held, which stays the reason."""
        with self._lock:
            self.counts[stop.code.value] = self.counts.get(stop.code.value, 0) + 1
            if self._held is not None:
                return False
            self._last = stop
            if not stop.code.normal:
                self._held = stop
            return True

    def reset(self) -> Stop | None:
        """Release and return what is held (None: nothing was); the caller has made sure that its cause is gone."""
        with self._lock:
            held, self._held = self._held, None
            if held is not None:
                self._last = Stop(StopCode.NEVER_ARMED, f"not armed since the stop was reset ({held.text})")
            return held
