"""Any six-axis arm behind ROS 2 controllers, as a driver: MoveIt Servo, ros2_control.

Velocities go out as twists (``output/twist``, MoveIt Servo) or as joint velocities (``output/joint_velocity``,
``forward_command_controller``), moves as joint trajectories (``output/joint_trajectory``,
``joint_trajectory_controller``). The arm's joint states come in on ``input/joint_states``; its pose follows from its
kinematics. The node hands over what it receives and gets told what to publish: no ROS here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers.arm_protocol import ArmReadiness, ArmState, MotionOutcome, MotionResult
from dcqfa_ros.drivers.kinematics import ArmKinematics, KinematicsError
from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.rotations import interpolate_orientation, quaternion_of
from dcqfa_ros.safety.joint_limits import DAMPING

Floats = NDArray[np.float64]

_FRESH_S = 0.5  # joint states older than this: the arm is not there
_REACHED_RAD = 0.02
_HOLD_S = 0.1  # in which a trajectory that is ended comes to rest
_RECENT_S = 0.1  # joint states older than this do not say where a moving arm is
_ENDED = (MotionOutcome.SUCCEEDED, MotionOutcome.CANCELLED)
_GRACE_S = 3.0  # after the end of a trajectory, until the arm must have reached it
_STEP_M, _STEP_RAD = 0.01, 0.05  # between two points of a straight move


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where commands go: twist (3,), (3,) or None; joint velocities (6,) or None; trajectory times (n,), (n, 6)."""

    twist: Callable[[Floats, Floats], None] | None
    joint_velocity: Callable[[Floats], None] | None
    trajectory: Callable[[Floats, Floats], None]


class TopicMotion:
    """A trajectory that was published; it has ended when the joint states show its last point."""

    def __init__(self, arm: TopicArm, times_s: Floats, positions: Floats) -> None:
        """Begin now: from the arm's present joints through ``positions`` (n, 6) rad at ``times_s`` (n,)."""
        self._arm, self._begun_s = arm, time.monotonic()
        self._times = np.concatenate([[0.0], times_s])
        self._rows = np.vstack([arm.state().joints, positions])
        self._result: MotionResult | None = None

    def done(self) -> bool:
        """Whether the move has ended."""
        if self._result is None:
            self._result = self._look()
        return self._result is not None

    def _look(self) -> MotionResult | None:
        state, late = self._arm.state(), time.monotonic() - self._begun_s - self._times[-1]
        if state.readiness is ArmReadiness.DISCONNECTED:
            return MotionResult(MotionOutcome.LOST, state.detail)
        away = float(np.abs(state.joints - self._rows[-1]).max())
        if late >= 0.0 and away < _REACHED_RAD:
            return MotionResult(MotionOutcome.SUCCEEDED, "")
        if late >= _GRACE_S:
            return MotionResult(MotionOutcome.TIMED_OUT, f"{away:.3f} rad from the goal {_GRACE_S:g} s after its time")
        return None

    def planned(self, ahead_s: float) -> Floats:
        """Return the joints (6,) rad that the trajectory asks for in ``ahead_s`` seconds."""
        at = time.monotonic() - self._begun_s + ahead_s
        return np.array([np.interp(at, self._times, column) for column in self._rows.T])

    def result(self, timeout_s: float | None = None) -> MotionResult:
        """Wait for the end.

        Raises:
            TimeoutError: it has not ended within ``timeout_s`` seconds; the move goes on.
        """
        end = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not self.done():
            if time.monotonic() >= end:
                raise TimeoutError("the move goes on")
            time.sleep(0.01)
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """End the move, also where the arm was lost or is late: its controller may still execute it.

        The arm is to stay where it is, or, where that is not known, where the trajectory has brought it.
        """
        if self.done() and self._result is not None and self._result.outcome in _ENDED:
            return
        self._result = self._result or MotionResult(MotionOutcome.CANCELLED, "")
        state = self._arm.state()
        known = time.monotonic_ns() - state.stamp_ns < _RECENT_S * 1e9
        self._arm.hold(state.joints if known else self.planned(_HOLD_S / 2.0))


