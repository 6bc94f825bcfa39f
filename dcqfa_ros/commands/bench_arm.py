"""``dcqfa bench arm``: how long a command takes from ROS 2 to the arm's socket."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcqfa_ros.bench.arm import ArmBench


def register(subparsers: Any) -> None:
    """Add ``arm`` to the subcommands of ``bench``."""
    text = (
        "Command an emulated Inovo arm over ROS 2, in a domain of its own, and report the time from publishing a "
        "twist to its frame on the socket (WebSocket, rosbridge)."
    )
    parser = subparsers.add_parser(
        "arm", help="a command on its way to the arm", description=text, epilog="example: dcqfa bench arm --json"
    )
    add_options(parser, trials=300)
    parser.set_defaults(func=_run)


def add_options(parser: argparse.ArgumentParser, trials: int) -> None:
    """Add the options that the benchmarks of the arm share."""
    parser.add_argument("--trials", type=int, default=trials, metavar="N", help="(default %(default)s)")
    parser.add_argument(
        "--rate", type=float, default=100.0, metavar="HZ", help="of the control loop (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def show(result: ArmBench, as_json: bool) -> int:
    """Print a result."""
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
        return 0
    print(result.what)
    print(
        f"{result.trials} trials: p50 {result.p50_ms:.2f} ms, p99 {result.p99_ms:.2f} ms (limit {result.limit_ms:g}), "
        f"max {result.max_ms:.2f} ms"
    )
    print(
        f"control loop at {result.rate_hz:g} Hz, load {result.conditions.load_1min:.1f}, {result.conditions.scheduler}"
    )
    if result.repeated:
        print(f"{result.repeated} trials were begun again: something else stopped the arm")
    if result.problem:
        print(f"problem: {result.problem}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from dcqfa_ros.bench.arm import run_arm_bench

    return show(run_arm_bench(args.trials, args.rate), args.json)
