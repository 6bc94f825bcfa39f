"""Between ROS messages and the arrays of the runtime: stamps and clocks, poses, chunks, key-value status messages.

ROS messages carry metres and radians; a bundle carries its own units. ``units_per_metre`` (exact powers of two for the
simulated table) converts between them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import Pose, PoseArray, PoseStamped, Transform, TwistStamped, WrenchStamped
from numpy.typing import ArrayLike, NDArray
from rclpy.clock import Clock, ROSClock
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import MultiDOFJointTrajectory, MultiDOFJointTrajectoryPoint

from dcqfa_ros.runtime.consumption import Report

NS = 1_000_000_000
TCP = "tcp"


class MessageError(ValueError):
    """A message that does not hold what its topic promises; the message names the field."""


def to_time(stamp_ns: int) -> Time:
    """Nanoseconds since the clock's origin to ``builtin_interfaces/Time``."""
    return Time(sec=stamp_ns // NS, nanosec=stamp_ns % NS)


def from_time(stamp: Time) -> int:
    """``builtin_interfaces/Time`` to nanoseconds."""
    return int(stamp.sec) * NS + int(stamp.nanosec)


def at_monotonic(clock: Clock, monotonic_ns: int) -> int:
    """Return what a node's clock showed at an instant of the monotonic clock; with simulated time, what it shows now.

    Both in nanoseconds. Nodes have no clock but ROS' and the system's. Cheaper than ``Clock.now``, which takes 0.1 ms
    after a pause.
    """
    simulated = isinstance(clock, ROSClock) and clock.ros_time_is_active
    # Else it is the system's clock.
    return int(clock.now().nanoseconds) if simulated else time.time_ns() - (time.monotonic_ns() - monotonic_ns)


def to_duration(duration_ns: int) -> Duration:
    """Nanoseconds to ``builtin_interfaces/Duration``."""
    return Duration(sec=duration_ns // NS, nanosec=duration_ns % NS)


def planar_pose(xy: ArrayLike, units_per_metre: float) -> Pose:
    """A pose at (x, y) on the table, identity orientation."""
    x, y = np.asarray(xy, dtype=np.float64)
    pose = Pose()
    pose.position.x, pose.position.y = float(x) / units_per_metre, float(y) / units_per_metre
    pose.orientation.w = 1.0
    return pose


def planar_pose_message(stamp_ns: int, frame: str, xy: ArrayLike, units_per_metre: float) -> PoseStamped:
    """Tool position (2,) in bundle units as ``PoseStamped`` in metres."""
    message = PoseStamped()
    message.header.stamp, message.header.frame_id = to_time(stamp_ns), frame
    message.pose = planar_pose(xy, units_per_metre)
    return message


def points_message(stamp_ns: int, frame: str, points: NDArray[np.floating], units_per_metre: float) -> PoseArray:
    """Key points (N, 2) in bundle units as ``PoseArray`` in metres."""
    message = PoseArray()
    message.header.stamp, message.header.frame_id = to_time(stamp_ns), frame
    message.poses = [planar_pose(point, units_per_metre) for point in points]
    return message


def joint_state_message(stamp_ns: int, names: Sequence[str], positions: ArrayLike) -> JointState:
    """Joint positions in metres or radians."""
    message = JointState()
    message.header.stamp = to_time(stamp_ns)
    message.name, message.position = list(names), np.asarray(positions, dtype=np.float64).tolist()
    return message


def observation_array(message: Any, shape: tuple[int, ...], units_per_metre: float) -> NDArray[np.float64]:
    """Value of a low-dimensional observation message in bundle units.

    Args:
        message: ``PoseStamped`` for shape (2,) or (3,) positions, or (7,) position and quaternion x y z w;
            ``PoseArray`` for (N, 2) or (N, 3) points, ``JointState`` for (N,) joint positions, ``WrenchStamped`` for
            (6,) force and torque, ``TwistStamped`` for (6,) linear and angular velocity.
        shape: the bundle's shape of the key.
        units_per_metre: scale from the message's units, metres for one (1.0 where the bundle has the same).

    Raises:
        MessageError: the message has another number of values than ``shape``, or a type that is not supported.
    """
    if isinstance(message, PoseStamped):
        p, q = message.pose.position, message.pose.orientation
        values = np.array([p.x, p.y, p.z, q.x, q.y, q.z, q.w] if shape == (7,) else [p.x, p.y, p.z][: shape[-1]])
    elif isinstance(message, PoseArray):
        values = np.array([[q.position.x, q.position.y, q.position.z][: shape[-1]] for q in message.poses])
    elif isinstance(message, JointState):
        values = np.array(message.position, dtype=np.float64)
    elif isinstance(message, WrenchStamped | TwistStamped):
        first, second = _vectors(message)
        values = np.array([first.x, first.y, first.z, second.x, second.y, second.z])
    else:
        raise MessageError(f"{type(message).__name__} cannot be read as a low-dimensional observation")
    if values.shape != shape:
        raise MessageError(f"{type(message).__name__} holds values of shape {values.shape}, the bundle expects {shape}")
    return values * units_per_metre


def _vectors(message: Any) -> tuple[Any, Any]:
    if isinstance(message, WrenchStamped):
        return message.wrench.force, message.wrench.torque
    return message.twist.linear, message.twist.angular


def planar_chunk_message(
    stamp_ns: int, frame: str, actions: NDArray[np.floating], period_ns: int, units_per_metre: float
) -> MultiDOFJointTrajectory:
    """A chunk of planar positions (n, 2) in bundle units; the stamp is that of the observation it was computed from."""
    message = MultiDOFJointTrajectory()
    message.header.stamp, message.header.frame_id = to_time(stamp_ns), frame
    message.joint_names = [TCP]
    for index, action in enumerate(actions):
        transform = Transform()
        transform.translation.x = float(action[0]) / units_per_metre
        transform.translation.y = float(action[1]) / units_per_metre
        transform.rotation.w = 1.0
        point = MultiDOFJointTrajectoryPoint(transforms=[transform])
        point.time_from_start = to_duration(index * period_ns)
        message.points.append(point)
    return message


def planar_chunk_actions(
    message: MultiDOFJointTrajectory, frame: str, units_per_metre: float
) -> tuple[NDArray[np.float64], int]:
    """Actions (n, 2) in bundle units and the action period in nanoseconds (0 for a single action).

    Raises:
        MessageError: wrong frame, wrong joint, no points, a point without exactly one transform, or uneven times.
    """
    if message.header.frame_id != frame:
        raise MessageError(f"chunk frame_id is {message.header.frame_id!r}, expected {frame!r}")
    if list(message.joint_names) != [TCP]:
        raise MessageError(f"chunk joint_names are {list(message.joint_names)}, expected [{TCP!r}]")
    if not message.points or any(len(p.transforms) != 1 for p in message.points):
        raise MessageError("chunk needs at least one point, each with exactly one transform")
    actions = np.array([(p.transforms[0].translation.x, p.transforms[0].translation.y) for p in message.points])
    times = [int(p.time_from_start.sec) * NS + int(p.time_from_start.nanosec) for p in message.points]
    period = times[1] - times[0] if len(times) > 1 else 0
    if times[0] != 0 or any(b - a != period for a, b in pairwise(times)) or (len(times) > 1 and period <= 0):
        raise MessageError("chunk time_from_start must begin at 0 and rise evenly")
    return actions * units_per_metre, period


def status_message(stamp_ns: int, name: str, level: int, text: str, values: Mapping[str, object]) -> DiagnosticArray:
    """One key-value status as ``DiagnosticArray`` (the project's form of events and of structured state)."""
    status = DiagnosticStatus(name=name, level=bytes([level]), message=text, hardware_id="")
    status.values = [KeyValue(key=key, value=_text(value)) for key, value in values.items()]
    message = DiagnosticArray(status=[status])
    message.header.stamp = to_time(stamp_ns)
    return message


def consumption_message(report: Report) -> DiagnosticArray:
    """What the arm has consumed of its chunks (interface ``consumption``)."""
    values = {
        "episode": report.episode,
        "consumed": report.consumed,
        "begun": report.begun_ns,
        "buffered": report.buffered,
        "starved_ticks": report.starved,
    }
    if report.next_ns is not None:
        values["next"] = report.next_ns
    return status_message(report.stamp_ns, "consumption", 0, "actions consumed", values)


def consumption_report(message: DiagnosticArray) -> Report:
    """Read what :func:`consumption_message` wrote.

    Raises:
        MessageError: a value is missing, no whole number, or negative.
    """
    values = status_values(message)
    try:
        numbers = [int(values[key]) for key in ("episode", "consumed", "begun", "buffered", "starved_ticks")]
        following = int(values["next"]) if "next" in values else None
    except (KeyError, ValueError) as error:
        raise MessageError(f"consumption of the arm: {error!r}") from error
    if min(numbers) < 0 or (following or 0) < 0:
        raise MessageError(f"consumption of the arm holds a negative number: {values}")
    episode, consumed, begun, buffered, starved = numbers
    return Report(episode, from_time(message.header.stamp), consumed, begun, buffered, starved, following)


def status_values(message: DiagnosticArray) -> dict[str, str]:
    """Key-value pairs of the first status.

    Raises:
        MessageError: the message holds no status.
    """
    if not message.status:
        raise MessageError("DiagnosticArray without a status")
    return {pair.key: pair.value for pair in message.status[0].values}


def _text(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)
