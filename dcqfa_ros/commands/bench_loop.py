"""``dcqfa bench loop``: the control tick while cameras stream and a policy infers, and what a chunk costs beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcqfa_ros.bench.loop import LoopBench


def register(subparsers: Any) -> None:
    """Add ``loop`` to the subcommands of ``bench``."""
    text = (
        "Run the graph of a cell with an arm, each node a process, in a ROS domain of its own: two RGB-D cameras on "
        "the synthetic source, arm_node with an emulated arm, policy_node with a policy of random weights that infers "
        "all the time. Report jitter and misses of the control tick, the time from an observation's stamp to its "
        "chunk's publication less inference, the pictures received, and processor time. Goals, on two idle cores: "
        "jitter p99 below 2 ms, overhead p99 below 5 ms, no miss in 10 minutes."
    )
    parser = subparsers.add_parser(
        "loop",
        help="control tick and policy overhead with two RGB-D streams",
        description=text,
        epilog="example: dcqfa bench loop --seconds 60 --json",
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="length of the measurement (default %(default)s)")
    parser.add_argument("--rate", type=float, default=100.0, metavar="HZ", help="control tick (default %(default)s)")
    parser.add_argument("--width", type=int, default=640, metavar="PX", help="of the pictures (default %(default)s)")
    parser.add_argument("--height", type=int, default=480, metavar="PX", help="of the pictures (default %(default)s)")
    parser.add_argument(
        "--camera-rate", type=float, default=30.0, metavar="HZ", help="of each camera (default %(default)s)"
    )
    parser.add_argument(
        "--realtime-priority",
        type=int,
        default=0,
        metavar="N",
        help="SCHED_FIFO priority that arm_node asks for, 1 to 99 (default: none)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    from dcqfa_ros.bench.loop import run_loop_bench

    bench = run_loop_bench(
        args.seconds, args.rate, args.width, args.height, args.camera_rate, args.realtime_priority, args.seed
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(bench), indent=2))
    else:
        print("\n".join(_describe(bench)))
    return 0


def _describe(b: LoopBench) -> list[str]:
    from dcqfa_ros.bench import bare_tick

    lines = [
        (
            f"control tick at {b.rate_hz:g} Hz, {b.ticks} ticks: jitter p50 {b.jitter_p50_ms:.2f} ms, p99 "
            f"{b.jitter_p99_ms:.2f} ms, max {b.jitter_max_ms:.2f} ms, {b.missed} missed; {b.scheduler}"
        ),
        bare_tick.describe(b.reference_missed, b.reference_max_ms, b.missed_alone),
        (
            f"overhead of {b.chunks} chunks: p50 {b.overhead_p50_ms:.2f} ms, p99 {b.overhead_p99_ms:.2f} ms, max "
            f"{b.overhead_max_ms:.2f} ms; from the first camera's stamp p50 {b.since_stamp_p50_ms:.2f} ms, p99 "
            f"{b.since_stamp_p99_ms:.2f} ms; inference p50 {b.inference_p50_ms:.1f} ms, "
            f"{100 * b.inference_share:.0f} % of the time"
        ),
        (
            f"{b.images_per_s:.1f} of {b.images_due_per_s:g} pictures per second reached the policy, {b.width}x"
            f"{b.height}"
        ),
        "cores: " + ", ".join(f"{name} {cores:.2f}" for name, cores in b.cpu.items()),
        (
            f"{b.seconds:g} s, load {b.conditions.load_1min:.1f}, {100 * b.conditions.steal_share:.1f} % stolen, "
            f"{b.engine_threads} thread per engine"
        ),
        "goals met" if b.goals_met else "goals not met",
    ]
    return [*lines, f"problem: {b.problem}"] if b.problem else lines
