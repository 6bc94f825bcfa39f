"""Motion of an emulated Inovo arm: jogs, joint paths and their limits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.kinematics import (
    JOINTS,
    ArmKinematics,
    KinematicsError,
)
from dcqfa_ros.rotations import interpolate_orientation

Floats = NDArray[np.float64]

HOME = (0.0, 0.0, np.pi / 2, 0.0, np.pi / 2, np.pi)
_PATH_STEP_M, _PATH_STEP_RAD = 0.005, 0.02
_DEFAULT_SPEED, _DEFAULT_ANGULAR = 0.25, 1.0
_SUBSTEP_S = 0.01
_FAR_M = 10.0  # no arm reaches so far: not even a try to plan it


class PlanError(ValueError):
    """A goal cannot be executed; the text is the controller's answer."""


@dataclass(frozen=True, slots=True)
class JointPath:
    """Joint positions (n, 6) rad at times (n,) s after the start, in straight lines in between."""

    times: Floats
    positions: Floats

    @property
    def duration_s(self) -> float:
        """When the last position is reached."""
        return float(self.times[-1])

    def at(self, time_s: float) -> Floats:
        """Return the joints (6,) at a time, those of the end after it."""
        if time_s >= self.times[-1]:
            return self.positions[-1].copy()
        after = int(np.searchsorted(self.times, time_s, side="right"))
        before = max(after - 1, 0)
        span = float(self.times[after] - self.times[before])
        share = (time_s - float(self.times[before])) / span if span > 0.0 else 1.0
        result: Floats = self.positions[before] + share * (self.positions[after] - self.positions[before])
        return result


class ArmMotion:
    """Joints that follow the last jog, or a path, as fast as their limits allow. Not thread-safe.

    The last jog is executed until another demand, a stop or a path comes: there is no time-out.
    """

    def __init__(
        self, kinematics: ArmKinematics, joints: Any = HOME, *, acceleration: float = 15.0, braking: float = 30.0
    ) -> None:
        """Stand at ``joints`` (6,) rad; ``acceleration`` and ``braking`` of each joint are in rad/s^2."""
        self.kinematics = kinematics
        self.joints: Floats = np.array(joints, dtype=np.float64)
        self.velocities: Floats = np.zeros(JOINTS)
        self.acceleration, self.braking = acceleration, braking
        self.twist: Floats = np.zeros(6)
        self.joint_demand: Floats | None = None
        self.path: JointPath | None = None
        self._path_time = 0.0
        self.is_free = False

    def jog(self, twist: Floats) -> None:
        """Execute a twist (6,) m/s and rad/s in ``world`` from now on."""
        self.twist, self.joint_demand = np.array(twist, dtype=np.float64), None

    def jog_joints(self, velocities: Floats) -> None:
        """Execute joint velocities (6,) rad/s from now on."""
        self.twist, self.joint_demand = np.zeros(6), np.array(velocities, dtype=np.float64)

    def follow(self, path: JointPath) -> None:
        """Follow a path from now on."""
        self.halt()
        self.path, self._path_time = path, 0.0

    def halt(self) -> None:
        """Drop every demand; the joints brake."""
        self.twist, self.joint_demand, self.path = np.zeros(6), None, None

    @property
    def progress(self) -> float:
        """Share of the path that is done, 0..1; 1 without a path."""
        return 1.0 if self.path is None else min(1.0, self._path_time / max(self.path.duration_s, 1e-9))

    def step(self, seconds: float) -> bool:
        """Advance by ``seconds``; returns whether a path has just ended."""
        ended = False
        while seconds > 1e-9:
            part = min(seconds, _SUBSTEP_S)
            ended |= self._advance(part)
            seconds -= part
        return ended

    def _advance(self, seconds: float) -> bool:
        if self.is_free and self.path is not None:
            self._path_time += seconds
            target = self.path.at(self._path_time)
            self.velocities = (target - self.joints) / seconds
            self.joints = target
            if self._path_time < self.path.duration_s:
                return False
            self.path, self.velocities = None, np.zeros(JOINTS)
            return True
        wanted = np.zeros(JOINTS)
        if self.is_free and self.joint_demand is not None:
            limits = self.kinematics.velocity_limits
            wanted = np.clip(self.joint_demand, -limits, limits)
        elif self.is_free and self.twist.any():
            wanted = self.kinematics.joint_velocities(self.joints, self.twist[:3], self.twist[3:])
        rate = self.acceleration if self.is_free else self.braking
        self.velocities = self.velocities + np.clip(wanted - self.velocities, -rate * seconds, rate * seconds)
        self.joints = self.joints + self.velocities * seconds
        return False


