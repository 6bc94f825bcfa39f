"""``dcqfa teleop``: move the arm by the keyboard of this terminal, or by a gamepad."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from dcqfa_ros.paths import find_config
from dcqfa_ros.ros.bringup import ARM_CELL_NODES, BringupError, check_namespace
from dcqfa_ros.ros.isolation import child_environment
from dcqfa_ros.ros.parameter_files import check_sections
from dcqfa_ros.ros.process import PARENT_VARIABLE
from dcqfa_ros.runtime.teleop import KEYBOARD_HELP
from dcqfa_ros.runtime.terminal import kept_terminal

MODULE = "dcqfa_ros.nodes.teleop_node"


def register(subparsers: Any) -> None:
    """Add ``teleop``."""
    parser = subparsers.add_parser(
        "teleop",
        help="move the arm by keyboard or gamepad",
        description="Run teleop_node in this terminal. The arm obeys once it is armed with the command lease given to "
        "teleop (key m), within the same limits as for any policy. A gamepad is heard on the topic joy (run joy_node "
        "or spacenav_node beside this) and moves the arm only while its dead-man button is held.",
        epilog=f"keys:\n{KEYBOARD_HELP}\n\nexample: dcqfa teleop --scale 0.2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", default="auto", choices=("auto", "keyboard", "joy"), help="auto: joy, and keyboard of a terminal")
    add("--scale", type=float, default=0.0, metavar="SHARE", help="share of full speed, 0.05 to 1 (default: file's)")
    add("--namespace", default="", help="namespace of the graph")
    add("--parameters-file", default="", metavar="FILES", help="as for dcqfa up; replaces values of inovo_cell.yaml")
    parser.set_defaults(func=_teleop)


def _teleop(args: argparse.Namespace) -> int:
    if args.scale and not 0.05 <= args.scale <= 1.0:
        raise BringupError(f"--scale: expected 0.05 to 1, got {args.scale}")
    check_namespace(args.namespace)
    files = [find_config("inovo_cell"), *(find_config(name) for name in args.parameters_file.split(",") if name)]
    for file in files[1:]:
        check_sections(file, args.namespace, ARM_CELL_NODES)
    command = [
        *(sys.executable, "-m", MODULE, "--ros-args", "-r", f"__ns:=/{args.namespace.strip('/')}"),
        *(word for file in files for word in ("--params-file", str(file))),
        *("-p", f"input:={args.input}", "-p", "autostart:=true"),
        *(("-p", f"scale:={args.scale:.4f}") if args.scale else ()),
    ]
    return _foreground(command)


def _foreground(command: Sequence[str]) -> int:
    """Run ``command`` on this terminal and return its exit code; the terminal is restored even if it is killed."""
    env = child_environment(os.environ)
    env[PARENT_VARIABLE] = str(os.getpid())
    with kept_terminal():
        process = subprocess.Popen(command, env=env)

        def forward(number: int, _frame: FrameType | None) -> None:
            with suppress(ProcessLookupError):
                process.send_signal(number)

        before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code
