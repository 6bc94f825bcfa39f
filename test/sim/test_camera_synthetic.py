"""The synthetic camera is deterministic, RGB-D, on its own frame clock, and repeats without a seam."""

from __future__ import annotations

import numpy as np
import pytest

from dcqfa_ros.drivers.protocols import CameraDriver, DriverError
from dcqfa_ros.sim.camera_synthetic import FARTHEST_MM, NEAREST_MM, SCENE_ROWS, SyntheticCamera, scene


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [1_000_000_000]
    monkeypatch.setattr("dcqfa_ros.sim.camera_synthetic.time.monotonic_ns", lambda: now[0])
    monkeypatch.setattr(
        "dcqfa_ros.sim.camera_synthetic.time.sleep", lambda s: now.__setitem__(0, now[0] + round(s * 1e9))
    )
    return now


def test_frames_show_the_scene_from_the_row_of_their_number(clock: list[int]) -> None:
    camera: CameraDriver = SyntheticCamera("front", 64, 48, 10.0)
    camera.connect()
    color, depth = scene(64, 48)
    for number in range(3):
        frame = camera.read()
        assert (frame.number, frame.stamp_ns) == (number, 1_000_000_000 + number * 100_000_000)
        np.testing.assert_array_equal(frame.color, color[number : number + 48])
        assert frame.depth is not None
        np.testing.assert_array_equal(frame.depth, depth[number : number + 48])
        assert not frame.color.flags.writeable and not frame.depth.flags.writeable
        assert frame.color.flags.c_contiguous and frame.depth.flags.c_contiguous, "published without a copy first"
    camera.close()
    camera.close()


def test_ticks_that_nobody_read_leave_a_gap_in_the_numbers(clock: list[int]) -> None:
    camera = SyntheticCamera(fps=10.0)
    camera.connect()
    camera.read()
    clock[0] += 350_000_000
    assert [camera.read().number for _ in range(2)] == [3, 4]


def test_the_scene_has_valid_and_unknown_depth_and_no_seam() -> None:
    color, depth = scene(64, 48)
    assert color.shape == (SCENE_ROWS + 47, 64, 3)
    valid = depth[depth > 0]
    assert NEAREST_MM <= valid.min() < valid.max() <= FARTHEST_MM
    assert (depth == 0).any()
    np.testing.assert_array_equal(color[SCENE_ROWS:], color[:47])
    np.testing.assert_array_equal(depth[SCENE_ROWS:], depth[:47])


def test_out_of_order_use_and_senseless_values_are_refused() -> None:
    with pytest.raises(DriverError, match="not connected"):
        SyntheticCamera().read()
    for options in ({"width": 8}, {"height": 10_000}, {"fps": 0.0}, {"fps": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SyntheticCamera(**options)
    camera = SyntheticCamera(fps=1.0)
    camera.connect()
    camera.read()
    with pytest.raises(DriverError, match=r"no frame within 0\.01 s"):
        camera.read(0.01)