def plan_move(kinematics: ArmKinematics, start: Floats, goal: m.Message) -> JointPath:
    """Return the path of a goal of ``/default_move_group/move``.

    Raises:
        PlanError: the goal is malformed or out of reach.
    """
    times, points = [0.0], [np.array(start, dtype=np.float64)]
    try:
        sequence = m.field(goal, "motion_sequence", list)
        if not sequence:
            raise PlanError("motion_sequence is empty")
        for entry in sequence:
            if not isinstance(entry, dict):
                raise PlanError(f"motion_sequence: expected objects, got {entry!r:.80}")
            _plan_point(kinematics, m.MessageError, entry, times, points)
    except (m.MessageError, KinematicsError) as error:
        raise PlanError(str(error)) from None
    return JointPath(np.array(times), np.array(points))


def plan_trajectory(kinematics: ArmKinematics, start: Floats, goal: m.Message) -> JointPath:
    """Return the path of a goal of ``follow_joint_trajectory``.

    Raises:
        PlanError: the goal is malformed or faster than the joints.
    """
    times, points = [0.0], [np.array(start, dtype=np.float64)]
    try:
        trajectory = m.field(goal, "trajectory", dict)
        names = m.field(trajectory, "joint_names", list)
        if sorted(map(str, names)) != sorted(m.JOINT_NAMES):
            raise PlanError(f"joint_names: expected {', '.join(m.JOINT_NAMES)}, got {names}")
        order = [names.index(name) for name in m.JOINT_NAMES]
        for point in m.field(trajectory, "points", list):
            moment = m.field(point, "time_from_start", dict)
            times.append(m.number({"secs": 0, **moment}, "secs") + m.number({"nsecs": 0, **moment}, "nsecs") / 1e9)
            points.append(m.floats(point, "positions", JOINTS)[order])
    except m.MessageError as error:
        raise PlanError(str(error)) from None
    if len(times) < 2:
        raise PlanError("the trajectory has no points")
    path = JointPath(np.array(times), np.array(points))
    steps = np.diff(path.times)
    if not (steps > 0.0).all():
        raise PlanError("time_from_start does not increase")
    rates = np.abs(np.diff(path.positions, axis=0)) / steps[:, None]
    # What moved on since the goal was sent comes on top of the first step.
    if (rates[1:] > kinematics.velocity_limits * 1.001).any() or (rates[0] > kinematics.velocity_limits * 1.2).any():
        raise PlanError("the trajectory is faster than the joints' velocity limits")
    return path


def _plan_point(
    kinematics: ArmKinematics, error: type[Exception], entry: m.Message, times: list[float], points: list[Floats]
) -> None:
    limits = kinematics.velocity_limits.copy()
    cap = m.number({"max_joint_velocity": 0.0, **entry}, "max_joint_velocity")
    if cap > 0.0:
        limits = np.minimum(limits, cap)
    if entry.get("use_joint_space_target") or ("joint_angles" in entry and "pose" not in entry):
        _append(times, points, m.floats(entry, "joint_angles", JOINTS), limits, 0.0)
        return
    if entry.get("frame_id", "world") not in ("", "world"):
        raise error(f"frame_id: expected world, got {entry['frame_id']!r}")
    position, orientation = m.read_pose(entry)
    speed = m.field({"max_velocity": {}, **entry}, "max_velocity", dict)
    linear = m.number({"linear": 0.0, **speed}, "linear") or _DEFAULT_SPEED
    angular = m.number({"angular": 0.0, **speed}, "angular") or _DEFAULT_ANGULAR
    if linear < 0.0 or angular < 0.0:
        raise error("max_velocity: expected positive speeds")
    if not entry.get("cartesian"):
        _append(times, points, kinematics.inverse(position, orientation, points[-1]), limits, 0.0)
        return
    begin, turned = kinematics.pose(points[-1])
    distance = math.dist(position, begin)
    if not distance <= _FAR_M:
        raise error("out of reach")
    angle = 2.0 * float(np.arccos(np.clip(abs(float(turned @ orientation)), 0.0, 1.0)))
    count = max(1, int(np.ceil(max(distance / _PATH_STEP_M, angle / _PATH_STEP_RAD))))
    duration = max(distance / linear, angle / angular)
    shares = [(i + 1) / count for i in range(count)]
    for share, rotation in zip(shares, interpolate_orientation(turned, orientation, shares), strict=True):
        joints = kinematics.inverse_of(begin + share * (position - begin), rotation, points[-1])
        _append(times, points, joints, limits, duration / count)


def _append(times: list[float], points: list[Floats], joints: Floats, limits: Floats, at_least_s: float) -> None:
    needed = float(np.max(np.abs(joints - points[-1]) / limits))
    times.append(times[-1] + max(needed, at_least_s, 1e-3))
    points.append(joints)
