"""Rotations in space: quaternions (x, y, z, w), matrices, and vectors of axis times angle (rad). Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def transform(position: ArrayLike, orientation: ArrayLike) -> Floats:
    """Return the (4, 4) transform of a position (3,) m and a quaternion (4,)."""
    result = np.eye(4)
    result[:3, :3] = rotation_of(orientation)
    result[:3, 3] = np.asarray(position, dtype=np.float64)
    return result


def rotation_of(orientation: ArrayLike) -> Floats:
    """Return the rotation matrix (3, 3) of a quaternion (4,), which is normalised first.

    Raises:
        ValueError: it is not four finite numbers, or zero.
    """
    values = np.asarray(orientation, dtype=np.float64)
    norm = float(np.sqrt(values @ values)) if values.shape == (4,) else math.nan
    if not (math.isfinite(norm) and norm > 1e-6):
        raise ValueError(f"orientation: expected a quaternion (x, y, z, w), got {np.asarray(orientation).tolist()}")
    x, y, z, w = (values / norm).tolist()
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion_of(rotation: Floats) -> Floats:
    """Return the unit quaternion (x, y, z, w) of a rotation matrix (3, 3), with w >= 0 (Shepperd 1978)."""
    m = rotation.tolist()
    trace = m[0][0] + m[1][1] + m[2][2]
    choices = (m[0][0], m[1][1], m[2][2], trace)
    largest = choices.index(max(choices))
    if largest == 3:
        values = [m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1], 1.0 + trace]
    else:
        i, j, k = largest, (largest + 1) % 3, (largest + 2) % 3
        values = [0.0] * 4
        values[i] = 1.0 + m[i][i] - m[j][j] - m[k][k]
        values[j], values[k] = m[j][i] + m[i][j], m[k][i] + m[i][k]
        values[3] = m[k][j] - m[j][k]
    norm = math.copysign(math.sqrt(sum(value * value for value in values)), values[3] or 1.0)
    return np.array([value / norm for value in values])


def rotation_vector(rotation: Floats) -> Floats:
    """Return axis times angle (3,) rad of a rotation matrix (3, 3), angle in [0, pi]."""
    x, y, z, w = quaternion_of(rotation).tolist()
    sine = math.sqrt(x * x + y * y + z * z)
    factor = 2.0 if sine < 1e-12 else 2.0 * math.atan2(sine, w) / sine
    return np.array([x * factor, y * factor, z * factor])


def rotation_from_vector(vector: ArrayLike) -> Floats:
    """Return the rotation matrix (3, 3) of axis times angle (3,) rad."""
    values = np.asarray(vector, dtype=np.float64)
    angle = float(np.sqrt(values @ values))
    factor = 0.5 if angle < 1e-12 else math.sin(angle / 2) / angle
    return rotation_of((*(values * factor).tolist(), math.cos(angle / 2)))


def interpolate_orientation(start: ArrayLike, end: ArrayLike, shares: Sequence[float]) -> list[Floats]:
    """Return rotation matrices on the shortest way from one quaternion to another, at each share 0..1."""
    first = rotation_of(start)
    turn = rotation_vector(rotation_of(end) @ first.T)
    return [rotation_from_vector(share * turn) @ first for share in shares]
