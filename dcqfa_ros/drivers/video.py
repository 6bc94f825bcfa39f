"""A recorded video file as a camera: color only, at the pace of its frame rate or of its own stamps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from dcqfa_ros.drivers.opencv_camera import opencv, rgb
from dcqfa_ros.drivers.protocols import CameraFrame, CameraIntrinsics, ColorOnly, DriverError
from dcqfa_ros.drivers.realsense import RecordingEndedError

_PAUSE_NS = 1_000_000_000  # a reader that was away for longer goes on where it was; one that was late skips


class VideoCamera(ColorOnly):
    """Plays a video file in real time. Not thread-safe. Frames that nobody read in time are skipped."""

    def __init__(
        self,
        path: Path,
        at_end: Literal["loop", "end"] = "loop",
        pace: Literal["fps", "stamps"] = "fps",
        intrinsics: CameraIntrinsics | None = None,
    ) -> None:
        """Choose the file; nothing is opened.

        Args:
            path: anything OpenCV's FFmpeg reads.
            at_end: begin again, or end with :class:`RecordingEndedError`.
            pace: by the file's frame rate, or by each frame's presentation time.
            intrinsics: from a calibration of the camera that took it; without, focal lengths are 0.
        """
        self._path, self._at_end, self._pace = path, at_end, pace
        self._given = intrinsics
        self._intrinsics: CameraIntrinsics | None = None
        self._capture: Any = None
        self._fps = 0.0
        self._ended = False
        self._number = 0  # of the frame, over all rounds
        self._index = 0  # of the frame in the file
        self._held = False  # the frame grabbed last was not due yet
        self._begin_ns: int | None = None  # when frame 0 of this round was due
        self._last_due_ns = 0

    @property
    def name(self) -> str:
        """Short name for messages."""
        return f"video {self._path}"

    @property
    def fps(self) -> float:
        """Frames per second of the file; 0 before ``connect``."""
        return self._fps

    @property
    def intrinsics(self) -> CameraIntrinsics:
        """Those given; focal lengths are 0 without a calibration.

        Raises:
            DriverError: not connected yet, so the size is not known.
        """
        if self._intrinsics is None:
            raise DriverError(f"{self.name}: not connected, call connect() first")
        return self._intrinsics

    def connect(self) -> None:
        """Open the file; it plays from the first ``read`` on.

        Raises:
            DriverError: it does not exist, is no video, says no frame rate, or the calibration is of another size.
        """
        if self._capture is not None:
            return
        if not self._path.is_file():
            raise DriverError(f"{self.name} does not exist")
        cv2 = opencv()
        capture = cv2.VideoCapture(str(self._path))
        try:
            width, height = (int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            fps = float(capture.get(cv2.CAP_PROP_FPS))
            if not capture.isOpened() or width < 1 or height < 1:
                raise DriverError(f"{self.name} cannot be read as a video")
            if not 0 < fps <= 1000:
                raise DriverError(f"{self.name} says {fps:g} frames per second, expected above 0 and at most 1000")
            given = self._given
            if given is not None and (given.width, given.height) != (width, height):
                raise DriverError(
                    f"{self.name} is {width}x{height}, but calibrated at {given.width}x{given.height}: use a "
                    "calibration of that size"
                )
        except BaseException:
            capture.release()
            raise
        self._capture, self._fps, self._ended = capture, fps, False
        self._intrinsics = given or CameraIntrinsics(width, height, 0.0, 0.0, 0.0, 0.0)
        self._number, self._index, self._held, self._begin_ns = 0, 0, False, None

    def read(self, timeout_s: float = 1.0) -> CameraFrame:
        """Wait until the next frame is due and return it; see :class:`~dcqfa_ros.drivers.protocols.CameraDriver`.

        Raises:
            ValueError: ``timeout_s`` is not positive.
            RecordingEndedError: (a DriverError) the video has ended and is not repeated.
            DriverError: not connected, nothing is due in time, or the file holds no picture.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected a positive number of seconds, got {timeout_s}")
        if self._capture is None:
            raise DriverError(f"{self.name}: not connected, call connect() first")
        deadline = time.monotonic_ns() + round(timeout_s * 1e9)
        while True:
            if not self._grab():
                self._begin_again()
                continue
            self._held = False
            due, index = self._due_ns(), self._index
            self._index, self._last_due_ns = index + 1, due
            now = time.monotonic_ns()
            if now - due > 1e9 / self._fps and now < deadline:
                self._number += 1
                continue  # its successor is due already
            if due > deadline:
                self._held = True
                time.sleep(timeout_s)
                self._index = index
                raise DriverError(f"{self.name}: no frame within {timeout_s:g} s")
            if due > now:
                time.sleep((due - now) / 1e9)
            ok, picture = self._capture.retrieve()
            if not ok:
                raise DriverError(f"{self.name}: frame {index} cannot be decoded")
            number, self._number = self._number, self._number + 1
            return CameraFrame(rgb(picture, self.name), None, due, number)

    def _grab(self) -> bool:
        """Move to the next frame, unless one is held that was not due yet."""
        return self._held or bool(self._capture.grab())

    def _due_ns(self) -> int:
        """Return when the grabbed frame is due; a reader that comes back after a pause sets a new beginning."""
        if self._pace == "stamps":
            offset = round(float(self._capture.get(opencv().CAP_PROP_POS_MSEC)) * 1e6)
        else:
            offset = round(self._index * 1e9 / self._fps)
        now = time.monotonic_ns()
        if self._begin_ns is None or now - (self._begin_ns + offset) > _PAUSE_NS:
            self._begin_ns = now - offset
        return self._begin_ns + offset

    def _begin_again(self) -> None:
        if self._index == 0:
            raise DriverError(f"{self.name} holds no picture that can be decoded")
        if self._at_end == "end" or self._ended:
            self._ended = True
            raise RecordingEndedError(f"{self.name} has ended")
        self._capture.set(opencv().CAP_PROP_POS_FRAMES, 0)
        self._begin_ns, self._index, self._held = self._last_due_ns + round(1e9 / self._fps), 0, False

    def close(self) -> None:
        """Close the file; safe to call at any time and more than once."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.release()
