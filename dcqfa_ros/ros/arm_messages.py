"""Between ROS messages and the arrays of a six-axis arm's control loop."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped, Twist, TwistStamped, WrenchStamped
from numpy.typing import NDArray
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import (
    JointTrajectory,
    JointTrajectoryPoint,
    MultiDOFJointTrajectory,
    MultiDOFJointTrajectoryPoint,
)

from dcqfa_ros.drivers.arm_protocol import ArmState
from dcqfa_ros.ros.conversions import NS, TCP, MessageError, to_duration, to_time

Floats = NDArray[np.float64]

WORLD, TOOL, GRIPPER = "world", "tool", "gripper"
MAXIMUM_POINTS = 1024


def twist_chunk(message: MultiDOFJointTrajectory) -> tuple[Floats, int]:
    """Return twists (n, 6) in ``world`` and the action period in nanoseconds (0 for a single action).

    Raises:
        MessageError: wrong frame or joint, no points or too many, a point without exactly one velocity, uneven times.
    """
    if message.header.frame_id != WORLD:
        raise MessageError(f"chunk frame_id is {message.header.frame_id!r}, expected {WORLD!r}")
    if list(message.joint_names) != [TCP]:
        raise MessageError(f"chunk joint_names are {list(message.joint_names)}, expected [{TCP!r}]")
    points = message.points
    if not 0 < len(points) <= MAXIMUM_POINTS or any(len(p.velocities) != 1 for p in points):
        raise MessageError(f"chunk needs 1 to {MAXIMUM_POINTS} points, each with exactly one velocity")
    twists = np.array([_twist_of(p.velocities[0]) for p in points])
    return twists, _period(message)


def gripper_chunk(message: JointTrajectory) -> Floats:
    """Return openings (n,), 0 closed .. 1 open.

    Raises:
        MessageError: wrong joint, no points or too many, or a point without exactly one position.
    """
    if list(message.joint_names) != [GRIPPER]:
        raise MessageError(f"gripper chunk joint_names are {list(message.joint_names)}, expected [{GRIPPER!r}]")
    points = message.points
    if not 0 < len(points) <= MAXIMUM_POINTS or any(len(p.positions) != 1 for p in points):
        raise MessageError(f"gripper chunk needs 1 to {MAXIMUM_POINTS} points, each with exactly one position")
    _period(message)
    return np.array([p.positions[0] for p in points], dtype=np.float64)


def twist_chunk_message(stamp_ns: int, twists: NDArray[np.floating], period_ns: int) -> MultiDOFJointTrajectory:
    """Return a chunk of twists (n, 6) in ``world``; the stamp is that of the observation it was computed from."""
    message = MultiDOFJointTrajectory()
    message.header.stamp, message.header.frame_id = to_time(stamp_ns), WORLD
    message.joint_names = [TCP]
    for index, row in enumerate(twists.tolist()):
        twist = Twist()
        v, w = twist.linear, twist.angular
        v.x, v.y, v.z, w.x, w.y, w.z = row
        point = MultiDOFJointTrajectoryPoint(velocities=[twist], time_from_start=to_duration(index * period_ns))
        message.points.append(point)
    return message


def gripper_chunk_message(stamp_ns: int, openings: NDArray[np.floating], period_ns: int) -> JointTrajectory:
    """Return the gripper's part (n,) of a chunk, 0 closed .. 1 open."""
    message = JointTrajectory()
    message.header.stamp = to_time(stamp_ns)
    message.joint_names = [GRIPPER]
    for index, opening in enumerate(openings.tolist()):
        point = JointTrajectoryPoint(positions=[opening], time_from_start=to_duration(index * period_ns))
        message.points.append(point)
    return message


def _period(message: Any) -> int:
    times = [int(p.time_from_start.sec) * NS + int(p.time_from_start.nanosec) for p in message.points]
    period = times[1] - times[0] if len(times) > 1 else 0
    if times[0] != 0 or any(b - a != period for a, b in pairwise(times)) or (len(times) > 1 and period <= 0):
        raise MessageError("chunk time_from_start must begin at 0 and rise evenly")
    return period


def _twist_of(twist: Any) -> tuple[float, ...]:
    linear, angular = twist.linear, twist.angular
    return linear.x, linear.y, linear.z, angular.x, angular.y, angular.z


