"""``dcqfa sampler report``: what the configuration samplers draw for each device, and what those networks lose."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.sampler_report import Contestant, Loss, Report
    from training.supernet import SupernetTrainer

DEFAULT_RUN = Path("runs/pusht_keypoints_supernet")
HELD_OUT_SAMPLES = 256


def sampler(subparsers: Any) -> None:
    """Register ``dcqfa sampler`` and its subcommand."""
    parser = subparsers.add_parser(
        "sampler",
        help="examine the configuration sampler of a supernet run",
        description="Examine the configuration sampler of a supernet run.",
        epilog="example: dcqfa sampler report --json",
    )
    actions = parser.add_subparsers(metavar="WHAT", required=True)
    report = actions.add_parser(
        "report",
        help="share of draws within budget, cost and held-out loss: learned, rejection and uniform sampler",
        description="Train learned samplers on the paired losses that a supernet run has logged, with one device held "
        "out, and compare what they draw with rejection and uniform sampling, for every device at every budget. Costs "
        "come from the devices' tables, losses from the run's averaged network on held-out data. The sampler that was "
        "trained inside the run takes part as in_run.",
        epilog="example: dcqfa sampler report runs/pusht_keypoints_supernet --held-out orin_nx_16gb --json",
    )
    report.add_argument("run", type=Path, nargs="?", default=DEFAULT_RUN, help="run folder (default: %(default)s)")
    report.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="KIND=RUN",
        help="measure what this kind of sampler draws (learned, rejection, uniform) with the network of another run, "
        "trained with that sampler for equal steps; may be repeated",
    )
    report.add_argument("--held-out", metavar="DEVICE", help="device kept out of training (default: the run's)")
    report.add_argument("--data", help="path of the demonstrations (default: where the run read them)")
    report.add_argument(
        "--budgets",
        default="0.3,0.5,0.8",
        metavar="X,Y",
        help="shares of the way from the smallest to the largest network's cost (default: %(default)s)",
    )
    report.add_argument("--seeds", type=int, default=3, metavar="N", help="samplers of each kind (default: 3)")
    report.add_argument("--updates", type=int, default=2000, metavar="N", help="updates of each (default: 2000)")
    report.add_argument("--draws", type=int, default=400, metavar="N", help="per sampler and budget (default: 400)")
    report.add_argument("--losses", type=int, default=24, metavar="N", help="draws evaluated of these (default: 24)")
    report.add_argument("--plot", type=Path, metavar="FILE", help="picture (default: sampler_report.png in the run)")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.set_defaults(func=_report)


def _report(args: argparse.Namespace) -> int:
    from training.commands import ArgumentError, check_least
    from training.sampler_report import KINDS, plot_report, sampler_report, train_samplers

    check_least(args, seeds=1, updates=1, draws=1, losses=0)
    budgets = _budgets(args.budgets)
    networks = _networks(args.network)
    run = _open(args.run, args.data)
    conditions = run.conditions
    devices = conditions.measured | conditions.held_out
    trained_without = next(iter(conditions.held_out), None)
    held_out = args.held_out or trained_without
    if held_out not in devices:
        known = ", ".join(sorted(devices)) or "none"
        raise ArgumentError(f"--held-out: expected one of the run's devices ({known}), got {held_out}")
    config = run.sampler.config
    contestants = train_samplers(
        run.space,
        devices,
        conditions.synthetic,
        run.sampler.predictor.pairs(),
        config,
        held_out=held_out,
        seeds=range(args.seeds),
        updates=args.updates,
    )
    if config.kind == "learned" and held_out == trained_without:
        contestants = [*contestants, _in_run(run)]
    losses = {kind: _loss(run) for kind in KINDS} | {kind: _loss(_open(p, args.data)) for kind, p in networks.items()}
    contestants = [dataclasses.replace(c, loss=losses[c.sampler.config.kind]) for c in contestants]
    report = sampler_report(contestants, budgets, args.draws, args.losses)
    plot = args.plot or args.run / "sampler_report.png"
    plot_report(report, plot)
    facts = {
        "run": str(args.run),
        "step": run.step,
        "networks": {kind: str(networks.get(kind, args.run)) for kind in KINDS},
        "held_out": held_out,
        "updates": args.updates,
        "plot": str(plot),
    }
    if args.json:
        print(json.dumps(facts | report.document()))
    else:
        _print(report, plot)
    return 0


def _budgets(text: str) -> list[float]:
    from training.commands import ArgumentError

    try:
        budgets = sorted({float(part) for part in text.split(",")})
    except ValueError:
        budgets = []
    if not budgets or not all(math.isfinite(share) and share > 0.0 for share in budgets):
        raise ArgumentError(f"--budgets {text}: expected shares above 0 such as 0.3,0.5,0.8")
    return budgets


def _networks(options: list[str]) -> dict[str, Path]:
    from training.commands import ArgumentError
    from training.sampler_report import KINDS

    networks = {}
    for option in options:
        kind, _, path = option.partition("=")
        if kind not in KINDS or not path:
            raise ArgumentError(f"--network {option}: expected KIND=RUN with one of {', '.join(KINDS)}")
        networks[kind] = Path(path)
    return networks


def _open(folder: Path, data: str | None) -> SupernetTrainer:
    """The supernet run in a folder, at its last checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        ConfigError: it is no run of a supernet.
    """
    from training.checkpoint import CHECKPOINT, load_checkpoint
    from training.commands import data_section
    from training.config import TrainConfig, override
    from training.supernet import SupernetTrainer

    payload = load_checkpoint(folder / CHECKPOINT)
    config = TrainConfig.model_validate_json(json.dumps(payload["config"]), strict=True)
    trainer = SupernetTrainer(override(config, data=data_section(data)), folder)
    print(f"{folder}: step {trainer.step}, {len(trainer.sampler.predictor)} logged pairs", file=sys.stderr)
    return trainer


def _in_run(run: SupernetTrainer) -> Contestant:
    """The sampler as training left it."""
    from training.sampler_report import IN_RUN, Contestant

    return Contestant(IN_RUN, run.config.run.seed, run.sampler)


def _loss(run: SupernetTrainer) -> Loss | None:
    """Held-out loss of a subnet of a run's averaged network; None where the run holds no episode out."""
    if not len(run.held_out):
        print(f"{run.folder}: no episode is held out, so no loss is measured", file=sys.stderr)
        return None

    def loss(subnet: Any) -> float:
        run.ema.activate(subnet)
        return run.held_out_loss(run.ema, batches=1, size=HELD_OUT_SAMPLES)

    return loss


def _print(report: Report, plot: Path) -> None:
    from training.sampler_report import REQUIRED_SHARE, SEED_TOLERANCE, summarize

    for row in summarize(report.rows):
        loss = "" if row["loss"] is None else f", held-out loss {row['loss']:.4f}"
        print(
            f"{row['device']}{' (held out)' if row['held_out'] else ''}, budget {row['budget']:g}, {row['kind']}: "
            f"{row['share_within']:.1%} within budget, latency {row['latency_ms']:.3g} ms, "
            f"memory {row['memory_bytes'] / 1e6:.3g} MB{loss}"
        )
    print(
        f"learned: least share within budget {report.least_share:.1%} (expected {REQUIRED_SHARE:.0%}), cost "
        f"{'rises' if report.monotone else 'does not rise'} with the budget, seeds differ by at most "
        f"{report.seed_difference:.3f} of a budget (expected {SEED_TOLERANCE:g}); plot: {plot}"
    )
