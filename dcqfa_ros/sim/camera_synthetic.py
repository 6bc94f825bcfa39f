"""A synthetic RGB-D camera: a deterministic moving picture with depth that needs no device and hardly any CPU."""

from __future__ import annotations

import time
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers.protocols import CameraExtrinsics, CameraFrame, CameraIntrinsics, DriverError
from dcqfa_ros.sim.pictures import check_pictures

SCENE_ROWS = 240
"""The scene scrolls by one row per frame and repeats after this many frames."""
NEAREST_MM, FARTHEST_MM = 300, 1500
_FIELD_OF_VIEW_FOCAL = 0.96  # focal length over width, as a RealSense D435's color camera (615 px at 640 px)
_TILE_PX = 40


@lru_cache(maxsize=4)
def scene(width: int, height: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Return the whole scene, of which each frame shows ``height`` rows.

    Returns:
        color (height + SCENE_ROWS - 1, width, 3) uint8 RGB: tiles whose brightness falls with distance, and depth of
        the same size, uint16, mm: a wavy wall between 0.3 m and 1.5 m with one box of invalid depth (0). Read-only.
    """
    rows = np.arange(height + SCENE_ROWS - 1)[:, None] % SCENE_ROWS  # the end joins the beginning
    columns = np.arange(width)[None, :]
    wave = (2 + np.sin(2 * np.pi * rows / SCENE_ROWS) + np.sin(2 * np.pi * columns / width)) / 4
    depth = np.round(NEAREST_MM + wave * (FARTHEST_MM - NEAREST_MM)).astype(np.uint16)
    shade = 255 - (wave * 160).astype(np.uint8)
    tile = (rows // _TILE_PX + columns // _TILE_PX) % 3
    color = np.empty((*depth.shape, 3), dtype=np.uint8)
    for channel in range(3):
        color[..., channel] = np.where(tile == channel, shade, shade // 2)
    side = max(1, min(width, SCENE_ROWS) // 8)
    hole = (rows >= SCENE_ROWS - side) & (columns < side)
    depth[np.broadcast_to(hole, depth.shape)] = 0
    for array in (color, depth):
        array.flags.writeable = False
    return color, depth


class SyntheticCamera:
    """RGB-D camera whose picture scrolls by one row per tick of its frame clock.

    Frame ``n`` shows rows ``n % SCENE_ROWS`` on of :func:`scene`, so a subscriber can tell which frame it sees. Numbers
    count ticks: one that nobody read in time leaves a gap, as on a real camera.
    """

    def __init__(self, name: str = "synthetic", width: int = 640, height: int = 480, fps: float = 30.0) -> None:
        """Choose size and rate.

        Args:
            name: for messages.
            width: picture width in px, 16..8192.
            height: picture height in px, likewise.
            fps: frames per second, above 0 and at most 1000.

        Raises:
            ValueError: a size or the rate is out of range.
        """
        check_pictures(width, height, fps)
        self._name = f"synthetic camera {name}"
        self._width, self._height, self._fps = width, height, float(fps)
        self._period_ns = round(1e9 / fps)
        self._begin_ns: int | None = None
        self._next = 0

    @property
    def name(self) -> str:
        """Short name for messages."""
        return self._name

    @property
    def fps(self) -> float:
        """Nominal frames per second."""
        return self._fps

    @property
    def intrinsics(self) -> CameraIntrinsics:
        """Pinhole camera with the field of view of a RealSense D435's color camera."""
        focal = _FIELD_OF_VIEW_FOCAL * self._width
        return CameraIntrinsics(self._width, self._height, focal, focal, (self._width - 1) / 2, (self._height - 1) / 2)

    @property
    def has_depth(self) -> bool:
        """Frames carry depth."""
        return True

    @property
    def serial_number(self) -> str:
        """There is none."""
        return ""

    @property
    def extrinsics(self) -> CameraExtrinsics | None:
        """Depth is made in the color frame."""
        return CameraExtrinsics((1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0))

    def connect(self) -> None:
        """Make the scene and start the frame clock."""
        if self._begin_ns is None:
            self._color, self._depth = scene(self._width, self._height)
            self._begin_ns = time.monotonic_ns()
            self._next = 0

    def read(self, timeout_s: float = 1.0) -> CameraFrame:
        """Wait for the next tick of the frame clock and show the scene; missed ticks are dropped, not caught up.

        Raises:
            ValueError: ``timeout_s`` is not positive.
            DriverError: not connected, or the next frame is due later than ``timeout_s`` from now.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected a positive number of seconds, got {timeout_s}")
        if self._begin_ns is None:
            raise DriverError(f"{self._name}: not connected, call connect() first")
        due_ns = self._begin_ns + self._next * self._period_ns
        wait_ns = due_ns - time.monotonic_ns()
        if wait_ns > timeout_s * 1e9:
            time.sleep(timeout_s)
            raise DriverError(f"{self._name}: no frame within {timeout_s:g} s (one is due every {1 / self._fps:g} s)")
        if wait_ns > 0:
            time.sleep(wait_ns * 1e-9)
        number = self._next + max(0, time.monotonic_ns() - due_ns) // self._period_ns
        self._next = number + 1
        stamp = self._begin_ns + number * self._period_ns  # the tick itself: waking up late is no part of the picture
        top = number % SCENE_ROWS
        rows = slice(top, top + self._height)
        return CameraFrame(color=self._color[rows], depth=self._depth[rows], stamp_ns=stamp, number=number)

    def close(self) -> None:
        """Stop the frame clock; safe to call at any time and more than once."""
        self._begin_ns = None
