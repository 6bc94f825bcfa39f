"""Random commands for an arm, many of them hostile, and the check of what reaches its socket."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped, Transform, Twist, TwistStamped
from std_msgs.msg import Float64
from trajectory_msgs.msg import (
    JointTrajectory,
    JointTrajectoryPoint,
    MultiDOFJointTrajectory,
    MultiDOFJointTrajectoryPoint,
)

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.kinematics import ArmKinematics
from dcqfa_ros.ros.conversions import TCP, to_duration, to_time

BAD_NUMBERS = (math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324)
BAD_SHARE = 0.02  # of messages with a number that is no number; each latches a stop
TOLERANCE = 1e-9


class Hostile:
    """Makes messages; ``bad`` counts those with NaN or infinity."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.bad = 0

    def _number(self, scale: float) -> float:
        """Mostly of the order of ``scale``, sometimes far beyond."""
        rng = self._rng
        return rng.gauss(0.0, scale) * (10.0 ** rng.uniform(0, 6) if rng.random() < 0.1 else 1.0)

    def _numbers(self, count: int, scale: float) -> list[float]:
        values = [self._number(scale) for _ in range(count)]
        if self._rng.random() < BAD_SHARE:
            values[self._rng.randrange(count)] = self._rng.choice(BAD_NUMBERS)
            self.bad += not all(map(math.isfinite, values))
        return values

    def _stamp(self, now_ns: int) -> Any:
        """Mostly now; sometimes none, long ago, or in the future."""
        roll = self._rng.random()
        if roll < 0.9:
            return to_time(now_ns)
        return to_time(0 if roll < 0.93 else max(0, now_ns + self._rng.randint(-20, 20) * 1_000_000_000))

    def _frame(self, *good: str) -> str:
        return (
            self._rng.choice(good) if self._rng.random() < 0.97 else self._rng.choice(("", "map", "wörld", "x" * 300))
        )

    def _twist(self) -> Twist:
        linear, angular = self._numbers(3, 0.1), self._numbers(3, 0.5)
        twist = Twist()
        twist.linear.x, twist.linear.y, twist.linear.z = linear
        twist.angular.x, twist.angular.y, twist.angular.z = angular
        return twist

    def twist_command(self, now_ns: int) -> TwistStamped:
        message = TwistStamped(twist=self._twist())
        message.header.stamp, message.header.frame_id = self._stamp(now_ns), self._frame("world", "tool")
        return message

    def chunk(self, now_ns: int) -> MultiDOFJointTrajectory:
        message = MultiDOFJointTrajectory(joint_names=[TCP if self._rng.random() < 0.97 else "elbow"])
        message.header.stamp, message.header.frame_id = self._stamp(now_ns), self._frame("world")
        step = self._rng.choice((33_000_000, 33_000_000, 100_000_000, 0))
        for i in range(self._rng.choice((1, 8, 16, 0))):
            point = MultiDOFJointTrajectoryPoint(transforms=[Transform()], velocities=[self._twist()])
            point.time_from_start = to_duration(i * step)
            message.points.append(point)
        return message

    def pose_command(self, now_ns: int, at: np.ndarray, turn: np.ndarray) -> PoseStamped:
        message = PoseStamped()
        message.header.stamp, message.header.frame_id = self._stamp(now_ns), self._frame("world")
        position, orientation = message.pose.position, message.pose.orientation
        near = self._rng.random() < 0.7  # a near one can be reached, the others are mostly outside the box
        offset = self._numbers(3, 0.01 if near else 1.0)
        position.x, position.y, position.z = (float(a + b) for a, b in zip(at, offset, strict=True))
        q = turn if near else np.array(self._numbers(4, 1.0))
        orientation.x, orientation.y, orientation.z, orientation.w = (float(v) for v in q)
        return message

    def joint_command(self, now_ns: int, joints: np.ndarray) -> JointTrajectory:
        rng = self._rng
        names = [f"j{i + 1}" for i in range(6)]
        message = JointTrajectory(joint_names=names if rng.random() < 0.95 else names[: rng.randrange(6)])
        message.header.stamp = self._stamp(now_ns)
        time_s = 0.0
        for _ in range(rng.choice((1, 1, 2, 4, 0))):
            time_s += rng.choice((0.2, 0.5, 0.5, 0.001, -0.1))
            positions = [
                float(j + v) for j, v in zip(joints, self._numbers(6, rng.choice((0.02, 0.02, 3.0))), strict=True)
            ]
            point = JointTrajectoryPoint(positions=positions[: rng.choice((6, 6, 6, 6, 3))])
            point.time_from_start = to_duration(max(0, int(time_s * 1e9)))
            message.points.append(point)
        return message

    def gripper_command(self) -> Float64:
        return Float64(data=self._numbers(1, 1.0)[0])


@dataclass
class Limits:
    """What the arm's node was told."""

    linear_speed: float
    linear_acceleration: float
    angular_speed: float
    angular_acceleration: float
    period_s: float
    minimum: np.ndarray
    maximum: np.ndarray
    pose_speed: float
    pose_angular_speed: float
    joint_speeds: np.ndarray
    joint_lower: np.ndarray
    joint_upper: np.ndarray


