"""Recorded readings for the identification of a tool's load, and the parameter file it is written to."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dcqfa_ros.atomic import replace_file
from dcqfa_ros.safety.tool_load import ToolLoadError, angle_between, rotation_matrix
from dcqfa_ros.safety.tool_load_identification import Identified, Standstill, standstill

COLUMNS = ("qx", "qy", "qz", "qw", "fx", "fy", "fz", "mx", "my", "mz")
"""Columns of a CSV file; ``pose`` may be added to tell the standstills apart."""
_SAME_DEG = 2.0


class RecordingError(ToolLoadError):
    """A file of readings cannot be read, or a result cannot be written; the message names file, line and field."""


@dataclass(frozen=True)
class Recorded:
    """One reading of a file: orientation (4,) of the tool centre point, wrench (6,), and a label of the standstill."""

    orientation: tuple[float, ...]
    wrench: tuple[float, ...]
    pose: str | None


def load_readings(path: Path) -> list[Recorded]:
    """Read a recording: JSON lines (``.jsonl``) or CSV (``.csv``).

    A JSON line holds ``orientation`` (x, y, z, w), ``force`` (N), ``torque`` (N m) and, if wanted, ``pose``; CSV has
    the columns :data:`COLUMNS` and, if wanted, ``pose``. Readings of one standstill share their ``pose``; without it, a
    turn by two degrees begins the next standstill.

    Raises:
        RecordingError: the file cannot be read, a line is broken, or there is no reading in it.
    """
    readers = {".jsonl": _from_json, ".csv": _from_csv}
    if path.suffix not in readers:
        raise RecordingError(f"{path}: expected a file that ends in {' or '.join(readers)}")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordingError(f"{path}: cannot be read ({error})") from error
    readings = list(readers[path.suffix](path, text))
    if not readings:
        raise RecordingError(f"{path}: holds no reading")
    return readings


def group(readings: Sequence[Recorded]) -> list[Standstill]:
    """Join consecutive readings of one standstill."""
    groups: list[list[Recorded]] = []
    for reading in readings:
        if groups and _belongs(groups[-1][0], reading):
            groups[-1].append(reading)
        else:
            groups.append([reading])
    return [standstill([r.orientation for r in g], [r.wrench for r in g]) for g in groups]


def _belongs(first: Recorded, reading: Recorded) -> bool:
    if first.pose is not None or reading.pose is not None:
        return first.pose == reading.pose
    turned = angle_between(rotation_matrix(first.orientation), rotation_matrix(reading.orientation))
    return turned < np.radians(_SAME_DEG)


def save_readings(path: Path, readings: Iterable[Recorded]) -> None:
    """Write readings as JSON lines, whole or not at all.

    Raises:
        RecordingError: the disk refuses.
    """
    lines = [
        json.dumps(
            {"pose": r.pose, "orientation": r.orientation, "force": r.wrench[:3], "torque": r.wrench[3:]},
        )
        for r in readings
    ]
    _write(path, "".join(line + "\n" for line in lines))


def save_parameters(path: Path, result: Identified, sensor_rotation: Sequence[float]) -> None:
    """Write the parameters of ``wrench_node`` as a ROS parameter file, whole or not at all.

    Raises:
        RecordingError: the disk refuses.
    """
    load = result.load
    parameters = {
        "mass": round(load.mass, 5),
        "centre_of_mass": [round(v, 6) for v in load.centre_of_mass],
        "bias": [round(v, 5) for v in load.bias],
        "sensor_rotation": [float(v) for v in sensor_rotation],
    }
    head = (
        f"# Tool load by dcqfa tool-load: {result.orientations} standstills, residual {result.force_residual_n:.3f} N "
        f"and {result.torque_residual_nm:.4f} N m, condition {result.force_condition:.1f} and "
        f"{result.torque_condition:.1f}.\n"
    )
    body = yaml.safe_dump(
        {"/**/wrench_node": {"ros__parameters": parameters}}, sort_keys=False, default_flow_style=None
    )
    _write(path, head + body)


def check_place(path: Path) -> None:
    """Refuse a place where no file can be written, before an operator has worked for it.

    Raises:
        RecordingError: its folder is missing or may not be written to, or it is a folder itself.
    """
    if path.is_dir():
        raise RecordingError(f"{path}: cannot be written (it is a folder)")
    if not path.parent.is_dir():
        raise RecordingError(f"{path}: cannot be written (the folder {path.parent} does not exist)")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise RecordingError(f"{path}: cannot be written (no permission for the folder {path.parent})")


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise RecordingError(f"{path}: cannot be written ({error.strerror})") from error


def _from_json(path: Path, text: str) -> Iterable[Recorded]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number with thousands of digits
            raise RecordingError(f"{where}: no JSON ({error})") from error
        if not isinstance(entry, dict):
            raise RecordingError(f"{where}: expected an object with orientation, force and torque")
        values = [
            *_numbers(entry, "orientation", 4, where),
            *_numbers(entry, "force", 3, where),
            *_numbers(entry, "torque", 3, where),
        ]
        yield _recorded(values, entry.get("pose"), where)


def _numbers(entry: dict[str, Any], name: str, count: int, where: str) -> list[float]:
    values = entry.get(name)
    good = isinstance(values, list) and len(values) == count
    if not good or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values or ()):
        raise RecordingError(f"{where}: {name}: expected {count} numbers, got {values!r}")
    try:
        return [float(v) for v in values or ()]
    except OverflowError:
        raise RecordingError(f"{where}: {name}: expected finite numbers, got {values!r:.80}") from None


def _from_csv(path: Path, text: str) -> Iterable[Recorded]:
    rows = csv.DictReader(text.splitlines())
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise RecordingError(f"{path}: column {missing[0]} is missing; expected {', '.join(COLUMNS)}")
    for row in _rows(path, rows):
        where = f"{path}, line {rows.line_num}"
        values = []
        for name in COLUMNS:
            try:
                values.append(float(row[name]))
            except (TypeError, ValueError):
                raise RecordingError(f"{where}: {name}: expected a number, got {row[name]!r}") from None
        yield _recorded(values, row.get("pose"), where)


def _rows(path: Path, rows: csv.DictReader[str]) -> Iterable[dict[str, str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise RecordingError(f"{path}, line {rows.line_num + 1}: no CSV ({error})") from error


def _recorded(values: list[float], pose: object, where: str) -> Recorded:
    if not np.isfinite(values).all():
        raise RecordingError(f"{where}: expected finite numbers, got {values}")
    try:
        rotation_matrix(values[:4])
    except ToolLoadError as error:
        raise RecordingError(f"{where}: {error}") from error
    return Recorded(tuple(values[:4]), tuple(values[4:]), None if pose in (None, "") else str(pose))
