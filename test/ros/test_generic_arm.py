"""Any arm behind topics, as a driver: what is published, when a move has ended, and that a stop is the last word."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dcqfa_ros.drivers.arm_protocol import ArmReadiness, MotionOutcome
from dcqfa_ros.drivers.kinematics import inovo_kinematics
from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.ros.generic_arm import Outputs, TopicArm
from dcqfa_ros.safety.joint_limits import INOVO_JOINT_SPEEDS, JointLimits
from dcqfa_ros.sim.inovo_motion import HOME

ARM = inovo_kinematics("short")
HERE = np.array(HOME, dtype=float)
NONE, ZERO = np.zeros(3), np.zeros(6)


class Controllers:
    """What an arm's controllers hear, and the arm in front of them."""

    def __init__(self, by_twist: bool = True) -> None:
        self.velocities: list[np.ndarray] = []
        self.trajectories: list[tuple[np.ndarray, np.ndarray]] = []

        def trajectory(times_s: np.ndarray, positions: np.ndarray) -> None:
            self.trajectories.append((times_s, positions))

        def twist(linear: np.ndarray, angular: np.ndarray) -> None:
            self.velocities.append(np.concatenate([linear, angular]))

        self.arm = TopicArm(
            ARM, Outputs(twist if by_twist else None, None if by_twist else self.velocities.append, trajectory)
        )
        self.at(HERE)

    def at(self, joints: np.ndarray, age_s: float = 0.0) -> None:
        self.arm.feed(joints, ZERO, time.monotonic_ns() - round(age_s * 1e9))


def test_twists_are_sent_only_between_start_and_stop() -> None:
    controllers = Controllers()
    arm = controllers.arm
    with pytest.raises(DriverError, match="start_streaming"):
        arm.send_twist(np.array([0.1, 0.0, 0.0]), NONE)
    arm.start_streaming()
    arm.send_twist(np.array([0.1, 0.0, 0.0]), np.array([0.0, 0.0, 0.2]))
    arm.stop()
    assert [v.tolist() for v in controllers.velocities] == [[0] * 6, [0.1, 0, 0, 0, 0, 0.2], [0] * 6]
    with pytest.raises(DriverError, match="start_streaming"):
        arm.send_twist(np.array([0.1, 0.0, 0.0]), NONE)


def test_joint_velocities_are_those_that_were_limited_also_near_a_singular_posture() -> None:
    controllers = Controllers(by_twist=False)
    limits = JointLimits(ARM, INOVO_JOINT_SPEEDS, [-6.2] * 6, [6.2] * 6)
    controllers.arm.start_streaming()
    for bend in (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0):
        joints = np.array([0.3, 0.2, bend, 0.1, bend, 0.0])
        controllers.at(joints)
        twist = np.array([0.1, -0.05, 0.1, 0.2, 0.1, -0.3])
        twist *= limits.factor(joints, twist)
        controllers.arm.send_twist(twist[:3], twist[3:])
        np.testing.assert_allclose(controllers.velocities[-1], limits.joint_speeds(joints, twist), atol=1e-9)
        assert (np.abs(controllers.velocities[-1]) <= np.array(INOVO_JOINT_SPEEDS) * (1 + 1e-6)).all()


def test_a_pose_is_approached_on_a_straight_line_within_its_speeds() -> None:
    controllers = Controllers()
    start, orientation = ARM.pose(HERE)
    goal = start + np.array([0.06, 0.0, 0.03])
    motion = controllers.arm.move_to_pose(goal, orientation, speed=0.05, angular_speed=0.3)
    ((times, rows),) = controllers.trajectories
    places = np.vstack([start, ARM.forward(rows)[0]])
    assert places[-1] == pytest.approx(goal, abs=1e-5)
    line = (goal - start) / np.linalg.norm(goal - start)
    off = (places - start) - np.outer((places - start) @ line, line)
    assert np.abs(off).max() < 1e-5
    speeds = np.linalg.norm(np.diff(places, axis=0), axis=1) / np.diff(times, prepend=0.0)
    assert speeds.max() <= 0.05 * 1.001 and speeds[0] < 0.03 and speeds[-1] < 0.03, "eased at both ends"
    assert not motion.done()
    with pytest.raises(TimeoutError):
        motion.result(0.0)