def twist_command(message: TwistStamped) -> tuple[Floats, bool]:
    """Return the twist (6,) and whether it is in the tool frame rather than in ``world``.

    Raises:
        MessageError: another frame.
    """
    frame = message.header.frame_id
    if frame not in (WORLD, TOOL):
        raise MessageError(f"twist frame_id is {frame!r}, expected {WORLD!r} or {TOOL!r}")
    return np.array(_twist_of(message.twist)), frame == TOOL


def pose_command(message: PoseStamped) -> tuple[Floats, Floats]:
    """Return position (3,) and quaternion (4,) of a pose in ``world``.

    Raises:
        MessageError: another frame.
    """
    if message.header.frame_id != WORLD:
        raise MessageError(f"pose frame_id is {message.header.frame_id!r}, expected {WORLD!r}")
    p, q = message.pose.position, message.pose.orientation
    return np.array([p.x, p.y, p.z]), np.array([q.x, q.y, q.z, q.w])


def joint_command(message: JointTrajectory, names: tuple[str, ...]) -> tuple[Floats, Floats]:
    """Return times (n,) s and positions (n, 6) rad in the order of ``names``.

    Raises:
        MessageError: other joints, no points or too many, or a point without a position per joint.
    """
    given = list(message.joint_names)
    if sorted(given) != sorted(names):
        raise MessageError(f"joint_names are {given}, expected {list(names)}")
    points = message.points
    if not 0 < len(points) <= MAXIMUM_POINTS or any(len(p.positions) != len(names) for p in points):
        raise MessageError(f"joint trajectory needs 1 to {MAXIMUM_POINTS} points with {len(names)} positions each")
    order = [given.index(name) for name in names]
    times = np.array([p.time_from_start.sec + p.time_from_start.nanosec / NS for p in points], dtype=np.float64)
    return times, np.array([[p.positions[i] for i in order] for p in points], dtype=np.float64)


def wrench_arrays(message: WrenchStamped) -> tuple[Floats, Floats]:
    """Return force (3,) N and torque (3,) N m."""
    f, t = message.wrench.force, message.wrench.torque
    return np.array([f.x, f.y, f.z]), np.array([t.x, t.y, t.z])


def wrench_message(stamp: Any, frame: str, force: Floats, torque: Floats) -> WrenchStamped:
    """Return a ``WrenchStamped``; ``stamp`` is a ``builtin_interfaces/Time``."""
    message = WrenchStamped()
    message.header.stamp, message.header.frame_id = stamp, frame
    f, t = message.wrench.force, message.wrench.torque
    f.x, f.y, f.z = (float(v) for v in force)
    t.x, t.y, t.z = (float(v) for v in torque)
    return message


def pose_message(stamp_ns: int, state: ArmState) -> PoseStamped:
    """Return the tool centre point's pose in ``world``."""
    message = PoseStamped()
    message.header.stamp, message.header.frame_id = to_time(stamp_ns), WORLD
    p, q = message.pose.position, message.pose.orientation
    p.x, p.y, p.z = (float(v) for v in state.position)
    q.x, q.y, q.z, q.w = (float(v) for v in state.orientation)
    return message


def twist_message(stamp_ns: int, linear: Floats, angular: Floats) -> TwistStamped:
    """Return a twist in ``world``."""
    message = TwistStamped()
    message.header.stamp, message.header.frame_id = to_time(stamp_ns), WORLD
    v, w = message.twist.linear, message.twist.angular
    v.x, v.y, v.z = (float(x) for x in linear)
    w.x, w.y, w.z = (float(x) for x in angular)
    return message


def joints_message(stamp_ns: int, names: tuple[str, ...], state: ArmState) -> JointState:
    """Return joint positions and velocities."""
    message = JointState()
    message.header.stamp = to_time(stamp_ns)
    message.name = list(names)
    message.position, message.velocity = state.joints.tolist(), state.joint_velocities.tolist()
    return message


def gripper_message(stamp_ns: int, opening: float) -> JointState:
    """Return the gripper's opening, 0 closed .. 1 open."""
    message = JointState()
    message.header.stamp = to_time(stamp_ns)
    message.name, message.position = [GRIPPER], [float(opening)]
    return message
