"""Finds where a camera is, from the arm's poses and those of a calibration board in the camera's pictures.

With the camera on the wrist the board stands still in ``world``; with the camera beside the arm the board is held by
the tool. Either way A X = X B is solved by OpenCV (Park and Martin, "Robot sensor calibration: solving AX = XB on the
Euclidean group", 1994), and poses that were left out say how good the result is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.drivers.extrinsics import CalibrationError, FramePose, validation_text
from dcqfa_ros.rotations import rotation_vector

MIN_SAMPLES = 8
MIN_ROTATION_DEG = 20.0
"""The poses must differ by so much about at least two axes; less leaves the translation undetermined."""
_HELD_OUT = 4  # every so many poses one is left out


class Sample(StrictModel):
    """One standstill: pose of the tool centre point in ``world``, and of the board in the color optical frame."""

    tool: FramePose
    board: FramePose


class Samples(StrictModel):
    """What was noted for one camera.

    Attributes:
        mount: ``wrist`` (camera on the arm, board fixed) or ``world`` (camera fixed, board held by the tool).
        samples: at least :data:`MIN_SAMPLES`.
    """

    schema_version: Literal[1]
    mount: Literal["wrist", "world"]
    samples: Annotated[tuple[Sample, ...], Field(min_length=MIN_SAMPLES, max_length=1000)]


@dataclass(frozen=True, slots=True)
class HandEye:
    """The result.

    Attributes:
        transform: (4, 4) from the color optical frame to ``parent``, m.
        parent: ``tool`` or ``world``.
        residual_mm: root mean square distance, over the poses left out, of the board from where it should be.
        samples: how many poses there were.
        held_out: how many of them were left out to find the residual.
    """

    transform: NDArray[np.float64]
    parent: str
    residual_mm: float
    samples: int
    held_out: int


def load_samples(path: Path) -> Samples:
    """Read a file of poses.

    Raises:
        CalibrationError: it cannot be read, or a field is wrong; names file and field.
    """
    try:
        return Samples.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CalibrationError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        raise CalibrationError(f"{path}: {validation_text(error)}") from error


def solve(samples: Samples) -> HandEye:
    """Return where the camera is.

    Raises:
        CalibrationError: the poses differ too little in orientation to tell.
    """
    tools = [s.tool.matrix() for s in samples.samples]
    boards = [s.board.matrix() for s in samples.samples]
    if samples.mount == "world":  # the same equation, seen from the tool: the camera is fixed to `world`
        tools = [np.asarray(np.linalg.inv(t), dtype=np.float64) for t in tools]
    _check_rotations(tools)
    held_out = list(range(_HELD_OUT - 1, len(tools), _HELD_OUT))
    kept = [i for i in range(len(tools)) if i not in held_out]
    partial = _park(tools, boards, kept)
    seen = [(t @ partial @ b)[:3, 3] for t, b in zip(tools, boards, strict=True)]
    centre = np.mean([seen[i] for i in kept], axis=0)
    distances = [float(np.linalg.norm(seen[i] - centre)) for i in held_out]
    return HandEye(
        transform=_park(tools, boards, range(len(tools))),
        parent="tool" if samples.mount == "wrist" else "world",
        residual_mm=1000.0 * float(np.sqrt(np.mean(np.square(distances)))),
        samples=len(tools),
        held_out=len(held_out),
    )


def _park(
    tools: Sequence[NDArray[np.float64]], boards: Sequence[NDArray[np.float64]], use: Sequence[int]
) -> NDArray[np.float64]:
    import cv2  # heavy, and needed by nobody else in the drivers of the arm

    rotation, translation = cv2.calibrateHandEye(
        [tools[i][:3, :3] for i in use],
        [tools[i][:3, 3] for i in use],
        [boards[i][:3, :3] for i in use],
        [boards[i][:3, 3] for i in use],
        method=cv2.CALIB_HAND_EYE_PARK,
    )
    transform = np.eye(4)
    transform[:3, :3], transform[:3, 3] = rotation, np.ravel(translation)
    if not np.isfinite(transform).all():
        raise CalibrationError("the poses do not determine where the camera is: take others, with larger rotations")
    return transform


def _check_rotations(tools: Sequence[NDArray[np.float64]]) -> None:
    """Refuse poses whose orientations differ too little, or about one axis only."""
    vectors = [rotation_vector(tools[0][:3, :3].T @ transform[:3, :3]) for transform in tools[1:]]
    # Second largest extent of the rotation vectors: how far the poses turn about a second axis.
    spread = np.linalg.svd(np.asarray(vectors), compute_uv=False)[1] / np.sqrt(len(vectors))
    if np.degrees(spread) < MIN_ROTATION_DEG / 2:
        raise CalibrationError(
            f"the orientations differ by {np.degrees(spread):.1f} degrees about a second axis (root mean square), "
            f"expected at least {MIN_ROTATION_DEG / 2:g}: take poses that turn about two axes by more than "
            f"{MIN_ROTATION_DEG:g} degrees"
        )
