"""Goals of the Inovo controller, checked before anything is sent."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.kinematics import JOINTS, ArmKinematics

Floats = NDArray[np.float64]

MAX_SPEED = 1.5  # m/s, of a move; faster is a mistake of units
MAX_ANGULAR_SPEED = math.pi  # rad/s


def straight_goal(
    position: ArrayLike, orientation: ArrayLike, speed: float, angular_speed: float, tcp: str
) -> m.Message:
    """Return the goal of a straight move of the tool centre point.

    Raises:
        ValueError: a number is not finite or a speed is out of range; the message names it.
    """
    target = finite(position, "position", "m")
    turn = np.array(orientation, dtype=np.float64)
    norm = float(np.sqrt(turn @ turn)) if turn.shape == (4,) else math.nan
    if not 0.99 < norm < 1.01:
        raise ValueError(f"orientation: expected a unit quaternion (x, y, z, w), got {turn.tolist()}")
    for value, limit, what in (
        (speed, MAX_SPEED, "speed: m/s"),
        (angular_speed, MAX_ANGULAR_SPEED, "angular_speed: rad/s"),
    ):
        if not 0.0 < value <= limit:
            raise ValueError(f"{what}: expected above 0 and up to {limit:.3g}, got {value}")
    return m.straight_move(target, turn / norm, speed, angular_speed, tcp)


def joint_goal(kinematics: ArmKinematics, start: Floats, times_s: ArrayLike, positions: ArrayLike) -> m.Message:
    """Return the goal of following joint positions (n, 6) rad at ``times_s`` (n,) from ``start`` (6,) rad.

    Raises:
        ValueError: shapes, times or numbers are wrong, or a joint would be faster than it can.
    """
    times, points = np.array(times_s, dtype=np.float64), np.array(positions, dtype=np.float64)
    if times.ndim != 1 or times.size == 0 or points.shape != (times.size, JOINTS):
        raise ValueError(f"expected times (n,) and positions (n, {JOINTS}), got {times.shape} and {points.shape}")
    if not (np.isfinite(times).all() and np.isfinite(points).all()):
        raise ValueError("times and positions: expected finite numbers")
    steps = np.diff(times, prepend=0.0)
    if not (steps > 0.0).all():
        raise ValueError(f"times: expected increasing times after 0 s, got {times.tolist()}")
    rates = np.diff(points, axis=0, prepend=start[None]) / steps[:, None]
    worst = np.unravel_index(int(np.argmax(np.abs(rates) / kinematics.velocity_limits)), rates.shape)
    limit = float(kinematics.velocity_limits[worst[1]])
    if abs(float(rates[worst])) > limit * (1.0 + 1e-6):
        raise ValueError(
            f"positions[{worst[0]}]: joint {int(worst[1]) + 1} would need {abs(float(rates[worst])):.3g} rad/s, "
            f"it has {limit:g}: allow more time"
        )
    ends = np.zeros_like(points)
    if times.size > 1:  # through the points in between at the mean of the rates around them, at rest in the end
        ends[:-1] = 0.5 * (rates[:-1] + rates[1:])
    return m.joint_trajectory(times.tolist(), points, ends)


def finite(values: ArrayLike, what: str, units: str) -> Floats:
    """Return three finite numbers as (3,) float64.

    Raises:
        ValueError: they are not; the message names ``what`` and ``units``.
    """
    array = np.array(values, dtype=np.float64)
    if array.shape != (3,) or not np.isfinite(array).all():
        raise ValueError(f"{what}: expected three finite numbers (x, y, z in {units}), got {array.tolist()}")
    return array
