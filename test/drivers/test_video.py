"""A video file as a camera: at its own pace, skipping what is overdue, repeated or ended as asked."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from dcqfa_ros.drivers.protocols import CameraDriver, CameraIntrinsics, DriverError
from dcqfa_ros.drivers.realsense import RecordingEndedError
from dcqfa_ros.drivers.video import VideoCamera

FRAMES, FPS = 12, 20.0


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frame n is gray with brightness 20 n, which Motion JPEG keeps within a few steps, with a red left half."""
    path = tmp_path_factory.mktemp("video") / "gray.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), FPS, (64, 48))
    assert writer.isOpened()
    for number in range(FRAMES):
        picture = np.full((48, 64, 3), 20 * number, dtype=np.uint8)
        picture[:, :32] = (0, 0, 250)
        writer.write(picture)
    writer.release()
    return path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [1_000_000_000]
    monkeypatch.setattr("dcqfa_ros.drivers.video.time.monotonic_ns", lambda: now[0])
    monkeypatch.setattr("dcqfa_ros.drivers.video.time.sleep", lambda s: now.__setitem__(0, now[0] + round(s * 1e9)))
    return now


def shown(frame) -> int:
    return round(float(frame.color[:, 40:].mean()) / 20)


@pytest.mark.parametrize("pace", ["fps", "stamps"])
def test_frames_come_in_order_at_the_files_pace_in_rgb(file: Path, clock: list[int], pace) -> None:
    camera: CameraDriver = VideoCamera(file, "end", pace)
    camera.connect()
    assert (camera.fps, camera.intrinsics.width, camera.intrinsics.height) == (FPS, 64, 48)
    frames = [camera.read() for _ in range(FRAMES)]
    assert [shown(f) for f in frames] == list(range(FRAMES))
    assert [f.number for f in frames] == list(range(FRAMES))
    assert np.allclose(np.diff([f.stamp_ns for f in frames]), 1e9 / FPS, atol=1e6)
    red = frames[5].color[24, 8]
    assert red[0] > 200 and red[2] < 60
    for _ in range(2):
        with pytest.raises(RecordingEndedError, match=r"gray\.avi has ended"):
            camera.read()
    camera.close()
    camera.close()


def test_a_repeated_video_goes_on_without_a_gap(file: Path, clock: list[int]) -> None:
    camera = VideoCamera(file, "loop")
    camera.connect()
    frames = [camera.read() for _ in range(2 * FRAMES + 3)]
    assert [shown(f) for f in frames] == [*range(FRAMES), *range(FRAMES), 0, 1, 2]
    assert [f.number for f in frames] == list(range(2 * FRAMES + 3))
    assert np.allclose(np.diff([f.stamp_ns for f in frames]), 1e9 / FPS, atol=1e6)


def test_a_late_reader_skips_and_one_who_paused_goes_on(file: Path, clock: list[int]) -> None:
    camera = VideoCamera(file)
    camera.connect()
    camera.read()
    clock[0] += 220_000_000  # 4.4 periods
    late = camera.read()
    assert (shown(late), late.number) == (4, 4), "the newest that is due"
    clock[0] += 30_000_000_000
    assert shown(camera.read()) == 5


def test_a_frame_that_is_not_due_in_time_is_kept(file: Path, clock: list[int]) -> None:
    camera = VideoCamera(file)
    camera.connect()
    camera.read()
    with pytest.raises(DriverError, match=r"no frame within 0\.01 s"):
        camera.read(0.01)
    assert shown(camera.read()) == 1


@pytest.mark.parametrize("pace", ["fps", "stamps"])
def test_a_frame_that_was_kept_and_then_missed_is_skipped(file: Path, clock: list[int], pace) -> None:
    camera = VideoCamera(file, "loop", pace)
    camera.connect()
    camera.read()
    with pytest.raises(DriverError, match="no frame within"):
        camera.read(0.01)
    clock[0] += 210_000_000  # 0.22 s after frame 0: 4.4 periods
    late = camera.read()
    assert (shown(late), late.number) == (4, 4)
    assert shown(camera.read()) == 5


def test_real_time_is_kept(file: Path) -> None:
    camera = VideoCamera(file)
    camera.connect()
    began = time.monotonic()
    while camera.read().number < 6:
        pass
    assert time.monotonic() - began > 5 / FPS


def test_files_that_are_no_video_are_refused_by_name(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"none\.mp4 does not exist"):
        VideoCamera(tmp_path / "none.mp4").connect()
    text = tmp_path / "text.mp4"
    text.write_text("no video " * 100)
    with pytest.raises(DriverError, match=r"text\.mp4 cannot be read as a video"):
        VideoCamera(text).connect()
    with pytest.raises(DriverError, match="64x48, but calibrated at 640x480"):
        VideoCamera(file, intrinsics=CameraIntrinsics(640, 480, 600.0, 600.0, 320.0, 240.0)).connect()
    with pytest.raises(DriverError, match="not connected"):
        VideoCamera(file).read()
    with pytest.raises(DriverError, match="not connected"):
        _ = VideoCamera(file).intrinsics
