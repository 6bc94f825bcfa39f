"""Any UVC camera through OpenCV: color only, by index or device path."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers.protocols import CameraFrame, CameraIntrinsics, ColorOnly, DriverError

_RETRY_S = 0.2
_PLAUSIBLE_NS = 1_000_000_000


def opencv() -> Any:
    """Import and return ``cv2``.

    Raises:
        DriverError: it is not installed.
    """
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise DriverError(
            f"OpenCV cannot be loaded ({error}): pip install -r requirements/robot.txt, or python3-opencv from apt"
        ) from error


def rgb(picture: Any, what: str) -> NDArray[np.uint8]:
    """Return OpenCV's picture (BGR or gray, uint8) as read-only (height, width, 3) RGB.

    Raises:
        DriverError: it has another form.
    """
    cv2 = opencv()
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim not in (2, 3):
        raise DriverError(f"{what}: expected an 8-bit picture, got {getattr(picture, 'dtype', type(picture).__name__)}")
    code = cv2.COLOR_GRAY2RGB if picture.ndim == 2 or picture.shape[2] == 1 else cv2.COLOR_BGR2RGB
    result: NDArray[np.uint8] = cv2.cvtColor(picture, code)
    result.flags.writeable = False
    return result


class OpenCVCamera(ColorOnly):
    """A camera that OpenCV can open (on Linux: V4L2). Not thread-safe.

    A camera that stops delivering is closed; each further ``read`` tries to open it again. Stamps are the kernel's own
    where they are monotonic, as those of ``uvcvideo`` are; otherwise the time of arrival.
    """

    def __init__(
        self,
        device: str,
        width: int = 640,
        height: int = 480,
        fps: float = 30.0,
        intrinsics: CameraIntrinsics | None = None,
        opener: Callable[[], Any] | None = None,
    ) -> None:
        """Choose the device; nothing is opened.

        Args:
            device: index (``0``) or path (``/dev/video0``, ``/dev/v4l/by-id/...``, which stays the same camera).
            width: px.
            height: px.
            fps: pictures per second to ask for.
            intrinsics: from a calibration; without them focal lengths are 0, ROS' sign for "not calibrated".
            opener: makes the ``cv2.VideoCapture``; for tests.

        Raises:
            DriverError: a value is out of range, or the calibration is of another size.
        """
        if not device:
            raise DriverError("OpenCV camera: device is empty, expected an index (0) or a path (/dev/video0)")
        if not (1 <= width <= 8192 and 1 <= height <= 8192 and 0 < fps <= 1000):
            raise DriverError(f"OpenCV camera {device}: {width}x{height} at {fps:g} Hz is out of range")
        self._intrinsics = intrinsics or CameraIntrinsics(width, height, 0.0, 0.0, 0.0, 0.0)
        if (self._intrinsics.width, self._intrinsics.height) != (width, height):
            raise DriverError(
                f"OpenCV camera {device}: calibrated at {self._intrinsics.width}x{self._intrinsics.height}, "
                f"expected {width}x{height}"
            )
        self._device, self._size, self._fps = device, (width, height), float(fps)
        self._opener = opener or self._video_capture
        self._capture: Any = None
        self._connected = False
        self._number = 0

    @property
    def name(self) -> str:
        """Short name for messages."""
        return f"OpenCV camera {self._device}"

    @property
    def fps(self) -> float:
        """Nominal frames per second."""
        return self._fps

    @property
    def intrinsics(self) -> CameraIntrinsics:
        """Those given; focal lengths are 0 without a calibration."""
        return self._intrinsics

    def _video_capture(self) -> Any:
        cv2 = opencv()
        backend = cv2.CAP_V4L2 if sys.platform == "linux" else cv2.CAP_ANY
        if self._device.isdecimal():
            return cv2.VideoCapture(int(self._device), backend)
        if not Path(self._device).exists():
            raise DriverError(f"{self.name} does not exist: connect it, or look for it with ls /dev/v4l/by-id")
        return cv2.VideoCapture(str(Path(self._device).resolve()), backend)

    def connect(self) -> None:
        """Open the camera and check the size it delivers.

        Raises:
            DriverError: missing, taken by another program, without that size, or OpenCV is not installed.
        """
        if not self._connected:
            self._open()
            self._connected, self._number = True, 0

    def _open(self) -> None:
        cv2 = opencv()
        capture = self._opener()
        try:
            if not capture.isOpened():
                raise DriverError(
                    f"{self.name} cannot be opened: not connected, no permission (group video), or another program "
                    "uses it"
                )
            width, height = self._size
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # a late reader gets the newest picture
            capture.set(cv2.CAP_PROP_FRAME_WIDTH, width)
            capture.set(cv2.CAP_PROP_FRAME_HEIGHT, height)
            capture.set(cv2.CAP_PROP_FPS, self._fps)
            ok, picture = capture.read()
            if not ok:
                raise DriverError(f"{self.name} delivers no picture: another program uses it, or the link is too slow")
            have = (picture.shape[1], picture.shape[0])
            if have != self._size:
                raise DriverError(f"{self.name} does not offer {width}x{height}, it delivers {have[0]}x{have[1]}")
        except BaseException:
            capture.release()
            raise
        self._capture = capture

    def read(self, timeout_s: float = 1.0) -> CameraFrame:
        """Wait for the next picture; see :class:`~dcqfa_ros.drivers.protocols.CameraDriver`.

        OpenCV itself waits up to 10 s for a camera that is there and silent.

        Raises:
            ValueError: ``timeout_s`` is not positive.
            DriverError: not connected, or the camera does not deliver; the next call opens it again.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected a positive number of seconds, got {timeout_s}")
        if not self._connected:
            raise DriverError(f"{self.name}: not connected, call connect() first")
        if self._capture is None:
            self._reopen(time.monotonic() + timeout_s)
        ok, picture = self._capture.read()
        arrival = time.monotonic_ns()
        if not ok or picture is None or (picture.shape[1], picture.shape[0]) != self._size:
            self._release()
            raise DriverError(f"{self.name} was lost; it is used again as soon as it is back")
        number, self._number = self._number, self._number + 1
        return CameraFrame(rgb(picture, self.name), None, self._stamp(arrival), number)

    def _stamp(self, arrival: int) -> int:
        kernel = round(self._capture.get(opencv().CAP_PROP_POS_MSEC) * 1e6)
        return kernel if arrival - _PLAUSIBLE_NS < kernel <= arrival else arrival

    def _reopen(self, deadline: float) -> None:
        while True:
            try:
                self._open()
                return
            except DriverError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                time.sleep(min(left, _RETRY_S))

    def _release(self) -> None:
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.release()

    def close(self) -> None:
        """Close the camera; safe to call at any time and more than once."""
        self._connected = False
        self._release()
