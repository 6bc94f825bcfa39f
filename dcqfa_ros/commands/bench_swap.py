"""``dcqfa bench swap``: does the control tick go on while variants are exchanged, and is nothing left of old ones?"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcqfa_ros.bench.swap import SwapBench

_OTHER_PYTHON = (
    "Workers may run on another interpreter, so that another version of a runtime is measured: python3 -m venv DIR; "
    "DIR/bin/pip install onnxruntime==1.23.2 numpy onnx pydantic pyyaml; then --python DIR/bin/python."
)


def register(subparsers: Any) -> None:
    """Add ``swap`` to the subcommands of ``bench``."""
    text = (
        "Exchange the variants of a bundle again and again, in random order, each loaded, warmed and compared in a new "
        "worker process, while a control tick consumes one action each period and gives one observation. As on a "
        "robot, the tick has a process of its own; inference loop and exchanges share another. Report ticks that began "
        "over a period late, their jitter, the time of an exchange, the growth of the memory of the policy's process "
        "and its workers together, and what is left of old workers. " + _OTHER_PYTHON
    )
    parser = subparsers.add_parser(
        "swap",
        help="exchange variants while the control tick goes on",
        description=text,
        epilog="example: dcqfa bench swap --swaps 1000 --json",
    )
    parser.add_argument("--swaps", type=int, default=1000, metavar="N", help="exchanges (default %(default)s)")
    parser.add_argument("--rate", type=float, default=100.0, metavar="HZ", help="control tick (default %(default)s)")
    parser.add_argument(
        "--bundle", default="pusht_keypoints", metavar="DIR", help="folder or name (default %(default)s)"
    )
    parser.add_argument("--variants", default="", metavar="A,B", help="at least two (default: all of the bundle)")
    parser.add_argument("--runtime", default="onnxruntime", metavar="NAME", help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of an engine (default %(default)s)")
    parser.add_argument("--python", default="", metavar="FILE", help="interpreter of the workers (default: this one)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order (default %(default)s)")
    parser.add_argument(
        "--realtime-priority",
        type=int,
        default=0,
        metavar="N",
        help="SCHED_FIFO priority of the control tick's process, 1 to 99 (default: none)",
    )
    parser.add_argument(
        "--processor", type=int, metavar="N", help="keep the control tick on this processor (default: any)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    import sys

    from dcqfa_ros.bench.swap import run_swap_bench
    from dcqfa_ros.bundle.load import load_bundle
    from dcqfa_ros.paths import find_bundle

    bench = run_swap_bench(
        load_bundle(find_bundle(args.bundle)),
        args.swaps,
        args.rate,
        [name for name in args.variants.split(",") if name],
        args.runtime,
        args.threads,
        args.python,
        args.seed,
        args.realtime_priority,
        args.processor,
        progress=sys.stderr.isatty(),
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(bench), indent=2))
    else:
        print("\n".join(_describe(bench)))
    return 0


def _describe(b: SwapBench) -> list[str]:
    from dcqfa_ros.bench import bare_tick

    place, besides = "", []
    if b.processor is not None:
        left = "unknown how many" if b.missed_while_processor_ran is None else b.missed_while_processor_ran
        place, besides = f", processor {b.processor}", [f"without what halted processor {b.processor}, {left} missed"]
    return [
        (
            f"{b.swaps} exchanges among {', '.join(b.variants)} on {b.runtime} {b.runtime_version} in "
            f"{b.seconds:.0f} s: {b.failures} failed"
        ),
        *(f"  {reason}" for reason in b.reasons),
        (
            f"control tick at {b.rate_hz:g} Hz ({b.tick_scheduler}{place}), {b.ticks} ticks: {b.missed_ticks} missed, "
            f"jitter p50 {b.jitter_p50_ms:.2f} ms, p99 {b.jitter_p99_ms:.2f} ms, max {b.jitter_max_ms:.2f} ms"
        ),
        (
            f"an exchange takes p50 {b.swap_ms_p50:.0f} ms, p99 {b.swap_ms_p99:.0f} ms; no chunk can be begun for p99 "
            f"{b.gap_ms_p99:.2f} ms; {b.chunks} chunks computed, {b.starved_ticks} ticks without an action"
        ),
        (
            f"memory {b.rss_before_mb:.1f} MiB before, {b.rss_after_mb:.1f} MiB after ({b.rss_growth:+.2f} %); left: "
            f"{b.workers_left} workers, {b.fds_left} descriptors, {b.memory_files_left} shared memories"
        ),
        bare_tick.describe(b.reference_missed, b.reference_max_ms, b.missed_alone),
        *besides,
        f"load {b.conditions.load_1min:.1f}, {100 * b.conditions.steal_share:.1f} % stolen, {b.conditions.scheduler}",
    ]
