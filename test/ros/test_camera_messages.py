"""Intrinsics and frames of a camera as ROS messages."""

from __future__ import annotations

import numpy as np
import pytest
from builtin_interfaces.msg import Time

from dcqfa_ros.drivers.extrinsics import CameraPose
from dcqfa_ros.drivers.protocols import CameraExtrinsics, CameraIntrinsics
from dcqfa_ros.ros.camera_messages import camera_info, camera_transforms, transform_message

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def test_a_camera_without_calibration_says_so_with_zeros() -> None:
    info = camera_info(CameraIntrinsics(640, 480, 0.0, 0.0, 0.0, 0.0), "front_color_optical_frame")
    assert not any(info.k) and not any(info.p)
    assert (info.width, info.height) == (640, 480)


def test_distortion_travels_with_its_model() -> None:
    info = camera_info(CameraIntrinsics(8, 6, 7.0, 7.5, 4.0, 3.0, (0.1, 0.2, 0.3, 0.4), "equidistant"), "f")
    assert (list(info.d), info.distortion_model, info.k[4], info.p[5]) == (
        [0.1, 0.2, 0.3, 0.4],
        "equidistant",
        7.5,
        7.5,
    )


def test_frames_hang_together_as_the_calibration_says() -> None:
    pose = CameraPose(parent="flange", position=(0.0, -0.07, 0.03), orientation=(0, 0, 0, 1), status="nominal")
    frames = camera_transforms("wrist", pose, CameraExtrinsics(IDENTITY, (0.015, 0.0, 0.0)))
    assert [(parent, child) for parent, child, _ in frames] == [
        ("flange", "wrist_link"),
        ("wrist_link", "wrist_color_optical_frame"),
        ("wrist_color_optical_frame", "wrist_depth_optical_frame"),
    ]
    np.testing.assert_allclose(frames[0][2] @ frames[1][2], pose.matrix(), atol=1e-12)
    assert frames[2][2][:3, 3].tolist() == [0.015, 0.0, 0.0]
    forward = frames[1][2] @ np.array([0.0, 0.0, 1.0, 1.0])
    np.testing.assert_allclose(forward[:3], [1.0, 0.0, 0.0])  # the optical axis is the body's x


def test_without_a_pose_the_camera_is_attached_to_nothing() -> None:
    assert [parent for parent, _, _ in camera_transforms("front", None, None)] == ["front_link"]


def test_a_transform_becomes_its_message() -> None:
    matrix = camera_transforms("front", None, None)[0][2]
    message = transform_message("a", "b", matrix, Time(sec=3, nanosec=4))
    r = message.transform.rotation
    assert (message.header.frame_id, message.child_frame_id, message.header.stamp.sec) == ("a", "b", 3)
    assert (r.x, r.y, r.z, r.w) == pytest.approx((-0.5, 0.5, -0.5, 0.5))
