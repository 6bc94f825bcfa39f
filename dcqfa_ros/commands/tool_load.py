"""``dcqfa tool-load``: mass, centre of mass and bias of what hangs on the force/torque sensor."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from dcqfa_ros.errors import UserError
from dcqfa_ros.safety.tool_load_files import (
    COLUMNS,
    Recorded,
    check_place,
    group,
    load_readings,
    save_parameters,
    save_readings,
)
from dcqfa_ros.safety.tool_load_guide import HINTS, guide
from dcqfa_ros.safety.tool_load_identification import MIN_ORIENTATIONS, Identified, Standstill, identify

_EPILOG = f"""\
With the cell running (dcqfa up cell:=real) and the tool free, bring the arm to each orientation by hand or with dcqfa
teleop; the wrench sensor's raw readings and tcp_pose are recorded. Or name a recording: JSON lines with orientation
[x, y, z, w], force [N], torque [N m] and, if wanted, pose; or CSV with {", ".join(COLUMNS)}.

example: dcqfa tool-load --output tool_load.yaml
         dcqfa tool-load recording.jsonl --json"""


class ToolLoadCommandError(UserError, ValueError):
    """An argument cannot be; the message names it."""


def register(subparsers: Any) -> None:
    """Add ``tool-load``."""
    parser = subparsers.add_parser(
        "tool-load",
        help="identify what hangs on the force/torque sensor",
        description="Identify mass, centre of mass and the sensor's bias by least squares from readings at several "
        "orientations, and write them as parameters of wrench_node. Nothing is moved by this command.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("recording", nargs="?", type=Path, metavar="FILE", help="recorded readings (default: record them now)")
    add("--output", type=Path, metavar="FILE", help="parameter file to write (default: none, print only)")
    add("--record", type=Path, metavar="FILE", help="keep the readings that are recorded now, as JSON lines")
    add("--orientations", type=int, default=len(HINTS), metavar="N", help="to record (default %(default)s)")
    add("--samples", type=int, default=200, metavar="N", help="readings at each of them (default %(default)s)")
    add(
        "--sensor-rotation",
        type=float,
        nargs=4,
        default=[0.0, 0.0, 0.0, 1.0],
        metavar=("X", "Y", "Z", "W"),
        help="orientation of the sensor's frame in the tool frame, quaternion (default: the same)",
    )
    add("--namespace", default="", metavar="NAME", help="of the running cell")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    if args.orientations < MIN_ORIENTATIONS:
        raise ToolLoadCommandError(f"--orientations: expected {MIN_ORIENTATIONS} or more, got {args.orientations}")
    if args.samples < 1:
        raise ToolLoadCommandError(f"--samples: expected 1 or more, got {args.samples}")
    if args.recording is not None and args.record is not None:
        raise ToolLoadCommandError(f"--record: nothing is recorded now, the readings are those of {args.recording}")
    for place in (args.output, args.record):
        if place is not None:
            check_place(place)
    standstills = group(load_readings(args.recording)) if args.recording is not None else _record(args)
    result = identify(standstills, args.sensor_rotation)
    if args.output is not None:
        save_parameters(args.output, result, args.sensor_rotation)
    if args.json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        print("\n".join(_describe(result, args.output)))
    return 0


def _record(args: argparse.Namespace) -> list[Standstill]:
    from dcqfa_ros.ros.tool_load_client import graph_readings

    readings: list[Recorded]
    with graph_readings(args.namespace) as source:
        standstills, readings = guide(
            source,
            _ask,
            _say,
            wanted=args.orientations,
            samples=args.samples,
            sensor_rotation=tuple(args.sensor_rotation),
        )
    if args.record is not None:
        save_readings(args.record, readings)
    return standstills


def _ask(question: str) -> str:
    """Ask on standard error, so that standard output holds nothing but the result."""
    print(question, end="", file=sys.stderr, flush=True)
    return input()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _describe(r: Identified, output: Path | None) -> list[str]:
    x, y, z = (1e3 * v for v in r.load.centre_of_mass)
    ex, ey, ez = (1e3 * v for v in r.centre_error_m)
    bias = ", ".join(f"{v:.3f}" for v in r.load.bias)
    lines = [
        f"mass            {r.load.mass:.4f} kg (standard error {r.mass_error_kg:.4f})",
        f"centre of mass  {x:.1f}, {y:.1f}, {z:.1f} mm, sensor frame (standard errors {ex:.1f}, {ey:.1f}, {ez:.1f})",
        f"bias            {bias} (N, N m)",
        f"residual        {r.force_residual_n:.3f} N, {r.torque_residual_nm:.4f} N m RMS, {r.orientations} standstills",
        f"condition       {r.force_condition:.1f} (mass, force bias), {r.torque_condition:.1f} (centre, torque bias)",
    ]
    return lines + ([f"written to      {output}: parameters_file:={output} for dcqfa up"] if output else [])
