"""Pictures of the Push-T table, seen from above: a pure function of the state, for simulated cameras and reports."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcqfa_ros.sim.pictures import check_size
from dcqfa_ros.sim.tee import (
    AGENT_RADIUS_PX,
    GOAL_POSE,
    OUTLINE_LOCAL,
    TABLE_SIZE_PX,
    WALL_MAX_PX,
    WALL_MIN_PX,
    Float64,
    check_state,
    to_table,
)

Image = NDArray[np.uint8]
Color = tuple[int, int, int]

GRID_PX = 64.0  # one grid cell is 1/16 m

# RGB; the hues of the published environment (green goal, slate block, blue agent, red target), toned for a report.
FLOOR: Color = (226, 230, 236)
TABLE: Color = (252, 252, 250)
GRID: Color = (240, 241, 243)
WALL: Color = (176, 184, 196)
GOAL: Color = (203, 236, 211)
GOAL_EDGE: Color = (98, 183, 128)
BLOCK: Color = (112, 128, 150)
BLOCK_EDGE: Color = (72, 85, 105)
AGENT: Color = (52, 108, 232)
AGENT_EDGE: Color = (255, 255, 255)
TARGET: Color = (226, 62, 76)
CROSS_ARM_PX = 9.0
SHADOW_STRENGTH = 0.28
SHADOW_OFFSET_PX = (3.0, 5.0)
SHADOW_BLUR_PX = 4.0
_FRACTION_BITS = 4  # cv2 draws at 1/16 px


class _Canvas:
    """Draws table-frame shapes into an image with the square table centred in it."""

    def __init__(self, image: Image) -> None:
        height, width = image.shape[:2]
        self.image = image
        self.scale = min(width, height) / TABLE_SIZE_PX
        self.offset = np.array([(width - min(width, height)) / 2, (height - min(width, height)) / 2])

    def pixels(self, points: ArrayLike) -> Float64:
        """Return table-frame ``points`` (..., 2) as image coordinates, where (0, 0) is the first pixel's centre."""
        return np.asarray(points, dtype=np.float64) * self.scale + self.offset - 0.5

    def fixed(self, points: ArrayLike) -> NDArray[np.int32]:
        """Return table-frame ``points`` in cv2's fixed-point image coordinates."""
        return np.rint(self.pixels(points) * (1 << _FRACTION_BITS)).astype(np.int32)

    def thickness(self, table_px: float) -> int:
        """Return a line thickness of ``table_px`` table pixels in image pixels, at least 1."""
        return max(1, round(table_px * self.scale))

    def polygon(self, points: ArrayLike, fill: Color, edge: Color, width: float) -> None:
        """Draw a filled polygon with an outline of ``width`` table pixels."""
        corners = [self.fixed(points)]
        cv2.fillPoly(self.image, corners, fill, cv2.LINE_AA, _FRACTION_BITS)
        cv2.polylines(self.image, corners, True, edge, self.thickness(width), cv2.LINE_AA, _FRACTION_BITS)

    def disc(self, centre: ArrayLike, radius: float, fill: Color) -> None:
        """Draw a filled circle of ``radius`` table pixels."""
        x, y = (int(v) for v in self.fixed(centre))
        scaled = max(1, round(radius * self.scale * (1 << _FRACTION_BITS)))
        cv2.circle(self.image, (x, y), scaled, fill, cv2.FILLED, cv2.LINE_AA, _FRACTION_BITS)

    def line(self, start: ArrayLike, end: ArrayLike, color: Color, width: float) -> None:
        """Draw a straight line of ``width`` table pixels."""
        (x0, y0), (x1, y1) = self.fixed(np.array([start, end], dtype=np.float64)).tolist()
        thickness = self.thickness(width)
        cv2.line(self.image, (x0, y0), (x1, y1), color, thickness, cv2.LINE_AA, _FRACTION_BITS)

    def shadow(self, points: ArrayLike) -> None:
        """Darken the image softly below and to the right of a polygon; only its surroundings are touched."""
        corners = self.pixels(np.asarray(points) + SHADOW_OFFSET_PX)
        blur = SHADOW_BLUR_PX * self.scale
        margin = 3 * blur + 2
        height, width = self.image.shape[:2]
        low = np.clip(np.floor(corners.min(axis=0) - margin), 0, (width, height)).astype(int)
        high = np.clip(np.ceil(corners.max(axis=0) + margin), 0, (width, height)).astype(int)
        if (high <= low).any():
            return
        mask = np.zeros((high[1] - low[1], high[0] - low[0]), dtype=np.uint8)
        fixed = np.rint((corners - low) * (1 << _FRACTION_BITS)).astype(np.int32)
        cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, _FRACTION_BITS)
        if blur > 0.3:
            mask = cv2.GaussianBlur(mask, (0, 0), blur)
        region = self.image[low[1] : high[1], low[0] : high[0]]
        keep = 1.0 - mask.astype(np.float32)[..., None] * (SHADOW_STRENGTH / 255.0)
        region[:] = np.rint(region * keep).astype(np.uint8)