def test_a_move_has_ended_when_the_joints_show_it_and_is_not_held_after_that() -> None:
    controllers = Controllers()
    goal = HERE + 0.05
    motion = controllers.arm.follow_joints(np.array([0.1]), goal[None])

    def done() -> bool:
        controllers.at(goal)
        return motion.done()

    end = time.monotonic() + 20.0
    while not done() and time.monotonic() < end:
        time.sleep(0.01)
    assert motion.result(0.0).outcome is MotionOutcome.SUCCEEDED
    controllers.arm.stop()
    assert len(controllers.trajectories) == 1


def test_a_stop_holds_the_arm_where_it_is() -> None:
    controllers = Controllers()
    motion = controllers.arm.follow_joints(np.array([10.0]), (HERE + 1.0)[None])
    controllers.at(HERE + 0.02)
    controllers.arm.stop()
    times, rows = controllers.trajectories[-1]
    assert times.tolist() == [0.1] and rows[0] == pytest.approx(HERE + 0.02)
    assert motion.result(0.0).outcome is MotionOutcome.CANCELLED
    controllers.arm.stop()
    motion.cancel()
    assert len(controllers.trajectories) == 2, "held once"


def test_an_arm_whose_joint_states_are_old_is_held_where_its_trajectory_has_brought_it() -> None:
    controllers = Controllers()
    controllers.at(HERE, age_s=0.4)
    motion = controllers.arm.follow_joints(np.array([2.0]), (HERE + 1.0)[None])
    begun = motion._begun_s
    motion._begun_s -= 1.0  # a second has passed
    controllers.arm.stop()
    held = controllers.trajectories[-1][1][0]
    share = (time.monotonic() - begun + 1.0 + 0.05) / 2.0
    assert (held > HERE + 0.5).all() and (held <= HERE + min(1.0, share)).all()


def test_a_lost_arm_is_told_to_stop_all_the_same() -> None:
    controllers = Controllers()
    motion = controllers.arm.follow_joints(np.array([2.0]), (HERE + 1.0)[None])
    controllers.at(HERE, age_s=0.6)
    assert controllers.arm.state().readiness is ArmReadiness.DISCONNECTED
    assert motion.result(0.0).outcome is MotionOutcome.LOST
    controllers.arm.stop()
    assert len(controllers.trajectories) == 2


def test_nothing_that_was_decided_on_before_a_stop_begins() -> None:
    controllers = Controllers()
    arm = controllers.arm
    since = arm.stops
    arm.stop()
    orientation = ARM.pose(HERE)[1]
    with pytest.raises(DriverError, match="stopped meanwhile"):
        arm.follow_joints(np.array([1.0]), HERE[None], since=since)
    with pytest.raises(DriverError, match="stopped meanwhile"):
        arm.move_to_pose(ARM.pose(HERE)[0], orientation, speed=0.05, angular_speed=0.3, since=since)
    assert not controllers.trajectories


def test_what_cannot_be_is_refused_by_name() -> None:
    controllers = Controllers()
    arm = controllers.arm
    with pytest.raises(DriverError, match="allow more time"):
        arm.follow_joints(np.array([0.01]), (HERE + 1.0)[None])
    with pytest.raises(DriverError, match="out of reach"):
        arm.move_to_pose(np.array([0.0, 5.0, 0.0]), ARM.pose(HERE)[1], speed=1.0, angular_speed=1.0)
    with pytest.raises(DriverError, match="no gripper"):
        arm.move_gripper(0.5)
    controllers.at(np.full(6, np.nan))
    assert arm.state().joints == pytest.approx(HERE), "not finite is as good as none"
    with pytest.raises(ValueError, match="one output"):
        TopicArm(ARM, Outputs(None, None, lambda *_: None))
    silent = TopicArm(ARM, Outputs(lambda *_: None, None, lambda *_: None))
    with pytest.raises(DriverError, match="input/joint_states"):
        silent.start_streaming()
