"""Geometry of the Push-T table: the T block, its goal, its key points and the published start states.

Everything is in the table frame of the published task: pixels, x to the right, y down (as drawn), angles in radians
turning x towards y. The table is a square of 512 px; one pixel is 1/1024 m, which is exact in binary floating point.

Sources: Diffusion Policy (Chi et al. 2023) and ``gym_pusht`` 0.1.8, which carries the same physics.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]

TABLE_SIZE_PX = 512.0
METRES_PER_PIXEL = 1.0 / 1024.0
AGENT_RADIUS_PX = 15.0
WALL_MIN_PX, WALL_MAX_PX, WALL_RADIUS_PX = 5.0, 506.0, 2.0
GOAL_POSE = (256.0, 256.0, float(np.pi / 4))  # x px, y px, theta rad
SUCCESS_COVERAGE = 0.95  # share of the goal that must be covered; the episode ends above it
STATE_SIZE = 5  # agent x, agent y, block x, block y, block theta

# The nine key points of the block in its own frame, px (measured on the published demonstrations).
KEY_POINTS_LOCAL: Float64 = np.array(
    [
        [9.2698, 90.041],
        [-60.9835, -1.1867],
        [60.9128, -1.3934],
        [-0.2705, 25.5436],
        [-14.0649, 122.8159],
        [39.0027, 32.8574],
        [-39.9664, 32.7297],
        [-16.8243, 62.8632],
        [23.5415, -1.7003],
    ]
)
KEY_POINTS_LOCAL.flags.writeable = False

CENTRE_OF_GRAVITY_LOCAL = (0.0, 45.0)  # of the block in its own frame, px; the environment turns the block about it

# The outline of the T in its own frame, px: the union of the two rectangles that collide (bar 120 x 30, stem 30 x 90).
OUTLINE_LOCAL: Float64 = np.array(
    [[-60, 0], [60, 0], [60, 30], [15, 30], [15, 120], [-15, 120], [-15, 30], [-60, 30]], dtype=np.float64
)
OUTLINE_LOCAL.flags.writeable = False


def check_state(state: ArrayLike) -> Float64:
    """Return ``state`` as float64, shape (5,): agent x, y [px], block x, y [px], block theta [rad].

    Raises:
        ValueError: the shape is not (5,) or a value is NaN or infinite.
    """
    array = np.asarray(state, dtype=np.float64)
    if array.shape != (STATE_SIZE,):
        raise ValueError(f"state: expected shape (5,) [agent x, y, block x, y, theta], got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"state: expected finite numbers, got {array.tolist()}")
    return array


def to_table(points: ArrayLike, pose: Sequence[float] | Float64) -> Float64:
    """Return block-frame ``points`` (N, 2) px in the table frame for ``pose`` = (x px, y px, theta rad), float64."""
    x, y, theta = (float(v) for v in pose)
    cosine, sine = np.cos(theta), np.sin(theta)
    rotation = np.array([[cosine, -sine], [sine, cosine]])
    return np.asarray(points, dtype=np.float64) @ rotation.T + (x, y)


def key_points(pose: Sequence[float] | Float64) -> Float32:
    """Return the block's nine key points in the table frame, shape (9, 2), float32, px.

    ``pose`` is the block's (x px, y px, theta rad): kp = R(theta) L + p.
    """
    return to_table(KEY_POINTS_LOCAL, pose).astype(np.float32)


def legacy_state(seed: int) -> Float64:
    """Return the published start state for ``seed``, shape (5,), float64, in the environment's legacy order.

    The same numbers as the environment the demonstrations were recorded in; episode i of the published data starts
    from seed i (after one physics step, which ``PushTWorld.reset`` performs).

    Raises:
        ValueError: ``seed`` is outside 0..2**32-1.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected 0 to 4294967295, got {seed}")
    random = np.random.RandomState(seed=seed)
    return np.array(
        [
            random.randint(50, 450),
            random.randint(50, 450),
            random.randint(100, 400),
            random.randint(100, 400),
            random.randn() * 2 * np.pi - np.pi,
        ],
        dtype=np.float64,
    )


def state_to_reset_to(state: ArrayLike) -> Float64:
    """Return what ``PushTWorld.reset_to`` has to be given for a world to come to be in ``state``, shape (5,), float64.

    As published, a reset places the block first and then turns it about its centre of gravity, which moves its origin:
    published start states mean that order, states that a world or a data set reports are poses after it.

    Raises:
        ValueError: ``state`` is not five finite numbers (agent x, y, block x, y, theta).
    """
    agent_x, agent_y, *pose = check_state(state).tolist()
    origin = to_table([CENTRE_OF_GRAVITY_LOCAL], pose)[0] - CENTRE_OF_GRAVITY_LOCAL
    return np.array([agent_x, agent_y, *origin, pose[2]], dtype=np.float64)


def block_pose(keypoints: ArrayLike) -> tuple[float, float, float]:
    """Return the block's (x px, y px, theta rad) that fits its key points (9, 2) px best; inverts ``key_points``.

    Theta lies in (-pi, pi]. Least squares over rigid motions (Procrustes in the plane).

    Raises:
        ValueError: the shape is not (9, 2) or a value is NaN or infinite.
    """
    points = np.asarray(keypoints, dtype=np.float64)
    if points.shape != KEY_POINTS_LOCAL.shape or not np.isfinite(points).all():
        raise ValueError(f"keypoints: expected finite numbers of shape {KEY_POINTS_LOCAL.shape}, got {points.shape}")
    local_centre, centre = KEY_POINTS_LOCAL.mean(axis=0), points.mean(axis=0)
    local, seen = KEY_POINTS_LOCAL - local_centre, points - centre
    sine = (local[:, 0] * seen[:, 1] - local[:, 1] * seen[:, 0]).sum()
    cosine = (local * seen).sum()
    theta = float(np.arctan2(sine, cosine))
    x, y = centre - to_table(local_centre, (0.0, 0.0, theta))
    return float(x), float(y), theta
