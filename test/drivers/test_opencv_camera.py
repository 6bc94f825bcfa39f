"""UVC cameras through OpenCV: refusals by name, RGB order, stamps, loss and return."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import cv2
import numpy as np
import pytest

from dcqfa_ros.drivers.opencv_camera import OpenCVCamera
from dcqfa_ros.drivers.protocols import CameraDriver, CameraIntrinsics, DriverError


class Capture:
    """Stands for ``cv2.VideoCapture``: pictures of one BGR color, until it is unplugged."""

    def __init__(self, width: int = 64, height: int = 48, opened: bool = True, kernel_ms: float = 0.0) -> None:
        self.size, self.opened, self.kernel_ms, self.plugged = (width, height), opened, kernel_ms, True
        self.released = False
        self.asked: dict[int, float] = {}

    def isOpened(self) -> bool:  # noqa: N802 - OpenCV's name
        return self.opened and self.plugged

    def set(self, name: int, value: float) -> bool:
        self.asked[name] = value
        return True

    def get(self, name: int) -> float:
        return self.kernel_ms if name == cv2.CAP_PROP_POS_MSEC else 0.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        if not self.plugged:
            return False, None
        return True, np.full((self.size[1], self.size[0], 3), (10, 20, 30), dtype=np.uint8)

    def release(self) -> None:
        self.released = True


def camera_on(make: Callable[[], Capture]) -> OpenCVCamera:
    return OpenCVCamera("/dev/video7", 64, 48, 30.0, opener=make)


def test_pictures_are_rgb_and_numbered() -> None:
    capture = Capture()
    camera: CameraDriver = camera_on(lambda: capture)
    camera.connect()
    frames = [camera.read() for _ in range(3)]
    assert frames[0].color[0, 0].tolist() == [30, 20, 10]
    assert [f.number for f in frames] == [0, 1, 2]
    assert frames[0].depth is None and not camera.has_depth and camera.extrinsics is None
    assert not camera.intrinsics.calibrated
    assert capture.asked[cv2.CAP_PROP_FRAME_WIDTH] == 64
    assert capture.asked[cv2.CAP_PROP_BUFFERSIZE] == 1
    camera.close()
    camera.close()
    assert capture.released


def test_a_kernel_stamp_is_used_only_where_it_is_monotonic() -> None:
    capture = Capture()
    camera = camera_on(lambda: capture)
    camera.connect()
    taken = time.monotonic_ns() - 50_000_000
    capture.kernel_ms = taken / 1e6
    assert abs(camera.read().stamp_ns - taken) < 1000
    capture.kernel_ms = time.time() * 1e3
    assert time.monotonic_ns() - camera.read().stamp_ns < 1_000_000_000


def test_a_lost_camera_is_named_and_used_again_when_it_is_back() -> None:
    captures: list[Capture] = []

    def make() -> Capture:
        captures.append(Capture(opened=len(captures) not in (1, 2)))
        return captures[-1]

    camera = camera_on(make)
    camera.connect()
    camera.read()
    captures[0].plugged = False
    with pytest.raises(DriverError, match=r"OpenCV camera /dev/video7 was lost"):
        camera.read()
    assert captures[0].released
    with pytest.raises(DriverError, match="cannot be opened"):
        camera.read(0.01)
    assert camera.read(5.0).number == 1
    assert len(captures) == 4


def test_what_cannot_be_opened_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DriverError, match=r"OpenCV camera /dev/no_such_camera does not exist"):
        OpenCVCamera("/dev/no_such_camera").connect()
    with pytest.raises(DriverError, match=r"OpenCV camera 97 cannot be opened: not connected"):
        OpenCVCamera("97").connect()
    with pytest.raises(DriverError, match="does not offer 64x48, it delivers 640x480"):
        camera_on(lambda: Capture(640, 480)).connect()
    silent = Capture()
    silent.read = lambda: (False, None)  # type: ignore[method-assign]
    with pytest.raises(DriverError, match="delivers no picture: another program"):
        camera_on(lambda: silent).connect()
    assert silent.released
    with pytest.raises(DriverError, match="device is empty"):
        OpenCVCamera("")
    with pytest.raises(DriverError, match=r"calibrated at 32x24, expected 64x48"):
        OpenCVCamera("0", 64, 48, 30.0, CameraIntrinsics(32, 24, 30.0, 30.0, 16.0, 12.0))
    with pytest.raises(DriverError, match="not connected"):
        OpenCVCamera("0").read()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DriverError, match=r"OpenCV cannot be loaded .*requirements/robot.txt"):
        OpenCVCamera("0").connect()
