"""Videos play back as what was put in, and stay small."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from dcqfa_ros.sim.render import render
from dcqfa_ros.trials.video import TrialVideo, VideoError, encode_video, trial_video

MEGABYTE = 2**20


def decode(video: TrialVideo, folder: Path) -> tuple[list[np.ndarray], float]:
    """Return the RGB pictures and the nominal rate read back from the file."""
    path = folder / "video.webm"
    path.write_bytes(video.webm)
    capture = cv2.VideoCapture(str(path))
    rate = capture.get(cv2.CAP_PROP_FPS)
    frames = []
    while True:
        there, frame = capture.read()
        if not there:
            break
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    capture.release()
    return frames, rate


def moving(count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """States and targets of an agent that circles a turning block."""
    angles = np.linspace(0, 6 * np.pi, count)
    states = [np.array([256 + 200 * np.cos(a), 256 + 200 * np.sin(a), 256.0, 220.0, a / 3]) for a in angles]
    return states, [state[:2] + 20 for state in states]


def test_every_picture_plays_back(tmp_path: Path) -> None:
    states, targets = moving(12)
    video = trial_video(states, targets, size=240)
    frames, rate = decode(video, tmp_path)
    assert (len(frames), rate, video.seconds) == (12, 10.0, 1.2)
    assert (video.width, video.height) == (240, 240)
    for frame, state, target in zip(frames, states, targets, strict=True):
        assert np.abs(frame.astype(int) - render(state, 240, 240, target)).mean() < 4.0


def test_the_poster_is_the_last_picture() -> None:
    states, _ = moving(3)
    poster = cv2.imdecode(np.frombuffer(trial_video(states, size=240).poster, np.uint8), cv2.IMREAD_COLOR)
    assert poster is not None
    expected = render(states[-1], 240, 240)
    assert np.abs(poster[..., ::-1].astype(int) - expected).mean() < 3.0


def test_a_full_trial_of_busy_motion_stays_below_two_megabytes() -> None:
    states, targets = moving(300)
    video = trial_video(states, targets)
    assert (video.width, video.height, video.seconds) == (480, 480, 30.0)
    assert len(video.webm) < 2 * MEGABYTE
    assert len(video.poster) < MEGABYTE / 8


def test_nothing_is_printed_and_other_messages_pass(capfd: pytest.CaptureFixture[str]) -> None:
    encode_video([np.zeros((64, 64, 3), np.uint8)])
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_encoded_is_refused() -> None:
    good = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="at least one frame"):
        trial_video([])
    with pytest.raises(ValueError, match="targets: expected one per state"):
        trial_video([np.zeros(5)], [])
    for frames in ([good[:63]], [good[..., 0]], [good, good[:32]], [good.astype(float)]):
        with pytest.raises(ValueError, match="video"):
            encode_video(frames)
    for fps in (0.0, 1000.0, float("nan")):
        with pytest.raises(ValueError, match="frames per second"):
            encode_video([good], fps)


def test_an_opencv_without_ffmpeg_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def __init__(self, *arguments: object) -> None:
            pass

        fourcc = staticmethod(cv2.VideoWriter.fourcc)

        def isOpened(self) -> bool:  # noqa: N802 - OpenCV's name
            return False

        def release(self) -> None:
            pass

    monkeypatch.setattr(cv2, "VideoWriter", Closed)
    with pytest.raises(VideoError, match="FFmpeg"):
        encode_video([np.zeros((64, 64, 3), np.uint8)])
