"""``dcqfa bench chunking``: what a slow policy costs, by the way its chunks follow each other."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from dcqfa_ros.errors import UserError

DELAYS = "0,50,100,200,400"


class OptionError(UserError, ValueError):
    """An option with a senseless value; the message names it and what was expected."""


def register(subparsers: Any) -> None:
    """Add ``chunking`` to the subcommands of ``bench``."""
    parser = subparsers.add_parser(
        "chunking",
        help="score and smoothness of the methods of chunk execution under injected latency",
        description="Run closed-loop Push-T in virtual time with a latency added to every inference, for each method "
        "of chunk execution: score and its loss against no latency and against synchronous execution (in pairs, with "
        "95 % intervals), jerk of what is commanded and of the arm, and the distance between old and new chunk where "
        "one replaces the other. The result depends on seeds and weights, not on the speed of this computer. A latency "
        "takes effect in whole control periods (10 Hz: 50 ms and 100 ms both cost one).",
        epilog="example: dcqfa bench chunking --seeds 100 --first-seed 300000 --jobs 2 --resume chunking.json "
        "--html chunking.html --json",
    )
    parser.add_argument(
        "--bundle", default="pusht_keypoints", metavar="DIR", help="folder or name (default: %(default)s)"
    )
    parser.add_argument("--variant", default="w8a8", help="variant of the bundle (default: %(default)s)")
    parser.add_argument(
        "--trained-bundle",
        metavar="DIR",
        help="network fine-tuned with clean prefixes, for the method trained (default: pusht_keypoints_rtc where it is "
        "found; else those rows are listed as not run)",
    )
    parser.add_argument("--methods", default="", metavar="A,B", help="methods to run (default: all)")
    parser.add_argument(
        "--delays-ms", default=DELAYS, metavar="A,B", help="latencies of an inference in ms (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=100, metavar="N", help="number of start seeds (default: 100)")
    parser.add_argument(
        "--first-seed", type=int, default=100_000, metavar="S", help="first start seed (default: 100000)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: each bundle's own)")
    parser.add_argument(
        "--execution-horizon",
        type=int,
        metavar="N",
        help="actions between two inferences (default: the bundle's executed actions)",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="inference threads (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="rows computed together (default: %(default)s)"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep each finished row in this file; the same command goes on from it",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with table and charts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    from dcqfa_ros.bench.chunking import delay_ticks, plan_tasks, run_tasks
    from dcqfa_ros.bench.chunking_contenders import find_contenders
    from dcqfa_ros.bench.chunking_record import Record, Settings
    from dcqfa_ros.bench.chunking_table import MARGIN, describe, make_rows
    from dcqfa_ros.bench.conditions import versions, watch_conditions
    from dcqfa_ros.runtime.chunking import Method

    known = [method.value for method in Method]
    names = [name for name in args.methods.split(",") if name] or known
    for name in names:
        if name not in known:
            raise OptionError(f"--methods: {name!r} is unknown; there are {', '.join(known)}")
    methods = [Method(name) for name in dict.fromkeys(names)]
    delays = _delays(args.delays_ms)
    if args.seeds < 1:
        raise OptionError(f"--seeds: expected at least 1, got {args.seeds}")
    field = find_contenders(args.bundle, args.variant, args.trained_bundle, methods)
    action = field.spec.action
    horizon = action.executed if args.execution_horizon is None else args.execution_horizon
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    tasks, not_run = plan_tasks(field, methods, delays, seeds, args.steps, args.threads, horizon)
    settings = Settings(
        bundle=field.spec.name,
        variant=args.variant,
        first_seed=args.first_seed,
        seeds=args.seeds,
        denoising_steps=args.steps,
        execution_horizon=horizon,
        threads=args.threads,
        versions=versions(("dcqfa_ros", "numpy", "onnxruntime", "gym-pusht", "pymunk")),
    )
    record = Record(settings, args.resume)
    conditions = watch_conditions()
    outcomes = run_tasks(tasks, record, args.jobs)
    notes = {method: contender.note for method, contender in field.contenders.items()}
    rows = make_rows(outcomes, {delay: delay_ticks(delay, action.rate_hz) for delay in delays}, args.first_seed, notes)
    result = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "not_run": [dataclasses.asdict(entry) | {"method": entry.method.value} for entry in not_run],
        **settings.model_dump(mode="json"),
        "denoising_steps": args.steps or field.spec.diffusion.steps,
        "margin": MARGIN,
        "control_rate_hz": action.rate_hz,
        "units": {"delay": "ms", "jerk": "px/s^3", "discontinuity": "px", "jump": "px", "steps": "control ticks"},
        **dataclasses.asdict(conditions()),
    }
    if args.html is not None:
        from dcqfa_ros.bench.chunking_page import write_page

        write_page(args.html, rows, not_run, settings)
    if args.json:
        print(json.dumps(result))
    else:
        print("\n".join(describe(rows)))
        for method in dict.fromkeys(entry.method for entry in not_run):
            print(f"{method.value} not run: {field.not_run[method]}")
    return 0


def _delays(text: str) -> list[float]:
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",") if part))
    except ValueError:
        raise OptionError(f"--delays-ms: expected numbers in ms such as {DELAYS}, got {text!r}") from None
