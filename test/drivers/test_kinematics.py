"""Kinematics of the Inovo builds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcqfa_ros.drivers.kinematics import KinematicsError, inovo_kinematics, load_kinematics
from dcqfa_ros.rotations import rotation_of, rotation_vector

HOME = np.array([0.0, 0.0, np.pi / 2, 0.0, np.pi / 2, np.pi])
BUILDS = ("short", "medium", "long")
JOINTS = arrays(np.float64, 6, elements=st.floats(-3.0, 3.0))


def test_the_short_build_has_its_flange_where_the_maker_says_with_the_tool_down() -> None:
    position, rotation = inovo_kinematics("short").forward(HOME)
    np.testing.assert_allclose(position, [0.0, 0.400, 0.457], atol=5e-4)
    np.testing.assert_allclose(rotation[:, 2], [0.0, 0.0, -1.0], atol=1e-6)
    np.testing.assert_array_equal(inovo_kinematics("short").velocity_limits, [1.8, 1.8, 2.5, 2.6, 3.3, 3.3])


def test_the_longer_builds_reach_farther() -> None:
    stretched = np.zeros(6)
    reach = [float(np.linalg.norm(inovo_kinematics(build).forward(stretched)[0])) for build in BUILDS]
    assert reach[0] < reach[1] < reach[2]


@settings(max_examples=40, deadline=None)
@given(JOINTS, st.sampled_from(BUILDS))
def test_the_jacobian_is_the_derivative_of_the_pose(joints: np.ndarray, build: str) -> None:
    arm = inovo_kinematics(build).with_tool((0.02, -0.01, 0.17), (0.0, 0.1, 0.0, 0.99))
    jacobian, step = arm.jacobian(joints), 1e-6
    for joint in range(6):
        change = step * np.eye(6)[joint]
        before, turned_before = arm.forward(joints - change)
        after, turned_after = arm.forward(joints + change)
        np.testing.assert_allclose(jacobian[:3, joint], (after - before) / (2 * step), atol=1e-6)
        turn = rotation_vector(turned_after @ turned_before.T) / (2 * step)
        np.testing.assert_allclose(jacobian[3:, joint], turn, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(JOINTS)
def test_the_jacobian_of_another_point_belongs_to_a_tool_that_ends_there(joints: np.ndarray) -> None:
    arm = inovo_kinematics("short")
    tool = arm.with_tool((0.0, 0.05, 0.2))
    np.testing.assert_allclose(arm.jacobian(joints, tool.forward(joints)[0]), tool.jacobian(joints), atol=1e-12)


def test_many_configurations_at_once_are_those_one_by_one() -> None:
    arm = inovo_kinematics("medium")
    joints = np.random.default_rng(0).uniform(-3, 3, (5, 2, 6))
    positions, rotations = arm.forward(joints)
    for index in np.ndindex(5, 2):
        position, rotation = arm.forward(joints[index])
        np.testing.assert_allclose(positions[index], position, atol=1e-14)
        np.testing.assert_allclose(rotations[index], rotation, atol=1e-14)


def test_joint_velocities_give_the_twist_where_no_limit_is_met() -> None:
    arm = inovo_kinematics("short")
    linear, angular = np.array([0.02, -0.01, 0.03]), np.array([0.05, 0.0, -0.1])
    velocities = arm.joint_velocities(HOME, linear, angular, damping=1e-4)
    np.testing.assert_allclose(arm.jacobian(HOME) @ velocities, np.concatenate((linear, angular)), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(JOINTS, arrays(np.float64, 6, elements=st.floats(-50.0, 50.0)))
def test_no_joint_is_ever_faster_than_its_limit_nor_undefined(joints: np.ndarray, twist: np.ndarray) -> None:
    arm = inovo_kinematics("short")
    velocities = arm.joint_velocities(joints, twist[:3], twist[3:])
    assert np.isfinite(velocities).all()
    assert (np.abs(velocities) <= arm.velocity_limits * (1 + 1e-9)).all()


def test_a_demand_beyond_the_limits_is_slowed_in_its_direction() -> None:
    arm = inovo_kinematics("short")
    slow = arm.joint_velocities(HOME, (0.1, 0.0, 0.0), (0.0, 0.0, 0.0))
    fast = arm.joint_velocities(HOME, (100.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    np.testing.assert_allclose(fast / np.linalg.norm(fast), slow / np.linalg.norm(slow), atol=1e-9)
    assert np.isclose(np.max(np.abs(fast) / arm.velocity_limits), 1.0)


@settings(max_examples=25, deadline=None)
@given(arrays(np.float64, 6, elements=st.floats(-0.4, 0.4)), st.sampled_from(BUILDS))
def test_joints_found_for_a_pose_reach_it(change: np.ndarray, build: str) -> None:
    arm = inovo_kinematics(build)
    position, orientation = arm.pose(HOME + change)
    joints = arm.inverse(position, orientation, HOME)
    reached, rotation = arm.forward(joints)
    np.testing.assert_allclose(reached, position, atol=1e-6)
    np.testing.assert_allclose(rotation, rotation_of(orientation), atol=1e-5)


def test_a_pose_out_of_reach_is_refused() -> None:
    with pytest.raises(KinematicsError, match="out of reach"):
        inovo_kinematics("short").inverse([3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], HOME)


def test_wrong_builds_files_and_shapes_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(KinematicsError, match=r"'tall'.*short, medium, long"):
        inovo_kinematics("tall")
    with pytest.raises(ValueError, match=r"joints: expected .* shape \(5,\)"):
        inovo_kinematics("short").forward(np.zeros(5))
    path = tmp_path / "arm.yaml"
    path.write_text(
        "velocity_limits_rad_s: [1, 1, 1, 1, 1, 1]\nmine:\n  - {kind: fixed, xyz: [0, 0, 0], rpy: [0, 0, 0]}\n"
    )
    with pytest.raises(KinematicsError, match="6 joints"):
        load_kinematics(path, "mine", "mine")
    path.write_text(
        "velocity_limits_rad_s: [1]\nmine:\n  - {kind: joint, axis: [1, 0, 0], xyz: [0, 0, 0], rpy: [0, 0, 0]}\n"
    )
    with pytest.raises(KinematicsError, match=r"mine\[0\].*axis"):
        load_kinematics(path, "mine", "other")
