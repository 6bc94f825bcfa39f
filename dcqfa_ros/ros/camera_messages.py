"""Messages beside a camera's pictures: intrinsics, and where the camera is."""

from __future__ import annotations

from typing import Any

import numpy as np
from geometry_msgs.msg import TransformStamped
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo

from dcqfa_ros.drivers.extrinsics import CameraPose
from dcqfa_ros.drivers.protocols import CameraExtrinsics, CameraIntrinsics
from dcqfa_ros.rotations import quaternion_of

OPTICAL_IN_LINK = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""An optical frame (x right, y down, z forward) in its body frame (x forward, y left, z up), REP 103."""


def camera_info(intrinsics: CameraIntrinsics, frame_id: str) -> CameraInfo:
    """Return the message of a pinhole camera; K is all zero where it was never calibrated, as CameraInfo says."""
    i = intrinsics
    message = CameraInfo()
    message.header.frame_id = frame_id
    message.width, message.height = i.width, i.height
    message.distortion_model = i.model
    message.d = list(i.distortion) or [0.0] * (4 if i.model == "equidistant" else 5)
    message.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    if i.calibrated:
        message.k = [i.fx, 0.0, i.cx, 0.0, i.fy, i.cy, 0.0, 0.0, 1.0]
        message.p = [i.fx, 0.0, i.cx, 0.0, 0.0, i.fy, i.cy, 0.0, 0.0, 0.0, 1.0, 0.0]
    return message


def camera_transforms(
    camera: str, pose: CameraPose | None, depth: CameraExtrinsics | None
) -> list[tuple[str, str, NDArray[np.float64]]]:
    """Return (parent frame, child frame, (4, 4) pose of the child in its parent, m) of a camera's frames.

    ``<camera>_link`` is the body frame of the color camera; its pose in the cell is known only with ``pose``.

    Args:
        camera: name of the camera.
        pose: its color optical frame in the cell, from the calibration file; None leaves the camera unattached.
        depth: depth to color as the device reports it; None without depth.
    """
    link, optical = f"{camera}_link", f"{camera}_color_optical_frame"
    frames = [(link, optical, OPTICAL_IN_LINK)]
    if pose is not None:
        frames.insert(0, (pose.parent, link, pose.matrix() @ np.linalg.inv(OPTICAL_IN_LINK)))
    if depth is not None:
        matrix = np.eye(4)
        matrix[:3, :3] = np.reshape(depth.rotation, (3, 3))
        matrix[:3, 3] = depth.translation
        frames.append((optical, f"{camera}_depth_optical_frame", matrix))
    return frames


def transform_message(parent: str, child: str, matrix: NDArray[np.float64], stamp: Any) -> TransformStamped:
    """Return the message of one transform; ``stamp`` is a ``builtin_interfaces/Time``."""
    message = TransformStamped()
    message.header.stamp, message.header.frame_id, message.child_frame_id = stamp, parent, child
    t, r = message.transform.translation, message.transform.rotation
    t.x, t.y, t.z = (float(v) for v in matrix[:3, 3])
    r.x, r.y, r.z, r.w = quaternion_of(matrix[:3, :3]).tolist()
    return message
