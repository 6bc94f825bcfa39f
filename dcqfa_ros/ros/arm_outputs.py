"""Topics of an arm behind ROS 2 controllers: what :class:`~dcqfa_ros.ros.generic_arm.TopicArm` is wired to."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from dcqfa_ros.drivers.kinematics import ArmKinematics
from dcqfa_ros.errors import UserError
from dcqfa_ros.ros.arm_messages import twist_message
from dcqfa_ros.ros.conversions import to_duration
from dcqfa_ros.ros.generic_arm import Outputs, TopicArm
from dcqfa_ros.ros.node import ManagedNode

Floats = NDArray[np.float64]


def make_topic_arm(node: ManagedNode, kinematics: ArmKinematics) -> TopicArm:
    """Return the driver of an arm behind topics, with its publishers and its subscription.

    Raises:
        UserError: ``ros.joint_names`` are not six different names.
    """
    names = list(node.parameter("ros.joint_names"))
    if len(names) != 6 or len(set(names)) != 6:
        raise UserError(f"parameter ros.joint_names is {names}: expected six different names")
    by_twist = node.parameter("ros.output") == "twist"
    trajectories = node.create_interface_publisher("output_trajectory")
    velocities = node.create_interface_publisher("output_twist" if by_twist else "output_joint_velocity")

    def send_twist(linear: Floats, angular: Floats) -> None:
        velocities.publish(twist_message(node.get_clock().now().nanoseconds, linear, angular))

    def send_joint_velocity(speeds: Floats) -> None:
        velocities.publish(Float64MultiArray(data=speeds.tolist()))

    def send_trajectory(times_s: Floats, positions: Floats) -> None:
        # No stamp: it begins when it arrives, whatever the clocks say.
        message = JointTrajectory(joint_names=names)
        for seconds, row in zip(times_s, positions, strict=True):
            point = JointTrajectoryPoint(positions=row.tolist())
            point.time_from_start = to_duration(round(float(seconds) * 1e9))
            message.points.append(point)
        trajectories.publish(message)

    outputs = Outputs(send_twist if by_twist else None, None if by_twist else send_joint_velocity, send_trajectory)
    arm = TopicArm(kinematics, outputs)

    def on_joints(message: Any) -> None:
        index = {name: i for i, name in enumerate(message.name)}
        # Other devices may share the topic: a message without all of the arm's joints is not about the arm.
        if all(name in index and index[name] < len(message.position) for name in names):
            positions = np.array([message.position[index[n]] for n in names])
            moving = len(message.velocity) == len(message.name)
            speeds = np.array([message.velocity[index[n]] for n in names]) if moving else np.zeros(6)
            arm.feed(positions, speeds, time.monotonic_ns())

    node.create_guarded_subscription("input_joint_states", on_joints)
    return arm
