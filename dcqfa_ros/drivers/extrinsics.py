"""Where the cameras are: the calibration file, checked before anything relies on it.

A pose is that of a camera's color optical frame (x right, y down, z forward) in its parent: the arm's ``flange`` or
``tool`` for a camera on the wrist, ``world`` for one that stands beside the arm.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator, model_validator

from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.errors import UserError
from dcqfa_ros.rotations import transform

_UNIT_TOLERANCE = 1e-3
_Coordinate = Annotated[float, Field(ge=-5.0, le=5.0)]
_Component = Annotated[float, Field(ge=-1.001, le=1.001)]


class CalibrationError(UserError, ValueError):
    """A calibration file that cannot be relied on; the message names file, field, value and what was expected."""


class FramePose(StrictModel):
    """Position (3,) in m and orientation as unit quaternion (x, y, z, w) of one frame in another."""

    position: tuple[_Coordinate, _Coordinate, _Coordinate]
    orientation: tuple[_Component, _Component, _Component, _Component]

    @field_validator("orientation")
    @classmethod
    def _unit(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        norm = float(np.linalg.norm(value))
        if abs(norm - 1.0) > _UNIT_TOLERANCE:
            raise ValueError(f"expected a unit quaternion (x, y, z, w), the norm is {norm:.4f}")
        return tuple(float(v / norm) for v in value)

    def matrix(self) -> NDArray[np.float64]:
        """Return the transform (4, 4) from the frame to the one it is given in, metres."""
        return transform(self.position, self.orientation)


class CameraPose(FramePose):
    """Where one camera's color optical frame is.

    Attributes:
        parent: frame the pose is given in; ``tool`` is that of the tool centre point.
        status: ``nominal`` (from a drawing, or made up for an emulator) or ``calibrated`` (measured).
        date: day of the calibration; needed when calibrated.
        residual_mm: root mean square distance the calibration left, mm; needed when calibrated.
        method: how it was found, for people.
    """

    parent: Literal["world", "flange", "tool"]
    status: Literal["nominal", "calibrated"]
    date: datetime.date | None = None
    residual_mm: Annotated[float, Field(ge=0.0)] | None = None
    method: str = ""

    @model_validator(mode="after")
    def _proven(self) -> CameraPose:
        if self.status == "calibrated" and (self.date is None or self.residual_mm is None):
            raise ValueError("status is calibrated: date and residual_mm are needed")
        return self


class Extrinsics(StrictModel):
    """The calibration file: one pose per camera."""

    schema_version: Literal[1]
    cameras: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], CameraPose], Field(min_length=1)]


def load_extrinsics(path: Path, cameras: Sequence[str] = ()) -> Extrinsics:
    """Read and check a calibration file.

    Args:
        path: YAML file, see ``config/camera_extrinsics.yaml``.
        cameras: cameras it must hold.

    Raises:
        CalibrationError: the file cannot be read, a field is wrong, missing or unknown, or a camera is missing.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise CalibrationError(f"{path}: not YAML: {error}") from error
    try:
        extrinsics = Extrinsics.model_validate(document)
    except ValidationError as error:
        raise CalibrationError(f"{path}: {validation_text(error)}") from error
    missing = [name for name in cameras if name not in extrinsics.cameras]
    if missing:
        there = ", ".join(extrinsics.cameras)
        raise CalibrationError(f"{path}: cameras: no entry for {', '.join(missing)}; there is {there}")
    return extrinsics


def validation_text(error: ValidationError) -> str:
    """Return the first wrong field, what was expected and what it is, in one line."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "the file"
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    shown = repr(first["input"])
    return f"{field}: {first['msg']}, got {shown if len(shown) < 80 else shown[:77] + '...'}{more}"


def static_transforms(extrinsics: Extrinsics) -> list[list[str]]:
    """Return one command line of tf2's ``static_transform_publisher`` per camera."""
    lines = []
    for name, pose in extrinsics.cameras.items():
        names = ("--x", "--y", "--z", "--qx", "--qy", "--qz", "--qw")
        values = [f"{v:.6g}" for v in (*pose.position, *pose.orientation)]
        arguments = [word for pair in zip(names, values, strict=True) for word in pair]
        frames = ["--frame-id", pose.parent, "--child-frame-id", f"{name}_color_optical_frame"]
        lines.append(["ros2", "run", "tf2_ros", "static_transform_publisher", *arguments, *frames])
    return lines