@lru_cache(maxsize=8)
def _background(width: int, height: int) -> Image:
    """Return the empty table with its goal, shape (height, width, 3); shared, so read-only."""
    canvas = _Canvas(np.full((height, width, 3), FLOOR, dtype=np.uint8))
    low, high = WALL_MIN_PX, WALL_MAX_PX
    frame = [(low, low), (high, low), (high, high), (low, high)]
    canvas.polygon(frame, TABLE, WALL, 4.0)
    for position in np.arange(GRID_PX, TABLE_SIZE_PX, GRID_PX):
        canvas.line((position, low + 3), (position, high - 3), GRID, 1.0)
        canvas.line((low + 3, position), (high - 3, position), GRID, 1.0)
    canvas.polygon(to_table(OUTLINE_LOCAL, GOAL_POSE), GOAL, GOAL_EDGE, 2.0)
    canvas.image.flags.writeable = False
    return canvas.image


def render(state: ArrayLike, width: int, height: int, target: ArrayLike | None = None) -> Image:
    """Return the table as seen from above, shape (height, width, 3), uint8, RGB. A pure function of its arguments.

    Args:
        state: agent x, y, block x, y [px], block theta [rad]; shape (5,). What lies outside the picture is cut off.
        width: width of the picture, 16..8192 px; the square table is centred in it.
        height: height of the picture, likewise.
        target: the agent's commanded position (2,) px, marked with a cross; None draws none.

    Raises:
        ValueError: a size is out of range, or the state or the target is not made of finite numbers of that shape.
    """
    check_size(width, height)
    values = check_state(state)
    canvas = _Canvas(_background(int(width), int(height)).copy())
    agent = _bounded(values[:2])
    block = _bounded(to_table(OUTLINE_LOCAL, values[2:]))
    canvas.shadow(block)
    canvas.polygon(block, BLOCK, BLOCK_EDGE, 2.0)
    if target is not None:
        goal = np.asarray(target, dtype=np.float64)
        if goal.shape != (2,) or not np.isfinite(goal).all():
            raise ValueError(f"target: expected two finite numbers (x, y in px), got {goal.tolist()}")
        goal = _bounded(goal)
        canvas.line(agent, goal, TARGET, 1.5)
    canvas.disc(agent, AGENT_RADIUS_PX + 2.0, AGENT_EDGE)
    canvas.disc(agent, AGENT_RADIUS_PX, AGENT)
    if target is not None:
        for arm in np.array([(CROSS_ARM_PX, 0.0), (0.0, CROSS_ARM_PX)]):
            canvas.line(goal - arm, goal + arm, TARGET, 3.0)
    return canvas.image


def _bounded(points: Float64) -> Float64:
    """Keep coordinates within what cv2's 32-bit fixed point can draw; ten tables away is out of sight anyway."""
    return np.clip(points, -10 * TABLE_SIZE_PX, 10 * TABLE_SIZE_PX)
