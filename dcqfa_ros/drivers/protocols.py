"""What an arm and a camera offer to the nodes, whatever stands behind them: hardware, emulator or simulated cell.

Drivers are plain Python: no ROS, no logging set-up, no threads the caller has not asked for. Times are
``time.monotonic_ns`` of this host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.errors import UserError


class DriverError(UserError):
    """A device is missing, busy, disconnected or was used out of order; the message names it and what to do."""


@dataclass(frozen=True, slots=True)
class ArmObservation:
    """What a planar arm and its cell show after a tick. Arrays are read-only.

    Attributes:
        stamp_ns: monotonic time at which the observation was taken.
        step: actions executed since the reset.
        agent: position of the end effector, shape (2,), float32, px, table frame.
        keypoints: key points of the block, shape (9, 2), float32, px, table frame.
        target: the last commanded position, shape (2,), float32, px; the position itself before the first command.
        coverage: share of the goal covered, 0..1.
        score: maximum over the steps of coverage / 0.95, clipped to [0, 1].
        done: the episode has ended; the cell stands still until it is reset.
    """

    stamp_ns: int
    step: int
    agent: NDArray[np.float32]
    keypoints: NDArray[np.float32]
    target: NDArray[np.float32]
    coverage: float
    score: float
    done: bool


class ArmDriver(Protocol):
    """A planar arm under position control, with the cell that judges its task. Not thread-safe."""

    @property
    def name(self) -> str:
        """Short name for messages, such as ``simulated planar arm``."""

    def connect(self) -> None:
        """Take the arm, without moving it, so that ``observe`` works. Does nothing when already connected.

        Raises:
            DriverError: the arm cannot be reached or is taken.
        """

    def reset(self, seed: int) -> ArmObservation:
        """Bring the cell to the start state of ``seed`` and return the first observation (step 0)."""

    def observe(self) -> ArmObservation:
        """Return the current observation; nothing moves."""

    def step(self, action: NDArray[np.float32] | NDArray[np.float64]) -> ArmObservation:
        """Execute one control tick towards ``action`` (2,) px, table frame.

        Raises:
            ValueError: the action is not two finite numbers; nothing has moved.
            DriverError: the arm is not connected.
        """

    def hold(self) -> ArmObservation:
        """Execute one control tick that keeps the last target (the present position before the first command)."""

    def close(self) -> None:
        """Release the arm. Safe to call at any time and more than once."""


@dataclass(frozen=True, slots=True)
class CameraIntrinsics:
    """Pinhole parameters of one picture stream: size, focal lengths and principal point in px.

    Attributes:
        width, height: px.
        fx, fy: focal lengths in px; both 0 where the camera was never calibrated.
        cx, cy: principal point in px.
        distortion: coefficients in the order of ``model``; empty means none.
        model: ``plumb_bob`` (k1, k2, p1, p2, k3) or ``equidistant`` (k1, k2, k3, k4), as ``sensor_msgs/CameraInfo``
            names them.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    distortion: tuple[float, ...] = ()
    model: str = "plumb_bob"

    @property
    def calibrated(self) -> bool:
        """Whether focal lengths are known."""
        return self.fx > 0 and self.fy > 0


@dataclass(frozen=True, slots=True)
class CameraExtrinsics:
    """Pose of a camera's depth optical frame in its color optical frame (x right, y down, z forward).

    A point p of the depth frame is ``rotation @ p + translation`` in the color frame.

    Attributes:
        rotation: 3x3 rotation matrix, row by row.
        translation: (x, y, z), m.
    """

    rotation: tuple[float, ...]
    translation: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class CameraFrame:
    """One picture. Arrays are read-only.

    Attributes:
        color: shape (height, width, 3), uint8, RGB.
        depth: shape (height, width), uint16, mm, aligned to color; None when the camera has no depth.
        stamp_ns: monotonic time at which the picture was taken.
        number: number of the frame, which grows; the camera's own where it counts, else frames since ``connect``.
    """

    color: NDArray[np.uint8]
    depth: NDArray[np.uint16] | None
    stamp_ns: int
    number: int


class CameraDriver(Protocol):
    """A camera with color and, where it has it, aligned depth. Not thread-safe."""

    @property
    def name(self) -> str:
        """Short name for messages."""

    @property
    def fps(self) -> float:
        """Nominal frames per second."""

    @property
    def intrinsics(self) -> CameraIntrinsics:
        """Intrinsics of color (and of the aligned depth); valid once connected."""

    @property
    def has_depth(self) -> bool:
        """Whether frames carry aligned depth."""

    @property
    def serial_number(self) -> str:
        """Serial number of the device; empty where there is none or it is not connected yet."""

    @property
    def extrinsics(self) -> CameraExtrinsics | None:
        """Depth to color as the device reports it; None without."""

    def connect(self) -> None:
        """Open the camera. Does nothing when already connected.

        Raises:
            DriverError: the camera is missing or busy.
        """

    def read(self, timeout_s: float = 1.0) -> CameraFrame:
        """Wait for the next frame and return it. A frame that nobody read in time is dropped, not queued.

        A camera that was lost is looked for again by each call, so its return needs nothing else.

        Raises:
            DriverError: no frame came within ``timeout_s`` seconds, or the camera is not connected.
        """

    def close(self) -> None:
        """Release the camera. Safe to call at any time and more than once."""


class ColorOnly:
    """What a camera says that sees color only and has no serial number, for drivers to inherit."""

    @property
    def has_depth(self) -> bool:
        """Color only."""
        return False

    @property
    def serial_number(self) -> str:
        """There is none."""
        return ""

    @property
    def extrinsics(self) -> CameraExtrinsics | None:
        """There is no depth, hence none."""
        return None


@dataclass(frozen=True, slots=True)
class WrenchSample:
    """One reading of a force/torque sensor in its own frame, as the sensor sent it. Arrays are read-only.

    Attributes:
        stamp_ns: monotonic time at which the reading was taken, wire time taken off.
        force: (3,) float64, N.
        torque: (3,) float64, N m.
        number: count of valid readings since the sensor was connected, from 0.
    """

    stamp_ns: int
    force: NDArray[np.float64]
    torque: NDArray[np.float64]
    number: int


class WrenchDriver(Protocol):
    """A force/torque sensor that sends readings by itself. Not thread-safe."""

    @property
    def name(self) -> str:
        """Short name for messages."""

    def connect(self) -> None:
        """Find the sensor, read who it is, and start the readings.

        Raises:
            DriverError: the sensor is missing, busy or silent.
        """

    def read(self, timeout_s: float = 0.1) -> WrenchSample:
        """Wait for the next reading.

        Raises:
            DriverError: none came within ``timeout_s`` seconds, the sensor is unplugged, or not connected.
        """

    def close(self) -> None:
        """Stop the readings and release the sensor. Safe to call at any time and more than once."""
