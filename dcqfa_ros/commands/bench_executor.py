"""``dcqfa bench executor``: what one message costs a node."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any


def register(subparsers: Any) -> None:
    """Add ``executor`` to the subcommands of ``bench``."""
    text = (
        "Let a lifecycle node with the entities of arm_node receive small messages from another process, on the "
        "executor of this project's nodes and on rclpy's in turn, in ROS domains of their own, and report the "
        "processor time of the receiving thread per message."
    )
    parser = subparsers.add_parser(
        "executor",
        help="what one message costs a node, beside rclpy's executor",
        description=text,
        epilog="example: dcqfa bench executor --rounds 3 --json",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default %(default)s)")
    parser.add_argument(
        "--rate", type=float, default=400.0, metavar="HZ", help="messages per second (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of both executors (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    from dcqfa_ros.bench.executor import run_executor_bench

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    bench = run_executor_bench(args.seconds, args.rate, args.rounds, progress)
    if args.json:
        print(json.dumps(dataclasses.asdict(bench), indent=2))
        return 0
    for name, values in (("this project's", bench.stream_us), ("rclpy's", bench.rclpy_us)):
        print(f"{name:<15} {min(values):.0f} to {max(values):.0f} us per message")
    print(f"ratio of the medians {bench.ratio:.2f} ({bench.entities}; {bench.rate:g} messages per second)")
    print(f"load {bench.load_1min:.1f}, {100 * bench.steal_share:.1f} % stolen")
    return 0
