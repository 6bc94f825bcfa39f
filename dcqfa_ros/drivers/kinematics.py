"""Kinematics of six-axis arms: poses, Jacobian, and joint velocities or positions for a Cartesian demand.

Everything is in the frame ``world``, the foot of the arm, in metres, radians and seconds; quaternions are
(x, y, z, w). The figures of the three Inovo builds are in ``config/inovo_arm.yaml``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import find_config
from dcqfa_ros.rotations import quaternion_of, rotation_of, rotation_vector, transform

Floats = NDArray[np.float64]

JOINTS = 6
INOVO_CONFIG = "inovo_arm"
DAMPING = 0.02  # of the least squares near singular poses; below it a direction is given up rather than raced through


class KinematicsError(UserError, ValueError):
    """A build is unknown, a file does not describe an arm, or a pose cannot be reached."""


class ArmKinematics:
    """A chain of six revolute joints with a tool."""

    def __init__(
        self, name: str, before: Floats, flange: Floats, velocity_limits: ArrayLike, tool: Floats | None = None
    ) -> None:
        """Take the figures of a chain.

        Args:
            name: for messages.
            before: (6, 4, 4) fixed transforms, each from the frame of the joint before it (the foot for the first).
            flange: (4, 4) fixed transform from the last joint to the flange.
            velocity_limits: (6,) rad/s.
            tool: (4, 4) transform from the flange to the tool centre point.
        """
        self.name = name
        self.velocity_limits = np.array(velocity_limits, dtype=np.float64)
        self.velocity_limits.flags.writeable = False
        self.tool = np.eye(4) if tool is None else np.array(tool, dtype=np.float64)
        self._before = np.array(before, dtype=np.float64)
        self._flange = np.array(flange, dtype=np.float64)
        self._end = self._flange @ self.tool

    def with_tool(self, position: ArrayLike, orientation: ArrayLike = (0.0, 0.0, 0.0, 1.0)) -> ArmKinematics:
        """Return the same arm with its tool centre point at a pose given in the frame of the flange."""
        return ArmKinematics(
            self.name, self._before, self._flange, self.velocity_limits, transform(position, orientation)
        )

    def forward(self, joints: ArrayLike) -> tuple[Floats, Floats]:
        """Return position (..., 3) and rotation matrix (..., 3, 3) of the tool centre point for ``joints`` (..., 6)."""
        frames = self._frames(np.asarray(joints, dtype=np.float64))
        end = frames[-1] @ self._end
        return end[..., :3, 3], end[..., :3, :3]

    def flange(self, joints: ArrayLike) -> tuple[Floats, Floats]:
        """Return position (..., 3) and rotation matrix (..., 3, 3) of the flange."""
        end = self._frames(np.asarray(joints, dtype=np.float64))[-1] @ self._flange
        return end[..., :3, 3], end[..., :3, :3]

    def pose(self, joints: ArrayLike) -> tuple[Floats, Floats]:
        """Return position (3,) and quaternion (4,) of the tool centre point for ``joints`` (6,)."""
        position, rotation = self.forward(joints)
        return position, quaternion_of(rotation)

    def jacobian(self, joints: ArrayLike, point: ArrayLike | None = None) -> Floats:
        """Return the (6, 6) matrix from joint velocities to (linear m/s, angular rad/s) in ``world``.

        Args:
            joints: (6,) rad.
            point: (3,) m in ``world``, whose linear velocity is meant; the tool centre point by default.
        """
        frames = self._frames(np.asarray(joints, dtype=np.float64))
        stacked = np.array(frames)
        axes, origins = stacked[:, :3, 2], stacked[:, :3, 3]
        target = (frames[-1] @ self._end)[:3, 3] if point is None else np.asarray(point, dtype=np.float64)
        arm = target - origins
        result = np.empty((6, JOINTS))
        result[0] = axes[:, 1] * arm[:, 2] - axes[:, 2] * arm[:, 1]
        result[1] = axes[:, 2] * arm[:, 0] - axes[:, 0] * arm[:, 2]
        result[2] = axes[:, 0] * arm[:, 1] - axes[:, 1] * arm[:, 0]
        result[3:] = axes.T
        return result

    def joint_velocities(
        self, joints: ArrayLike, linear: ArrayLike, angular: ArrayLike, damping: float = DAMPING
    ) -> Floats:
        """Return joint velocities (6,) rad/s that come closest to a twist of the tool centre point in ``world``.

        Damped least squares (Nakamura and Hanafusa 1986): exact but for ``damping`` squared over the squares of the
        singular values. Where a joint would exceed its limit all are slowed alike, so the direction is kept.
        """
        jacobian = self.jacobian(joints)
        twist = np.concatenate((np.asarray(linear, dtype=np.float64), np.asarray(angular, dtype=np.float64)))
        velocities = _damped(jacobian, twist, damping)
        excess = float(np.max(np.abs(velocities) / self.velocity_limits))
        return velocities / excess if excess > 1.0 else velocities

    def inverse(
        self,
        position: ArrayLike,
        orientation: ArrayLike,
        start: ArrayLike,
        *,
        tolerance: float = 1e-6,
        iterations: int = 200,
    ) -> Floats:
        """Return joints (6,) that bring the tool centre point to a pose, found by descending from ``start``.

        Args:
            position: (3,) m.
            orientation: (4,) unit quaternion.
            start: (6,) rad; of several solutions the one that is downhill from here is found.
            tolerance: on position (m) and rotation (rad).
            iterations: after which the pose counts as out of reach.

        Raises:
            KinematicsError: the pose was not reached.
        """
        return self.inverse_of(position, rotation_of(orientation), start, tolerance=tolerance, iterations=iterations)

    def inverse_of(
        self, position: ArrayLike, rotation: Floats, start: ArrayLike, *, tolerance: float = 1e-6, iterations: int = 200
    ) -> Floats:
        """Return as :meth:`inverse` for an orientation given as rotation matrix (3, 3).

        Raises:
            KinematicsError: the pose was not reached.
        """
        target = np.asarray(position, dtype=np.float64)
        joints = np.array(start, dtype=np.float64)
        size = math.inf
        for _ in range(iterations):
            here, turned = self.forward(joints)
            error = np.concatenate((target - here, rotation_vector(rotation @ turned.T)))
            size = float(np.abs(error).max())
            if size < tolerance:
                return joints
            # The damping fades as the pose comes near, so that the last steps are Newton's.
            step = _damped(self.jacobian(joints), error, min(0.05, 0.5 * size))
            joints = joints + step * min(1.0, 0.5 / max(float(np.abs(step).max()), 1e-12))
        raise KinematicsError(
            f"{self.name}: the pose at {np.round(target, 4).tolist()} m was not reached from the present joints "
            f"(left: {size:.3g} m or rad): it is out of reach or behind a singular pose"
        )

    def _frames(self, joints: Floats) -> list[Floats]:
        """Return the transforms (..., 4, 4) from ``world`` to each joint after its rotation."""
        if joints.shape[-1:] != (JOINTS,):
            raise ValueError(f"{self.name}: joints: expected (..., {JOINTS}) rad, got shape {joints.shape}")
        cosine, sine = np.cos(joints)[..., None], np.sin(joints)[..., None]
        local = np.empty((*joints.shape, 4, 4))
        local[..., 2:] = self._before[..., 2:]
        local[..., 0] = cosine * self._before[..., 0] + sine * self._before[..., 1]
        local[..., 1] = cosine * self._before[..., 1] - sine * self._before[..., 0]
        frames = [local[..., 0, :, :]]
        for joint in range(1, JOINTS):
            frames.append(frames[-1] @ local[..., joint, :, :])
        return frames


def inovo_kinematics(variant: str) -> ArmKinematics:
    """Return the kinematics of an Inovo build: ``short``, ``medium`` or ``long``.

    Raises:
        KinematicsError: there is no such build.
    """
    return load_kinematics(find_config(INOVO_CONFIG), variant, f"Inovo arm, build {variant}")


@lru_cache(maxsize=16)
def load_kinematics(path: Path, build: str, name: str) -> ArmKinematics:
    """Read a build from a file such as ``config/inovo_arm.yaml``.

    Raises:
        KinematicsError: the file does not hold the build, or it is no chain of six joints about z.
    """
    document = yaml.safe_load(path.read_text())
    builds = [key for key, value in document.items() if isinstance(value, list) and key != "velocity_limits_rad_s"]
    if build not in builds:
        raise KinematicsError(f"{path}: there is no build {build!r}; expected one of {', '.join(builds)}")
    limits = np.asarray(document["velocity_limits_rad_s"], dtype=np.float64)
    before: list[Floats] = []
    pending = np.eye(4)
    for number, link in enumerate(document[build]):
        pending = pending @ _fixed(link, f"{path}: {build}[{number}]")
        if link["kind"] == "joint":
            before.append(pending)
            pending = np.eye(4)
    if len(before) != JOINTS or limits.shape != (JOINTS,):
        raise KinematicsError(f"{path}: {build}: expected {JOINTS} joints with velocity limits, got {len(before)}")
    return ArmKinematics(name, np.array(before), pending, limits)


def _fixed(link: dict[str, Any], where: str) -> Floats:
    if link.get("kind") not in ("fixed", "joint") or (link["kind"] == "joint" and link.get("axis") != [0, 0, 1]):
        raise KinematicsError(f"{where}: expected kind 'fixed', or 'joint' with axis [0, 0, 1], got {link}")
    roll, pitch, yaw = link["rpy"]
    result = np.eye(4)
    result[:3, :3] = _about(2, yaw) @ _about(1, pitch) @ _about(0, roll)  # fixed axes x, y, z, as in URDF
    result[:3, 3] = link["xyz"]
    return result


def _about(axis: int, angle: float) -> Floats:
    result = np.eye(3)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    result[first, first] = result[second, second] = math.cos(angle)
    result[second, first] = math.sin(angle)
    result[first, second] = -math.sin(angle)
    return result


def _damped(jacobian: Floats, demand: Floats, damping: float) -> Floats:
    system = jacobian @ jacobian.T
    system.flat[:: len(system) + 1] += damping * damping
    result: Floats = jacobian.T @ np.linalg.solve(system, demand)
    return result
