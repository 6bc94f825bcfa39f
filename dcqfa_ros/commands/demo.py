"""``dcqfa demo``: Push-T trials through the real ROS 2 graph on this machine, from bring-up to report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dcqfa_ros.errors import UserError

MAX_VIDEOS = 5  # each takes about a second to encode
DEFAULT_SEED = 200_000  # outside the published seeds 100000..100049, which are kept for reported figures


def register(subparsers: Any) -> None:
    """Add ``demo``."""
    parser = subparsers.add_parser(
        "demo",
        help="run Push-T trials through the ROS 2 graph and write a report",
        description="Bring up the whole graph on a free ROS domain of this host, run one trial in real time and some "
        "in lockstep, write records and an HTML report, and come down again. Needs no robot, GPU or ROS installation.",
        epilog="example: dcqfa demo --lockstep 4 --out out/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", default="pusht_keypoints", help="policy: name or folder (default: %(default)s)")
    parser.add_argument(
        "--variant", default="auto", help="variant, or auto: the selector's choice (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of the first trial (default: %(default)s)")
    parser.add_argument("--realtime", type=int, default=1, help="trials in real time (default: %(default)s)")
    parser.add_argument("--lockstep", type=int, default=4, help="trials in lockstep (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print summary.json instead of the table; node output to stderr"
    )
    parser.set_defaults(func=_demo)


def _demo(args: argparse.Namespace) -> int:
    from dcqfa_ros.ros.bringup import BringupOptions, TrialOptions, describe
    from dcqfa_ros.ros.isolation import claim_namespace, isolated_environment
    from dcqfa_ros.ros.memory import MemoryWatch
    from dcqfa_ros.ros.supervisor import Supervisor
    from dcqfa_ros.trials.session import SUMMARY

    if args.realtime < 0 or args.lockstep < 0 or args.realtime + args.lockstep < 1:
        raise UserError("--realtime and --lockstep: expected counts of 0 or more, at least one trial in all")
    if not 0 <= args.seed < 2**32 - args.realtime - args.lockstep:
        raise UserError(f"--seed: expected 0 to {2**32 - 1}, got {args.seed}")
    seeds = range(args.seed, args.seed + args.realtime + args.lockstep)
    modes = ["realtime"] * args.realtime + ["lockstep"] * args.lockstep
    plan = tuple(f"{mode}:{seed}" for mode, seed in zip(modes, seeds, strict=True))
    options = BringupOptions(
        bundle=args.bundle,
        variant=args.variant,
        trials=TrialOptions(plan, args.out, overwrite=True, parameters={"videos": min(len(plan), MAX_VIDEOS)}),
    )
    nodes = describe(options)
    stream = sys.stderr if args.json else sys.stdout

    def show(name: str, line: str) -> None:
        print(f"[{name}] {line}", file=stream, flush=True)

    summary_file = args.out / SUMMARY
    try:
        summary_file.unlink(missing_ok=True)  # an earlier run's must not be taken for this one's
    except OSError as error:
        raise UserError(f"{args.out}: the output folder cannot be written: {error.strerror}") from error
    with isolated_environment() as isolation, claim_namespace(isolation.domain, options.namespace):
        print(f"graph on ROS domain {isolation.domain}, this host only", file=stream, flush=True)
        memory = MemoryWatch()
        supervisor = Supervisor(nodes, env=isolation.env, show=show, poll=memory.sample)
        outcome = supervisor.run()
    if outcome.node != "trial_node" or not summary_file.exists():
        print(f"dcqfa demo: the trials did not finish: {outcome.reason}", file=sys.stderr)
        return outcome.exit_code or 1
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    if args.json:
        print(json.dumps({**summary, "peak_memory_mb": round(memory.peak_bytes / 1e6)}, indent=2))
    else:
        _print_table(summary, memory.peak_bytes)
    return outcome.exit_code


def _print_table(summary: dict[str, Any], peak_bytes: int) -> None:
    print(f"\ndevice   {summary['device']}\nvariant  {summary['variant']} of bundle {summary['bundle']}\n")
    print(f"{'trial':>5}  {'mode':<9} {'seed':>8}  {'score':>6}  {'steps':>5}  stop reason")
    for number, trial in enumerate(summary["trials"], start=1):
        print(
            f"{number:>5}  {trial['mode']:<9} {trial['seed']:>8}  {trial['score']:>6.3f}  {trial['steps']:>5}  "
            f"{trial['stop_reason']}"
        )
    interval = "" if summary["ci95"] is None else f" +- {summary['ci95']:.3f} (95 %)"
    print(f"\nmean score {summary['mean_score']:.3f}{interval}, missed ticks {summary['missed_ticks']}")
    print(f"peak memory of all processes {peak_bytes / 1e6:.0f} MB")
    print(f"report {summary['report']}")