class TopicArm:
    """A ``CartesianArmDriver`` over topics. It has no gripper."""

    def __init__(self, kinematics: ArmKinematics, outputs: Outputs) -> None:
        """Prepare; joint states are fed by :meth:`feed`.

        Raises:
            ValueError: neither or both of the velocity outputs are given.
        """
        if (outputs.twist is None) == (outputs.joint_velocity is None):
            raise ValueError("expected one output of velocities: twist or joint_velocity")
        self.kinematics, self._out = kinematics, outputs
        self._lock = threading.RLock()
        self._streaming = False
        self._stops = 0
        self._motion: TopicMotion | None = None
        nothing = np.zeros(6)
        self._joints, self._velocities, self._stamp_ns = nothing, nothing, 0

    @property
    def name(self) -> str:
        """Short name for messages."""
        return f"{self.kinematics.name} behind ROS 2 topics"

    @property
    def stops(self) -> int:
        """How often the arm was stopped so far: a move that was decided on before is void."""
        return self._stops

    def feed(self, positions: Floats, velocities: Floats, stamp_ns: int) -> None:
        """Take in joint positions and velocities (6,), rad and rad/s; not finite ones are as good as none."""
        if np.isfinite(positions).all() and np.isfinite(velocities).all():
            with self._lock:
                self._joints, self._velocities, self._stamp_ns = positions.copy(), velocities.copy(), stamp_ns

    def connect(self) -> None:
        """Do nothing: the arm is there once its joint states come."""

    def bring_up(self) -> None:
        """Do nothing: another arm is switched on by its own means."""

    def state(self) -> ArmState:
        """The newest state; DISCONNECTED while no fresh joint states come."""
        with self._lock:
            joints, velocities, stamp_ns = self._joints, self._velocities, self._stamp_ns
        position, orientation = self.kinematics.pose(joints)
        twist = self.kinematics.jacobian(joints) @ velocities
        age = (time.monotonic_ns() - stamp_ns) / 1e9
        readiness, detail = ArmReadiness.READY, ""
        if not stamp_ns:
            readiness, detail = ArmReadiness.DISCONNECTED, "no joint states on input/joint_states yet"
        elif age > _FRESH_S:
            readiness, detail = ArmReadiness.DISCONNECTED, f"no joint states on input/joint_states for {age:.2f} s"
        return ArmState(
            stamp_ns, readiness, detail, joints, velocities, position, orientation, twist[:3], twist[3:], None, None
        )

    def start_streaming(self) -> None:
        """Begin with a zero twist; a move under way is ended.

        Raises:
            DriverError: no joint states come, or the arm was stopped meanwhile.
        """
        stops = self._stops
        self._check()
        with self._lock:
            self._still(stops)
            self._end_move()
            self._streaming = True
            self._send(np.zeros(3), np.zeros(3))

    def send_twist(self, linear: Floats, angular: Floats) -> int:
        """Publish one velocity demand; returns its monotonic time, ns.

        Raises:
            DriverError: streaming was not started.
        """
        with self._lock:
            if not self._streaming:
                raise DriverError(f"{self.name}: not streaming: call start_streaming() first")
            return self._send(linear, angular)

    def _send(self, linear: Floats, angular: Floats) -> int:
        if self._out.twist is not None:
            self._out.twist(linear, angular)
        else:
            assert self._out.joint_velocity is not None
            moving = bool(np.any(linear) or np.any(angular))
            # With the damping of the limits: these are the joint speeds that were examined.
            speeds = np.zeros(6)
            if moving:
                speeds = self.kinematics.joint_velocities(self._joints, linear, angular, DAMPING)
            self._out.joint_velocity(speeds)
        return time.monotonic_ns()

    def stop(self) -> None:
        """Publish zero, end a move where the arm is, and publish nothing after it."""
        with self._lock:
            self._stops += 1
            if self._streaming or self._motion is None:
                self._send(np.zeros(3), np.zeros(3))
            self._streaming = False
            self._end_move()

    def _end_move(self) -> None:
        motion, self._motion = self._motion, None
        if motion is not None:
            motion.cancel()

    def _still(self, stops: int) -> None:
        if stops != self._stops:
            raise DriverError(f"{self.name}: stopped meanwhile: nothing was sent, start again")

    def hold(self, joints: Floats) -> None:
        """Replace a trajectory under way by coming to rest at ``joints`` (6,) rad."""
        self._out.trajectory(np.array([_HOLD_S]), joints[None])

    def move_to_pose(
        self, position: Floats, orientation: Floats, *, speed: float, angular_speed: float, since: int | None = None
    ) -> TopicMotion:
        """Start a straight move of the tool centre point, as a joint trajectory.

        Raises:
            DriverError: no joint states come, the arm was stopped since, or part of the line cannot be reached.
        """
        stops = self._stops if since is None else since
        self._check()
        state = self.state()
        turn = 2.0 * np.arccos(min(1.0, abs(float(state.orientation @ orientation))))
        way = float(np.linalg.norm(position - state.position))
        pieces = max(2, int(np.ceil(max(way / _STEP_M, turn / _STEP_RAD))))
        shares = np.arange(1, pieces + 1) / pieces
        # At constant speed the ends would be jerks: a cosine has pi/2 times the mean speed in the middle.
        eased = (1.0 - np.cos(np.pi * shares)) / 2.0
        duration = max(0.5, (np.pi / 2.0) * max(way / speed, turn / angular_speed))
        rows, joints = [], state.joints
        turns = interpolate_orientation(state.orientation, orientation, [float(s) for s in eased])
        for share, rotation in zip(eased, turns, strict=True):
            place = state.position + (position - state.position) * share
            try:
                joints = self.kinematics.inverse(place, quaternion_of(rotation), joints)
            except KinematicsError as error:
                raise DriverError(f"{self.name}: {error}") from error
            rows.append(joints)
        return self._begin(shares * duration, np.array(rows), stops)

    def follow_joints(self, times_s: Floats, positions: Floats, *, since: int | None = None) -> TopicMotion:
        """Start following joint positions (n, 6) rad at ``times_s`` (n,) after now.

        Raises:
            DriverError: no joint states come, or the arm was stopped since.
        """
        stops = self._stops if since is None else since
        self._check()
        return self._begin(np.asarray(times_s, np.float64), np.asarray(positions, np.float64), stops)

    def _begin(self, times_s: Floats, positions: Floats, stops: int) -> TopicMotion:
        steps = np.diff(positions, axis=0, prepend=self.state().joints[None])
        speeds = np.abs(steps) / np.diff(times_s, prepend=0.0)[:, None]
        if (speeds > self.kinematics.velocity_limits).any():
            raise DriverError(f"{self.name}: the move would need {speeds.max():.2f} rad/s of a joint: allow more time")
        with self._lock:
            self._still(stops)
            if self._streaming:
                self._streaming = False
                self._send(np.zeros(3), np.zeros(3))
            self._motion = TopicMotion(self, times_s, positions)
            self._out.trajectory(times_s, positions)
            return self._motion

    def _check(self) -> None:
        state = self.state()
        if state.readiness is not ArmReadiness.READY:
            raise DriverError(f"{self.name}: {state.detail}")

    def move_gripper(self, opening: float) -> None:
        """Refuse: there is no gripper.

        Raises:
            DriverError: always.
        """
        raise DriverError(f"{self.name}: no gripper (asked for opening {opening:g})")

    def close(self) -> None:
        """Stop."""
        self.stop()
