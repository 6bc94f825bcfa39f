"""``dcqfa bench camera``: do two RGB-D cameras reach a subscriber, how late, and at what cost?"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcqfa_ros.bench.camera import CameraBench


def register(subparsers: Any) -> None:
    """Add ``camera`` to the subcommands of ``bench``."""
    text = (
        "Run two RGB-D cameras (camera_node on the synthetic source, a process each) and a subscriber in a third "
        "process, in a ROS domain of their own. Report the share of pictures that arrived, the latency from the tick "
        "of the frame clock to the callback, and the processor time of the transport: that of all three processes "
        "less that of the sources. Alignment of depth and JPEG are measured apart, each alone."
    )
    parser = subparsers.add_parser(
        "camera",
        help="two RGB-D cameras to another process",
        description=text,
        epilog="example: dcqfa bench camera --seconds 20 --json",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the measurement (default %(default)s)")
    parser.add_argument("--width", type=int, default=640, metavar="PX", help="(default %(default)s)")
    parser.add_argument("--height", type=int, default=480, metavar="PX", help="(default %(default)s)")
    parser.add_argument("--rate", type=float, default=30.0, metavar="HZ", help="of each camera (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    from dcqfa_ros.bench.camera import run_camera_bench

    bench = run_camera_bench(args.seconds, args.width, args.height, args.rate)
    if args.json:
        print(json.dumps(dataclasses.asdict(bench), indent=2))
    else:
        print("\n".join(_describe(bench)))
    return 0


def _describe(b: CameraBench) -> list[str]:
    def latency(figures: Any) -> str:
        if figures.p50_ms is None:
            return "nothing arrived"
        return f"p50 {figures.p50_ms:.1f} ms, p99 {figures.p99_ms:.1f} ms, max {figures.max_ms:.1f} ms"

    return [
        (
            f"{len(b.streams) // 2} cameras, {b.width}x{b.height} RGB-D at {b.rate:g} Hz for {b.seconds:g} s, {b.rmw}: "
            f"{100 * b.delivered:.2f} % delivered"
        ),
        latency(b),
        (
            f"transport {b.cpu_cores:.3f} cores: cameras {b.cpu_publishers:.3f} + subscriber {b.cpu_subscriber:.3f} "
            f"- sources {b.cpu_sources:.3f}"
        ),
        *(f"  {name:<14}{100 * s.delivered:6.2f} % of {s.due}, {latency(s)}" for name, s in b.streams.items()),
        (
            f"alignment {b.alignment_ms:.2f} ms (p99 {b.alignment_p99_ms:.2f}), spatial, temporal and hole-filling "
            f"filter {b.filters_ms:.2f} ms, JPEG {b.jpeg_ms:.2f} ms (p99 {b.jpeg_p99_ms:.2f}) per picture"
        ),
        f"load {b.load_1min:.1f}, {100 * b.steal_share:.1f} % stolen",
    ]
