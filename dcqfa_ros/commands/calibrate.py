"""``dcqfa calibrate``: where a camera is, from poses of the arm and of a calibration board."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import yaml

from dcqfa_ros.drivers.hand_eye import HandEye, load_samples, solve
from dcqfa_ros.rotations import quaternion_of

GOOD_MM = 2.0

_EXAMPLE = """\
samples file:
  schema_version: 1
  mount: wrist                # camera on the arm, board fixed; or world: camera fixed, board held by the tool
  samples:                    # at least 8 standstills that turn about two axes
    - tool:  {position: [0.30, 0.10, 0.40], orientation: [0, 1, 0, 0]}         # /tcp_pose: m, quaternion x y z w
      board: {position: [0.02, -0.01, 0.35], orientation: [1, 0, 0, 0]}        # in the color optical frame
    - ...

example: dcqfa calibrate wrist samples.yaml"""


def register(subparsers: Any) -> None:
    """Add ``calibrate``."""
    parser = subparsers.add_parser(
        "calibrate",
        help="find where a camera is (hand-eye calibration)",
        description="Solve the hand-eye equation for one camera and print its entry for the calibration file, with the "
        "distance that poses left out of the solution were missed by. Nothing moves and nothing is written.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("camera", metavar="CAMERA", help="name of the camera, such as wrist")
    parser.add_argument("samples", type=Path, metavar="FILE", help="YAML file of poses, see below")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_calibrate)


def entry(result: HandEye, day: datetime.date) -> dict[str, Any]:
    """Return the camera's entry in the calibration file."""
    return {
        "parent": result.parent,
        "position": [round(float(v), 6) for v in result.transform[:3, 3]],
        "orientation": [round(v, 7) for v in quaternion_of(result.transform[:3, :3]).tolist()],
        "status": "calibrated",
        "date": day.isoformat(),
        "residual_mm": round(result.residual_mm, 3),
        "method": f"hand-eye, {result.samples} poses, residual over {result.held_out} left out",
    }


def _calibrate(args: argparse.Namespace) -> int:
    result = solve(load_samples(args.samples))
    document = {"schema_version": 1, "cameras": {args.camera: entry(result, datetime.date.today())}}
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        print(yaml.safe_dump(document, sort_keys=False, default_flow_style=None), end="")
        if result.residual_mm > GOOD_MM:
            print(f"# {result.residual_mm:.1f} mm is a lot (good: below {GOOD_MM:g} mm): board, poses, or time stamps?")
    return 0
