"""The calibration file of the cameras: what is wrong in it is refused by field, and poses mean what they say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.drivers.extrinsics import CalibrationError, CameraPose, load_extrinsics, static_transforms
from dcqfa_ros.paths import find_config

GOOD: dict[str, Any] = {
    "schema_version": 1,
    "cameras": {
        "wrist": {
            "parent": "flange",
            "position": [0.0, -0.07, 0.03],
            "orientation": [0.0, 0.0, 0.0, 1.0],
            "status": "calibrated",
            "date": "2026-05-04",
            "residual_mm": 1.2,
        }
    },
}


def written(folder: Path, document: Any) -> Path:
    file = folder / "extrinsics.yaml"
    file.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return file


def test_the_shipped_file_holds_both_cameras_and_claims_no_calibration() -> None:
    extrinsics = load_extrinsics(find_config("camera_extrinsics"), ("wrist", "front"))
    assert {pose.status for pose in extrinsics.cameras.values()} == {"nominal"}
    forward = extrinsics.cameras["front"].matrix()[:3, 2]
    assert forward[1] < -0.5 and forward[2] < -0.3, "the front camera looks back at the arm and down"


def test_a_good_file_is_read(tmp_path: Path) -> None:
    pose = load_extrinsics(written(tmp_path, GOOD), ("wrist",)).cameras["wrist"]
    assert pose.residual_mm == 1.2
    assert np.allclose(pose.matrix(), [[1, 0, 0, 0], [0, 1, 0, -0.07], [0, 0, 1, 0.03], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("parent", "table", "cameras.wrist.parent: .*'flange'"),
        ("position", [0.0, 1.0], "cameras.wrist.position.2"),
        ("position", [0.0, 1.0, 70.0], "cameras.wrist.position.2: .*less than or equal to 5, got 70.0"),
        ("position", [0.0, 1.0, float("nan")], "cameras.wrist.position.2"),
        ("orientation", [0.0, 0.0, 0.0, 0.9], "cameras.wrist.orientation: .*unit quaternion .* norm is 0.9000"),
        ("orientation", [0.0, 0.0, 0.0, 0.0], "unit quaternion"),
        ("status", "guessed", "cameras.wrist.status"),
        ("residual_mm", -1.0, "cameras.wrist.residual_mm"),
        ("date", "some day", "cameras.wrist.date"),
        ("date", None, "status is calibrated: date and residual_mm are needed"),
        ("postion", [0.0] * 3, "cameras.wrist.postion"),
    ],
)
def test_a_bad_field_is_refused_by_name(tmp_path: Path, field: str, value: Any, message: str) -> None:
    document = copy.deepcopy(GOOD)
    document["cameras"]["wrist"][field] = value
    file = written(tmp_path, document)
    with pytest.raises(CalibrationError, match=message) as caught:
        load_extrinsics(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file: "),
        ("[1, 2]", "the file: "),
        ("{", "not YAML"),
        ("schema_version: 2\ncameras: {}", "schema_version"),
        ("schema_version: 1\ncameras: {}", "cameras: "),
        ("schema_version: 1", "cameras: Field required"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_extrinsics(written(tmp_path, text))


def test_missing_files_and_cameras_are_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere.yaml: cannot be read"):
        load_extrinsics(tmp_path / "nowhere.yaml")
    with pytest.raises(CalibrationError, match="no entry for front; there is wrist"):
        load_extrinsics(written(tmp_path, GOOD), ("wrist", "front"))


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_every_orientation_is_a_rotation(quaternion: list[float]) -> None:
    unit = np.asarray(quaternion) / np.linalg.norm(quaternion)
    pose = CameraPose(parent="world", position=(0.0, 0.0, 0.0), orientation=tuple(unit), status="nominal")
    rotation = pose.matrix()[:3, :3]
    assert np.allclose(rotation @ rotation.T, np.eye(3))
    assert np.linalg.det(rotation) == pytest.approx(1.0)


def test_the_static_transforms_name_the_frames(tmp_path: Path) -> None:
    (line,) = static_transforms(load_extrinsics(written(tmp_path, GOOD)))
    text = " ".join(line)
    assert "--y -0.07" in text
    assert "--frame-id flange --child-frame-id wrist_color_optical_frame" in text
