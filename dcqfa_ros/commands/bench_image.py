"""``dcqfa bench image``: do images arrive, and how late, between two processes of this host?"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from dcqfa_ros.bench.image import ImageBench, run_image_bench


def register(subparsers: Any) -> None:
    """Add ``image`` to the subcommands of ``bench``."""
    text = (
        "Send RGB pictures between two processes over ROS 2 on this host, in a domain of their own, and report the "
        "share that arrived and the latency from serialization to callback."
    )
    parser = subparsers.add_parser(
        "image", help="images between two processes", description=text, epilog="example: dcqfa bench image --json"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the measurement (default %(default)s)")
    parser.add_argument("--width", type=int, default=640, metavar="PX", help="(default %(default)s)")
    parser.add_argument("--height", type=int, default=480, metavar="PX", help="(default %(default)s)")
    parser.add_argument(
        "--rate", type=float, default=30.0, metavar="HZ", help="pictures per second (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    result = run_image_bench(args.seconds, args.width, args.height, args.rate)
    if args.json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        print("\n".join(_describe(result)))
    return 0


def _describe(r: ImageBench) -> list[str]:
    latency = (
        "no picture arrived"
        if r.p50_ms is None
        else f"p50 {r.p50_ms:.1f} ms, p99 {r.p99_ms:.1f} ms, max {r.max_ms:.1f} ms"
    )
    shm = "no /dev/shm" if r.shm is None else f"{r.shm} MiB free in /dev/shm"
    lines = [
        f"{r.width}x{r.height} RGB at {r.rate:g} Hz, {r.frames} pictures: {100 * r.delivered:.1f} % delivered",
        latency,
        f"{r.rmw}, profile {r.profile}, {shm}; {r.late} sent late by the publisher itself; load {r.load_1min:.1f}",
    ]
    return lines + ([f"problem: {r.problem}"] if r.problem else [])