@dataclass
class Verdict:
    """What reached the socket: messages by kind, and each one that is outside the limits."""

    frames: dict[str, int] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    top_speed: float = 0.0
    top_angular_speed: float = 0.0


def judge(commands: list[tuple[int, str, dict[str, Any]]], limits: Limits, arm: ArmKinematics) -> Verdict:
    """Check every message that asks the arm or the gripper for something."""
    verdict = Verdict()
    before: tuple[float, np.ndarray] | None = None
    for _, topic, message in commands:
        name = topic.removesuffix("/goal").rpartition("/")[2]
        verdict.frames[name] = verdict.frames.get(name, 0) + 1
        if topic == m.CARTESIAN_JOG:
            problem, before = _jog(message, before, limits, verdict)
        elif topic.endswith("/cancel"):
            problem = ""
        elif topic == f"{m.MOVE}/goal":
            problem = _move(message["goal"], limits)
        elif topic == f"{m.FOLLOW}/goal":
            problem = _follow(message["goal"]["trajectory"], limits, arm)
        elif topic.startswith("/devices/"):
            problem = _grip(message["goal"])
        else:
            problem = "a topic that nobody should use"
        if problem:
            verdict.outside.append(f"{topic}: {problem}")
    return verdict


def _jog(
    message: dict[str, Any], before: tuple[float, np.ndarray] | None, limits: Limits, verdict: Verdict
) -> tuple[str, tuple[float, np.ndarray]]:
    parts = [[message["twist"][part][axis] for axis in "xyz"] for part in ("linear", "angular")]
    twist = np.array(parts, dtype=np.float64)
    stamp = message["header"]["stamp"]
    sent_s = stamp["secs"] + stamp["nsecs"] * 1e-9
    now = (sent_s, twist)
    if not np.isfinite(twist).all():
        return f"not finite: {twist.tolist()}", now
    speeds = np.linalg.norm(twist, axis=1)
    verdict.top_speed, verdict.top_angular_speed = (
        max(verdict.top_speed, float(speeds[0])),
        max(verdict.top_angular_speed, float(speeds[1])),
    )
    tops = (limits.linear_speed, limits.angular_speed)
    if any(s > top * (1 + 1e-6) for s, top in zip(speeds, tops, strict=True)):
        return f"too fast: {speeds.tolist()}", now
    if before is not None:
        # An axis may slow down at once (a stop, a wall); faster only with the acceleration. A frame that is
        # overtaken by the next one before it is sent leaves two steps for one, hence the time between the frames.
        span = max(limits.period_s, sent_s - before[0]) + limits.period_s
        grown = np.where(np.abs(twist) > np.abs(before[1]), twist - before[1], 0.0)
        bounds = (limits.linear_acceleration * span, limits.angular_acceleration * span)
        for step, bound in zip(np.linalg.norm(grown, axis=1), bounds, strict=True):
            if step > bound * (1 + 1e-6) + TOLERANCE:
                return f"too sudden: from {before[1].tolist()} to {twist.tolist()} in {span:.4f} s", now
    return "", now


def _move(goal: dict[str, Any], limits: Limits) -> str:
    for motion in goal["motion_sequence"]:
        place = np.array([motion["pose"]["position"][axis] for axis in "xyz"], dtype=np.float64)
        turn = np.array([motion["pose"]["orientation"][axis] for axis in "xyzw"], dtype=np.float64)
        speed = motion["max_velocity"]
        if not (np.isfinite(place).all() and (place >= limits.minimum).all() and (place <= limits.maximum).all()):
            return f"outside the box: {place.tolist()}"
        if not abs(float(np.linalg.norm(turn)) - 1.0) < 1e-3:
            return f"no rotation: {turn.tolist()}"
        if not (0 < speed["linear"] <= limits.pose_speed and 0 < speed["angular"] <= limits.pose_angular_speed):
            return f"too fast: {speed}"
    return ""


def _follow(trajectory: dict[str, Any], limits: Limits, arm: ArmKinematics) -> str:
    last_s = 0.0
    last: np.ndarray | None = None
    for point in trajectory["points"]:
        joints = np.array(point["positions"], dtype=np.float64)
        at = point["time_from_start"]["secs"] + point["time_from_start"]["nsecs"] * 1e-9
        if joints.shape != (6,) or not np.isfinite(joints).all() or not at > last_s:
            return f"not a trajectory: {joints.tolist()} at {at}"
        if (joints < limits.joint_lower).any() or (joints > limits.joint_upper).any():
            return f"outside the joint limits: {joints.tolist()}"
        if last is not None and (np.abs(joints - last) / (at - last_s) > limits.joint_speeds * (1 + 1e-6)).any():
            return f"joints too fast: {joints.tolist()} after {last.tolist()} in {at - last_s} s"
        place = arm.forward(joints)[0]
        if (place < limits.minimum - TOLERANCE).any() or (place > limits.maximum + TOLERANCE).any():
            return f"outside the box: {place.tolist()}"
        last, last_s = joints, at
    return ""


def _grip(goal: dict[str, Any]) -> str:
    if "action" in goal:
        return "" if goal["action"] in (0, 1) else f"no action: {goal}"
    position = goal["command"]["position"]
    return "" if isinstance(position, float) and 0.0 <= position <= 1.0 else f"no opening: {position}"
