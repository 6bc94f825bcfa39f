"""Messages of a six-axis arm: what they hold comes through, what they should not hold is refused by field."""

from __future__ import annotations

import numpy as np
import pytest
from geometry_msgs.msg import Twist
from trajectory_msgs.msg import (
    JointTrajectory,
    JointTrajectoryPoint,
    MultiDOFJointTrajectory,
    MultiDOFJointTrajectoryPoint,
)

from dcqfa_ros.ros.arm_messages import (
    gripper_chunk,
    joint_command,
    pose_command,
    pose_message,
    twist_chunk,
    twist_command,
    twist_message,
    wrench_arrays,
    wrench_message,
)
from dcqfa_ros.ros.conversions import MessageError, to_duration, to_time

NAMES = ("j1", "j2", "j3", "j4", "j5", "j6")


def chunk(n: int, period_ns: int = 33_333_333) -> MultiDOFJointTrajectory:
    message = MultiDOFJointTrajectory(joint_names=["tcp"])
    message.header.frame_id = "world"
    for i in range(n):
        twist = Twist()
        twist.linear.y, twist.angular.z = float(i), -float(i)
        point = MultiDOFJointTrajectoryPoint(velocities=[twist], time_from_start=to_duration(i * period_ns))
        message.points.append(point)
    return message


def test_a_chunk_of_twists_keeps_rows_and_period() -> None:
    twists, period = twist_chunk(chunk(3))
    assert period == 33_333_333
    assert twists.tolist() == [[0, i, 0, 0, 0, -i] for i in range(3)]
    assert twist_chunk(chunk(1))[1] == 0


def test_chunks_that_are_none_are_refused_by_field() -> None:
    wrong = chunk(2)
    wrong.header.frame_id = "table"
    with pytest.raises(MessageError, match="frame_id is 'table'"):
        twist_chunk(wrong)
    wrong = chunk(2)
    wrong.joint_names = ["elbow"]
    with pytest.raises(MessageError, match="joint_names"):
        twist_chunk(wrong)
    wrong = chunk(2)
    wrong.points[1].velocities = []
    with pytest.raises(MessageError, match="exactly one velocity"):
        twist_chunk(wrong)
    with pytest.raises(MessageError, match="1 to 1024 points"):
        twist_chunk(chunk(0))
    with pytest.raises(MessageError, match="rise evenly"):
        twist_chunk(chunk(3, 0))


def test_the_grippers_part_of_a_chunk() -> None:
    message = JointTrajectory(joint_names=["gripper"])
    message.points = [JointTrajectoryPoint(positions=[0.5], time_from_start=to_duration(i)) for i in range(2)]
    assert gripper_chunk(message).tolist() == [0.5, 0.5]
    message.points[0].positions = [0.1, 0.2]
    with pytest.raises(MessageError, match="exactly one position"):
        gripper_chunk(message)
    message.joint_names = ["tcp"]
    with pytest.raises(MessageError, match="joint_names"):
        gripper_chunk(message)


def test_a_joint_trajectory_is_put_into_the_order_of_the_chain() -> None:
    message = JointTrajectory(joint_names=list(reversed(NAMES)))
    point = JointTrajectoryPoint(positions=[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], time_from_start=to_duration(1_500_000_000))
    message.points = [point]
    times, positions = joint_command(message, NAMES)
    assert times.tolist() == [1.5] and positions.tolist() == [[1, 2, 3, 4, 5, 6]]
    message.joint_names = ["j1"] * 6
    with pytest.raises(MessageError, match="joint_names"):
        joint_command(message, NAMES)


def test_twists_poses_and_wrenches_round_trip() -> None:
    message = twist_message(5, np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))
    twist, in_tool = twist_command(message)
    assert twist.tolist() == [1, 2, 3, 4, 5, 6] and not in_tool
    message.header.frame_id = "tool"
    assert twist_command(message)[1]
    message.header.frame_id = "map"
    with pytest.raises(MessageError, match="frame_id is 'map'"):
        twist_command(message)
    wrench = wrench_message(to_time(7), "tool", np.arange(3.0), np.arange(3.0, 6.0))
    force, torque = wrench_arrays(wrench)
    assert force.tolist() == [0, 1, 2] and torque.tolist() == [3, 4, 5]


def test_a_pose_is_read_as_it_is_written() -> None:
    class State:
        position = np.array([0.1, 0.2, 0.3])
        orientation = np.array([0.0, 0.6, 0.0, 0.8])

    position, orientation = pose_command(pose_message(1, State()))
    assert position.tolist() == [0.1, 0.2, 0.3] and orientation.tolist() == [0.0, 0.6, 0.0, 0.8]
