"""A simulated camera above the Push-T table: renders what the cell, in whichever process, shows of its state."""

from __future__ import annotations

import time

from dcqfa_ros.drivers.protocols import CameraFrame, CameraIntrinsics, ColorOnly, DriverError
from dcqfa_ros.sim.cell_state import CellStateReader
from dcqfa_ros.sim.pictures import check_pictures
from dcqfa_ros.sim.render import render
from dcqfa_ros.sim.tee import METRES_PER_PIXEL, TABLE_SIZE_PX

CAMERA_HEIGHT_M = 0.5  # above the table's centre, looking straight down


class SimulatedCamera(ColorOnly):
    """Color camera (no depth) looking straight down at the cell's table from 0.5 m.

    Pictures come at ``fps`` whether the cell moves or not, as from a real camera. A cell that is not there is an error
    of ``read``, not of ``connect``: it may start later or restart, and the next ``read`` looks again.
    """

    def __init__(
        self,
        name: str,
        width: int = 640,
        height: int = 480,
        fps: float = 30.0,
        maximum_age_s: float | None = None,
        reader: CellStateReader | None = None,
    ) -> None:
        """Choose the cell, the picture and the rate.

        Args:
            name: the cell's shared name, see ``cell_state.cell_state_name``.
            width: picture width in px, 16..8192.
            height: picture height in px, likewise.
            fps: frames per second, above 0 and at most 1000.
            maximum_age_s: refuse a state older than this; None accepts any age while the cell's process lives.
            reader: where the state is read; by default the shared record ``name``.

        Raises:
            ValueError: a size, the rate or the name is out of range.
        """
        check_pictures(width, height, fps)
        self._reader = CellStateReader(name, maximum_age_s) if reader is None else reader
        self._name = f"simulated camera of {name}"
        self._width, self._height, self._fps = width, height, float(fps)
        self._period_ns = round(1e9 / fps)
        self._next_ns: int | None = None
        self._number = 0

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
        """Pinhole camera whose shorter side sees exactly the table's 0.5 m from 0.5 m above it."""
        side = min(self._width, self._height)
        focal = side * CAMERA_HEIGHT_M / (TABLE_SIZE_PX * METRES_PER_PIXEL)
        return CameraIntrinsics(self._width, self._height, focal, focal, (self._width - 1) / 2, (self._height - 1) / 2)

    def connect(self) -> None:
        """Start the frame clock; the cell need not run yet. Nothing happens when already connected."""
        if self._next_ns is None:
            self._next_ns = time.monotonic_ns()
            self._number = 0

    def capture(self) -> CameraFrame:
        """Take a picture at once, without waiting for the frame clock.

        Raises:
            DriverError: the camera is not connected.
            CellStateError: (a DriverError) the cell is missing, has died, or its state is too old.
        """
        if self._next_ns is None:
            raise DriverError(f"{self._name}: not connected, call connect() first")
        stamp = time.monotonic_ns()
        cell = self._reader.read()
        color = render(cell.state, self._width, self._height, cell.target)
        color.flags.writeable = False
        frame = CameraFrame(color=color, depth=None, stamp_ns=stamp, number=self._number)
        self._number += 1
        return frame

    def read(self, timeout_s: float = 1.0) -> CameraFrame:
        """Wait for the next tick of the frame clock and take a picture; missed ticks are dropped, not caught up.

        Raises:
            ValueError: ``timeout_s`` is not positive.
            DriverError: not connected, or the next frame is due later than ``timeout_s`` from now.
            CellStateError: (a DriverError) the cell is missing, has died, or its state is too old.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected a positive number of seconds, got {timeout_s}")
        if self._next_ns is None:
            raise DriverError(f"{self._name}: not connected, call connect() first")
        wait_ns = self._next_ns - time.monotonic_ns()
        if wait_ns > timeout_s * 1e9:
            time.sleep(timeout_s)
            raise DriverError(
                f"{self._name}: no frame within {timeout_s:g} s (a frame is due every {1 / self._fps:g} s)"
            )
        if wait_ns > 0:
            time.sleep(wait_ns * 1e-9)
        late_ticks = max(0, time.monotonic_ns() - self._next_ns) // self._period_ns
        self._next_ns += (late_ticks + 1) * self._period_ns
        return self.capture()

    def close(self) -> None:
        """Let go of the cell; safe to call at any time and more than once."""
        self._next_ns = None
        self._reader.close()
