"""Videos of trials: a small WebM that every browser plays, with a poster, rendered from the recorded states."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcqfa_ros.errors import UserError
from dcqfa_ros.sim.render import render

VIDEO_SIZE_PX = 480
VIDEO_FPS = 10.0  # the cell's own rate: the video plays in real time
POSTER_QUALITY = 88
_CODEC = "VP80"  # VP9 makes the file a tenth smaller and takes five times as long
_HARMLESS = b"is not supported with codec id"  # OpenCV says so about every WebM tag, then does the right thing

Image = NDArray[np.uint8]


class VideoError(UserError):
    """The video cannot be made; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class TrialVideo:
    """An encoded video.

    Attributes:
        webm: the file's bytes, VP8 in WebM.
        poster: JPEG of the last picture, to be shown before the video plays.
        width: picture width, px.
        height: picture height, px.
        seconds: duration at the nominal rate.
    """

    webm: bytes
    poster: bytes
    width: int
    height: int
    seconds: float


def trial_video(
    states: Sequence[ArrayLike],
    targets: Sequence[ArrayLike | None] | None = None,
    size: int = VIDEO_SIZE_PX,
    fps: float = VIDEO_FPS,
) -> TrialVideo:
    """Render and encode a trial.

    Args:
        states: the cell's state per step, each (5,): agent x, y, block x, y [px], block theta [rad].
        targets: the commanded position per step, each (2,) px or None; None marks no targets at all.
        size: width and height of the picture, px, even.
        fps: pictures per second; 10 plays in real time.

    Raises:
        ValueError: no states, lists of different lengths, or a state, target, size or rate out of range.
        VideoError: the installed OpenCV cannot write WebM.
    """
    if targets is not None and len(targets) != len(states):
        raise ValueError(f"targets: expected one per state ({len(states)}), got {len(targets)}")
    marks: Sequence[ArrayLike | None] = [None] * len(states) if targets is None else targets
    return encode_video([render(state, size, size, mark) for state, mark in zip(states, marks, strict=True)], fps)


def encode_video(frames: Sequence[Image], fps: float = VIDEO_FPS) -> TrialVideo:
    """Encode ``frames``, each (height, width, 3) uint8 RGB of one even size, as WebM; the last one is the poster.

    Raises:
        ValueError: no frames, a rate that is not within 1..60, or frames of another type, of odd or of different sizes.
        VideoError: the installed OpenCV cannot write WebM.
    """
    if not frames:
        raise ValueError("video: expected at least one frame, got none")
    if not 1 <= fps <= 60:
        raise ValueError(f"video: expected 1 to 60 frames per second, got {fps}")
    shape = frames[0].shape
    if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
        raise ValueError(f"video: expected RGB frames of even height and width, got shape {shape}")
    height, width = shape[:2]
    with tempfile.TemporaryDirectory(prefix="dcqfa_video_") as folder:
        path = Path(folder) / "trial.webm"
        with _without_tag_message():
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*_CODEC), fps, (width, height))
        try:
            if not writer.isOpened():
                raise VideoError(
                    f"OpenCV {cv2.__version__} cannot write {_CODEC} in WebM: it was built without FFmpeg; install the "
                    "opencv-python package, or switch the report's video off"
                )
            for number, frame in enumerate(frames):
                if frame.shape != shape or frame.dtype != np.uint8:
                    raise ValueError(f"video: frame {number}: expected uint8 {shape}, got {frame.dtype} {frame.shape}")
                writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        finally:
            writer.release()
        webm = path.read_bytes()
    encoded, poster = cv2.imencode(
        ".jpg", cv2.cvtColor(frames[-1], cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, POSTER_QUALITY]
    )
    if not encoded or not webm:
        raise VideoError(f"OpenCV {cv2.__version__} wrote an empty video or poster")
    return TrialVideo(webm, poster.tobytes(), width, height, len(frames) / fps)


@contextmanager
def _without_tag_message() -> Iterator[None]:
    """Hold back one misleading line that OpenCV prints from C at every WebM; everything else is passed on."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        original = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            held.seek(0)
            for line in held.read().splitlines(keepends=True):
                if _HARMLESS not in line:
                    os.write(original, line)
            os.close(original)
