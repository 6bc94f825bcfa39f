"""The simulated camera renders what the cell shows, at its own rate, and says when there is no cell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dcqfa_ros.drivers.protocols import CameraDriver, DriverError
from dcqfa_ros.sim.camera import CAMERA_HEIGHT_M, SimulatedCamera
from dcqfa_ros.sim.cell_state import CellStateError, CellStateReader, CellStateWriter
from dcqfa_ros.sim.render import render
from dcqfa_ros.sim.tee import METRES_PER_PIXEL

STATE = [100.0, 120.0, 350.0, 150.0, 0.3]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CellStateWriter]:
    cell = CellStateWriter("cell", tmp_path)
    yield cell
    cell.close()


def make_camera(folder: Path, fps: float = 200.0, width: int = 64, height: int = 48) -> SimulatedCamera:
    reader = CellStateReader("cell", directory=folder)
    camera: CameraDriver = SimulatedCamera("cell", width, height, fps, reader=reader)
    assert isinstance(camera, SimulatedCamera)
    return camera


def test_frames_are_rendered_from_the_cells_state(writer: CellStateWriter, tmp_path: Path) -> None:
    camera = make_camera(tmp_path)
    camera.connect()
    writer.write(STATE, None)
    first = camera.read()
    np.testing.assert_array_equal(first.color, render(STATE, 64, 48))
    assert first.depth is None
    assert first.number == 0
    writer.write(STATE, (10.0, 20.0))
    second = camera.read()
    np.testing.assert_array_equal(second.color, render(STATE, 64, 48, (10.0, 20.0)))
    assert second.number == 1
    assert second.stamp_ns > first.stamp_ns
    camera.close()


def test_frames_keep_the_cameras_rate_and_missed_ones_are_dropped(
    writer: CellStateWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_000_000_000]
    monkeypatch.setattr("dcqfa_ros.sim.camera.time.monotonic_ns", lambda: now[0])
    monkeypatch.setattr("dcqfa_ros.sim.camera.time.sleep", lambda s: now.__setitem__(0, now[0] + round(s * 1e9)))
    writer.write(STATE, None)
    camera = make_camera(tmp_path, fps=10.0)
    camera.connect()
    stamps = [camera.read().stamp_ns for _ in range(3)]
    assert np.diff(stamps).tolist() == [100_000_000] * 2
    now[0] += 250_000_000  # a reader that comes 2.5 periods later
    stamps += [camera.read().stamp_ns for _ in range(2)]
    assert stamps[3] - stamps[2] == 250_000_000  # the overdue frame at once
    assert stamps[4] - stamps[2] == 300_000_000  # then back on the beat


def test_a_missing_cell_is_reported_and_found_once_it_starts(tmp_path: Path) -> None:
    camera = make_camera(tmp_path)
    camera.connect()
    with pytest.raises(CellStateError, match="no simulated cell"):
        camera.read()
    writer = CellStateWriter("cell", tmp_path)
    with pytest.raises(CellStateError, match="not shown a state yet"):
        camera.read()
    writer.write(STATE, None)
    assert camera.read().number == 0
    writer.close()
    with pytest.raises(CellStateError, match="gone"):
        camera.read()
    camera.close()
    camera.close()


def test_misuse_is_refused(writer: CellStateWriter, tmp_path: Path) -> None:
    writer.write(STATE, None)
    camera = make_camera(tmp_path, fps=0.5)
    for call in (camera.read, camera.capture):
        with pytest.raises(DriverError, match="connect"):
            call()
    camera.connect()
    camera.read()
    with pytest.raises(DriverError, match="no frame within"):
        camera.read(timeout_s=0.01)
    with pytest.raises(ValueError, match="timeout_s"):
        camera.read(timeout_s=0.0)
    for wrong in ({"width": 1}, {"height": 100_000}, {"fps": 0.0}, {"fps": 1e9}, {"fps": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SimulatedCamera("cell", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "height"), [(640, 480), (96, 96)])
def test_intrinsics_project_the_table_to_where_it_is_drawn(width: int, height: int) -> None:
    intrinsics = SimulatedCamera("cell", width, height).intrinsics
    image = render([400.0, 128.0, 100.0, 400.0, 0.0], width, height)
    x, y = ((v - 256.0) * METRES_PER_PIXEL for v in (400.0, 128.0))  # from the table's centre, in metres
    column = intrinsics.fx * x / CAMERA_HEIGHT_M + intrinsics.cx
    row = intrinsics.fy * y / CAMERA_HEIGHT_M + intrinsics.cy
    blue = (image[..., 2] > 200) & (image[..., 0] < 90)
    np.testing.assert_allclose(np.argwhere(blue).mean(axis=0), (row, column), atol=0.5)
