"""Position and velocity limits of the joints, applied to a twist of the tool centre point through the Jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.safety.cartesian_limits import LimitError
from dcqfa_ros.safety.limits import NotFiniteActionError

Floats = NDArray[np.float64]

INOVO_JOINT_SPEEDS = (1.8, 1.8, 2.5, 2.6, 3.3, 3.3)
"""rad/s, joints 1 to 6 of the Inovo arm (its description file)."""

MAXIMUM_SPEED = 4.0  # rad/s; beyond it is no arm this software is meant for
MAXIMUM_ANGLE = 4.0 * np.pi
DAMPING = 1e-3
"""Of the inverse near a singular posture: speeds there are large, hence scaled down, but finite. Who sends joint speeds
must use the same, or they are others than those that were limited."""
_BEYOND_RAD = 0.05  # by which a move of the controller's own may be measured beyond the end of a joint
_STANDING = 0.01  # rad/s


class Kinematics(Protocol):
    """What a limit needs to know of an arm's geometry. Joints (n,) rad, ``world``, metres."""

    def jacobian(self, joints: Floats, point: Floats | None = None) -> Floats:
        """Return the Jacobian (6, n): joint speeds to (vx, vy, vz, wx, wy, wz) of ``point`` (3,) of the last link."""

    def forward(self, joints: Floats) -> tuple[Floats, Floats]:
        """Return position (..., 3) and rotation (..., 3, 3) of the last link, or of a tool on it, for (..., n)."""


