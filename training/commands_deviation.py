"""``dcqfa deviation``: how far closed loops depart from the teacher's, step by step."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from training.commands import ArgumentError, check_least


def deviation(subparsers: Any) -> None:
    """Register ``dcqfa deviation``."""
    parser = subparsers.add_parser(
        "deviation",
        help="error-accumulation curves of policies against their teacher",
        description="Run teacher and contenders in simulated Push-T from equal start states with equal noise, and "
        "report how far their states and actions are apart over the episode, with 95 % intervals over seeds. "
        "Contenders are what 'dcqfa eval' evaluates: bundles, runs, checkpoints and the subnets of supernets. "
        "The area under a curve is compared with the first contender's in pairs.",
        epilog="example: dcqfa deviation runs/pusht_keypoints_opd:w4a4 runs/pusht_keypoints_opd_control:w4a4 "
        "--teacher models/pusht_keypoints:fp32 --seeds 100 --plot curves.png --json",
    )
    parser.add_argument(
        "contenders", nargs="+", metavar="POLICY[:VARIANT]", help="bundle, run or checkpoint, and variant or subnet"
    )
    parser.add_argument(
        "--teacher", metavar="POLICY[:VARIANT]", required=True, help="what they are measured against, likewise"
    )
    parser.add_argument("--seeds", type=int, default=50, metavar="N", help="number of start seeds (default: 50)")
    parser.add_argument(
        "--first-seed",
        type=int,
        default=300_000,
        metavar="S",
        help="first start seed (default: 300000; 100000 to 100049 are for reported scores only)",
    )
    parser.add_argument("--horizon", type=int, default=300, metavar="K", help="steps of an episode (default: 300)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: each policy's own)")
    parser.add_argument("--threads", type=int, help="inference threads (default: every core; 1 for a checkpoint)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the result to this file too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_deviation)


def _deviation(args: argparse.Namespace) -> int:
    from training.deviation import Options, measure
    from training.deviation_plot import check_plot, plot
    from training.files import write_atomically

    check_least(args, seeds=2, horizon=1, steps=1, threads=1, first_seed=0)
    if args.out is not None and not args.out.resolve().parent.is_dir():
        raise ArgumentError(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
    if args.plot is not None:
        check_plot(args.plot)
    seeds = tuple(range(args.first_seed, args.first_seed + args.seeds))
    options = Options(seeds, args.horizon, args.steps, args.threads)
    result = measure(args.contenders, args.teacher, options, lambda text: print(text, file=sys.stderr))
    if args.out is not None:
        write_atomically(args.out, (json.dumps(result) + "\n").encode())
    if args.plot is not None:
        plot(result, args.plot)
    if args.json:
        print(json.dumps(result))
        return 0
    first, last = result["seeds"]
    print(
        f"against {args.teacher} (score {_with(result['teacher']['score'], 3)}), seeds {first} to {last}, mean over "
        f"{args.horizon} steps:"
    )
    for entry in result["contenders"]:
        own, shown = (_mean_of(entry["action_px"][kind]) for kind in ("own_states", "teacher_states"))
        paired = entry["paired"]
        beside = "" if paired is None else f", {paired['mean']:+.1f} +- {paired['ci95']:.1f} px to the first"
        print(
            f"  {entry['name']}: key points {_with(entry['area']['keypoints_px'], 1)} px{beside}; actions "
            f"{own:.2f} px at own states, {shown:.2f} px at the teacher's, excess "
            f"{_with(entry['action_px']['excess'], 2)} px; score {_with(entry['score'], 3)}"
        )
    return 0


def _with(interval: dict[str, float], digits: int) -> str:
    return f"{interval['mean']:.{digits}f} +- {interval['ci95']:.{digits}f}"


def _mean_of(curve: dict[str, list[Any]]) -> float:
    """Mean over all calls of all seeds, of which not all have late calls."""
    return float(sum(m * n for m, n in zip(curve["mean"], curve["n"], strict=True) if n) / sum(curve["n"]))
