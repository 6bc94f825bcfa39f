"""Hand-eye calibration finds the camera of made-up poses, says how well, and refuses poses that cannot tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dcqfa_ros.cli import main
from dcqfa_ros.drivers.extrinsics import CalibrationError, FramePose, load_extrinsics
from dcqfa_ros.drivers.hand_eye import Samples, load_samples, solve
from dcqfa_ros.rotations import quaternion_of


def random_pose(rng: np.random.Generator, spread: float, turn: float) -> np.ndarray:
    axis = rng.normal(size=3)
    half = turn * rng.uniform(0.5, 1.0) / 2
    q = [*(axis / np.linalg.norm(axis) * np.sin(half)), np.cos(half)]
    pose = FramePose(position=tuple(rng.uniform(-spread, spread, 3)), orientation=tuple(q))
    return pose.matrix()


def as_pose(transform: np.ndarray) -> dict[str, Any]:
    return {"position": transform[:3, 3].tolist(), "orientation": quaternion_of(transform[:3, :3]).tolist()}


def made_up(mount: str, noise_m: float = 0.0, count: int = 16, turn: float = 1.2) -> tuple[dict[str, Any], np.ndarray]:
    """Return a samples document and where the camera really is."""
    rng = np.random.default_rng(3)
    camera, board = random_pose(rng, 0.1, 1.0), random_pose(rng, 0.5, 2.0)
    samples = []
    for _ in range(count):
        tool = random_pose(rng, 0.3, turn)
        # wrist: the board is fixed in world; world: it is fixed in the tool, the camera in world.
        seen = np.linalg.inv(tool @ camera) @ board if mount == "wrist" else np.linalg.inv(camera) @ tool @ board
        seen[:3, 3] += rng.normal(scale=noise_m, size=3) if noise_m else 0.0
        samples.append({"tool": as_pose(tool), "board": as_pose(seen)})
    return {"schema_version": 1, "mount": mount, "samples": samples}, camera


@pytest.mark.parametrize(("mount", "parent"), [("wrist", "tool"), ("world", "world")])
def test_a_camera_is_found_where_it_is(mount: str, parent: str) -> None:
    document, camera = made_up(mount)
    result = solve(Samples.model_validate(document))
    assert np.allclose(result.transform, camera, atol=1e-5)
    assert result.residual_mm < 0.01
    assert (result.parent, result.samples, result.held_out) == (parent, 16, 4)


def test_noise_shows_in_the_residual() -> None:
    document, camera = made_up("wrist", noise_m=0.002, count=40)
    result = solve(Samples.model_validate(document))
    assert 1.0 < result.residual_mm < 10.0
    assert np.linalg.norm(result.transform[:3, 3] - camera[:3, 3]) < 0.01


def test_orientations_that_differ_too_little_are_refused() -> None:
    document, _ = made_up("wrist", turn=0.05)
    with pytest.raises(CalibrationError, match="expected at least 10: take poses that turn about two axes"):
        solve(Samples.model_validate(document))


def test_turning_about_one_axis_only_is_refused() -> None:
    document, _ = made_up("wrist")
    for i, sample in enumerate(document["samples"]):
        sample["tool"]["orientation"] = [0.0, 0.0, float(np.sin(i / 20)), float(np.cos(i / 20))]
    with pytest.raises(CalibrationError, match="about a second axis"):
        solve(Samples.model_validate(document))


def test_bad_files_are_refused_by_field(tmp_path: Path) -> None:
    document, _ = made_up("wrist")
    file = tmp_path / "samples.yaml"
    document["samples"][3]["board"]["orientation"] = [0.0, 0.0, 0.0, 0.5]
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(CalibrationError, match=r"samples.3.board.orientation: .* unit quaternion"):
        load_samples(file)
    file.write_text(yaml.safe_dump({**document, "samples": document["samples"][:3]}))
    with pytest.raises(CalibrationError, match=r"samples: .*at least 8"):
        load_samples(file)
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_samples(tmp_path / "nowhere.yaml")


def test_the_command_prints_an_entry_that_the_calibration_file_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, camera = made_up("wrist", noise_m=0.005)
    file = tmp_path / "samples.yaml"
    file.write_text(yaml.safe_dump(document))
    assert main(["calibrate", "wrist", str(file)]) == 0
    text = capsys.readouterr().out
    assert "mm is a lot" in text
    (tmp_path / "extrinsics.yaml").write_text(text)
    pose = load_extrinsics(tmp_path / "extrinsics.yaml", ("wrist",)).cameras["wrist"]
    assert np.linalg.norm(pose.matrix()[:3, 3] - camera[:3, 3]) < 0.05
    assert main(["calibrate", "wrist", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cameras"]["wrist"]["status"] == "calibrated"