class JointLimits:
    """Scales a twist down until no joint moves too fast or too near its end, and examines joint positions.

    Attributes:
        speeds: (n,) rad/s.
        lower, upper: (n,) rad.
        clamped: how often a twist was scaled down.
        tightest: index of the joint that last did so, -1 before.
    """

    def __init__(
        self,
        kinematics: Kinematics,
        speeds: Sequence[float],
        lower: Sequence[float],
        upper: Sequence[float],
        braking: float = 3.0,
    ) -> None:
        """Set the limits.

        Args:
            kinematics: the arm's geometry.
            speeds: largest speed per joint, rad/s.
            lower: smallest angle per joint, rad. A continuous joint has limits too: its cables are not continuous.
            upper: largest angle per joint, rad.
            braking: deceleration with which a joint approaches its end, rad/s^2.

        Raises:
            LimitError: a limit is absent, not finite or beyond its hard maximum.
        """
        self.kinematics, self._braking = kinematics, braking
        self.speeds = _limits("joint_speeds", speeds, MAXIMUM_SPEED)
        self.lower = _limits("joint_lower", lower, MAXIMUM_ANGLE)
        self.upper = _limits("joint_upper", upper, MAXIMUM_ANGLE)
        if not len(self.speeds) == len(self.lower) == len(self.upper):
            raise LimitError("joint limits: joint_speeds, joint_lower and joint_upper differ in length")
        if not ((self.speeds > 0).all() and (self.lower < self.upper).all()):
            raise LimitError("joint limits: expected speeds above 0 and every lower angle below its upper one")
        if not 0.0 < braking <= 20.0:
            raise LimitError(f"joint limits: braking is {braking} rad/s^2, expected above 0 and at most 20")
        self.clamped = 0
        self.tightest = -1

    def joint_speeds(self, joints: Floats, twist: Floats, point: Floats | None = None) -> Floats:
        """Return the joint speeds (n,) rad/s that make ``point`` (3,) of the last link move with ``twist`` (6,).

        Raises:
            NotFiniteActionError: joints or twist hold NaN or infinity, or have another length.
        """
        joints, twist = np.asarray(joints, np.float64), np.asarray(twist, np.float64)
        if joints.shape != self.speeds.shape or twist.shape != (6,):
            raise NotFiniteActionError(
                f"joints {joints.shape} and twist {twist.shape}: expected ({len(self.speeds)},), (6,)"
            )
        if not (np.isfinite(joints).all() and np.isfinite(twist).all()):
            raise NotFiniteActionError("joint positions or twist hold NaN or infinity")
        jacobian = np.asarray(self.kinematics.jacobian(joints, point), np.float64)
        square = jacobian @ jacobian.T + DAMPING**2 * np.eye(6)
        return np.asarray(jacobian.T @ np.linalg.solve(square, twist))

    def factor(self, joints: Floats, twist: Floats, share: float = 1.0, point: Floats | None = None) -> float:
        """Return the share (0..1) of ``twist`` that keeps every joint below ``share`` of its limits.

        A joint beyond its end blocks every motion that would take it further, and none that brings it back.

        Raises:
            NotFiniteActionError: see :meth:`joint_speeds`.
        """
        speeds = self.joint_speeds(joints, twist, point)
        distance = np.where(speeds > 0.0, self.upper - joints, joints - self.lower)
        allowed = share * np.minimum(self.speeds, np.sqrt(2.0 * self._braking * np.maximum(distance, 0.0)))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(np.abs(speeds) > allowed, allowed / np.abs(speeds), 1.0)
        index = int(np.argmin(ratios))
        if ratios[index] < 1.0:
            self.clamped += 1
            self.tightest = index
        return float(ratios[index])

    def beyond(self, joints: Floats, velocities: Floats) -> str | None:
        """Return which joint is beyond its end and goes on, or cannot be told from (n,) rad and rad/s; None if none."""
        if not (np.isfinite(joints).all() and np.isfinite(velocities).all()):
            return "joint positions or velocities hold NaN or infinity"
        above = (joints > self.upper + _BEYOND_RAD) & (velocities > _STANDING)
        outside = above | ((joints < self.lower - _BEYOND_RAD) & (velocities < -_STANDING))
        if not outside.any():
            return None
        joint = int(np.argmax(outside))
        low, high = self.lower[joint], self.upper[joint]
        return f"joint {joint + 1} is at {joints[joint]:.3f} rad, outside {low:.3f} to {high:.3f}"

    def places(self, joints: Floats, position: Floats, path: Floats) -> tuple[Floats, Floats]:
        """Return positions (n, 3) and rotations (n, 3, 3) of the tool centre point along ``path`` (n, 6).

        It is at ``position`` (3,) now, with ``joints`` (6,).
        """
        origin, rotation = self.kinematics.forward(joints)
        tool = np.asarray(rotation).T @ (np.asarray(position) - origin)
        ends, turns = self.kinematics.forward(path)
        return ends + turns @ tool, turns

    def check_path(self, times_s: Floats, positions: Floats, start: Floats) -> str | None:
        """Return why joint positions (n, 6) at ``times_s`` (n,) from ``start`` (6,) may not be followed, None if so."""
        times, path = np.asarray(times_s, np.float64), np.asarray(positions, np.float64)
        if path.ndim != 2 or path.shape[1] != len(self.speeds) or times.shape != (len(path),) or not len(path):
            return f"expected n times and positions (n, {len(self.speeds)}), got {times.shape} and {path.shape}"
        if not (np.isfinite(times).all() and np.isfinite(path).all()):
            return "times or positions hold NaN or infinity"
        if times[0] <= 0.0 or (np.diff(times) <= 0.0).any():
            return "times must be above 0 and rise"
        outside = (path < self.lower) | (path > self.upper)
        if outside.any():
            row, joint = (int(i) for i in np.argwhere(outside)[0])
            low, high = self.lower[joint], self.upper[joint]
            return f"joint {joint + 1} would be at {path[row, joint]:.3f} rad, outside {low:.3f} to {high:.3f}"
        speeds = np.abs(np.diff(path, axis=0, prepend=start[None])) / np.diff(times, prepend=0.0)[:, None]
        if (speeds > self.speeds).any():
            row, joint = (int(i) for i in np.argwhere(speeds > self.speeds)[0])
            return f"joint {joint + 1} would move at {speeds[row, joint]:.2f} rad/s, limit {self.speeds[joint]:.2f}"
        return None


def _limits(name: str, values: Sequence[float], maximum: float) -> Floats:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array) or not (np.abs(array) <= maximum).all():
        raise LimitError(f"{name} is {list(values)}: expected one number per joint, none beyond {maximum:.2f}")
    array.flags.writeable = False
    return array
