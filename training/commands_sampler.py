"""``dcqfa sampler report``: what the configuration samplers draw for each device, and what those networks lose."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.shipped import DEFAULT_RUN, default_run, shipped_run

if TYPE_CHECKING:
    from training.sampler_report import Contestant, Loss, Report
    from training.supernet import SupernetTrainer

PLOT = "sampler_report.png"
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
        "trained inside the run takes part as in_run; where tables were measured anew since, it is marked and does "
        "not count in what is said of the learned sampler.",
        epilog="example: dcqfa sampler report runs/pusht_keypoints_supernet --held-out orin_nx_16gb --json",
    )
    report.add_argument(
        "run", type=Path, nargs="?", help=f"run folder (default: {DEFAULT_RUN}, or else the shipped supernet)"
    )
    report.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="KIND=RUN",
        help="measure what this kind of sampler draws (learned, rejection, uniform) with the network of another run, "
        "trained with that sampler for equal steps, with the same space and supernet.sandwich; given once for a kind "
        "it measures all samplers of that kind, given --seeds times the first measures the first sampler, and so on",
    )
    report.add_argument("--held-out", metavar="DEVICE", help="device kept out of training (default: the run's, if any)")
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
    report.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"picture (default: {PLOT} in the run; here for the shipped supernet)"
    )
    report.add_argument("--json", action="store_true", help="print JSON")
    report.set_defaults(func=_report)


def _report(args: argparse.Namespace) -> int:
    from training.commands import ArgumentError, check_least
    from training.sampler_plot import check_plot, plot_report
    from training.sampler_report import IN_RUN, KINDS, sampler_report, train_samplers

    check_least(args, seeds=1, updates=1, draws=1, losses=0)
    budgets = _budgets(args.budgets)
    networks = _networks(args.network, args.seeds)
    folder = default_run() if args.run is None else args.run
    plot = args.plot or _plot_of(folder)
    check_plot(plot)
    run, tables = _open(folder, args.data, args.losses)
    conditions = run.conditions
    devices = conditions.measured | conditions.held_out
    trained_without = next(iter(conditions.held_out), None)
    held_out = args.held_out or trained_without
    if held_out is not None and held_out not in devices:
        known = ", ".join(sorted(devices)) or "none"
        raise ArgumentError(f"--held-out: expected one of the run's devices ({known}), got {held_out}")
    runs = {kind: [_open_network(kind, path, run, args) for path in networks.get(kind, ())] or [run] for kind in KINDS}
    for kind, members in runs.items():
        _check_seeds(kind, members)
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
    other_tables = not all(tables.values())
    if config.kind == "learned" and held_out == trained_without:
        contestants = [*contestants, _in_run(run, other_tables)]
    own = _loss(run)
    losses = {kind: [own if member is run else _loss(member) for member in members] for kind, members in runs.items()}
    contestants = [
        dataclasses.replace(c, loss=own if c.label == IN_RUN else _of_seed(losses[c.label], c.seed))
        for c in contestants
    ]
    report = sampler_report(contestants, budgets, args.draws, args.losses)
    facts = {
        "run": str(folder),
        "step": run.step,
        "tables": [
            {"device": device, "file": str(run.tables.files[device]), "trained_with": same}
            for device, same in tables.items()
        ],
        "in_run_other_tables": other_tables,
        "networks": {kind: [_training(member) for member in members] for kind, members in runs.items()},
        "held_out": held_out,
        "updates": args.updates,
        "plot": str(plot),
    }
    if args.json:
        print(json.dumps(facts | report.document()))
    else:
        _print(report, plot)
    plot_report(report, plot)
    return 0


def _plot_of(folder: Path) -> Path:
    """Where the picture of a run goes: into its folder, but for what is shipped."""
    shipped = shipped_run()
    return Path(PLOT) if shipped is not None and folder.resolve() == shipped.resolve() else folder / PLOT


def _budgets(text: str) -> list[float]:
    from training.commands import ArgumentError

    try:
        budgets = sorted({float(part) for part in text.split(",")})
    except ValueError:
        budgets = []
    if not budgets or not all(math.isfinite(share) and share > 0.0 for share in budgets):
        raise ArgumentError(f"--budgets {text}: expected shares above 0 such as 0.3,0.5,0.8")
    return budgets


def _networks(options: list[str], seeds: int) -> dict[str, list[Path]]:
    """Run folders of each kind in ``--network``, in the order given.

    Raises:
        ArgumentError: an option is no KIND=RUN, or a kind has neither one run nor one for each of ``seeds``.
    """
    from training.commands import ArgumentError
    from training.sampler_report import KINDS

    networks: dict[str, list[Path]] = {}
    for option in options:
        kind, _, path = option.partition("=")
        if kind not in KINDS or not path:
            raise ArgumentError(f"--network {option}: expected KIND=RUN with one of {', '.join(KINDS)}")
        networks.setdefault(kind, []).append(Path(path))
    for kind, paths in networks.items():
        if len(paths) not in (1, seeds):
            raise ArgumentError(
                f"--network {kind}=...: expected one run, or one for each of the {seeds} samplers (--seeds), "
                f"got {len(paths)}"
            )
    return networks


def _of_seed(losses: list[Loss | None], seed: int) -> Loss | None:
    """What measures the sampler of a seed: the network of its number where each has its own."""
    return losses[seed] if len(losses) > 1 else losses[0]


def _check_seeds(kind: str, members: list[SupernetTrainer]) -> None:
    """Refuse networks of one kind that are one training twice.

    Raises:
        ArgumentError: two of them have the same ``run.seed``.
    """
    from training.commands import ArgumentError

    known: dict[int, SupernetTrainer] = {}
    for member in members:
        other = known.setdefault(member.config.run.seed, member)
        if other is not member:
            raise ArgumentError(
                f"--network {kind}={member.folder}: run.seed {member.config.run.seed} is that of {other.folder}, too; "
                "give runs that differ in it"
            )


def _open(folder: Path, data: str | None, losses: int) -> tuple[SupernetTrainer, dict[str, bool | None]]:
    """The supernet run in a folder, at its last checkpoint, and whether the devices' tables are those it trained with.

    Tables may be others: what is compared is trained here.

    Raises:
        CheckpointError: there is none, it cannot be read, or it holds no supernet whose subnets can be measured.
    """
    from training.checkpoint import CHECKPOINT, CheckpointError, load_checkpoint
    from training.commands import data_section
    from training.config import override
    from training.supernet import SupernetTrainer
    from training.supernet_checkpoint import is_supernet
    from training.trained import policy_meaning

    file = folder / CHECKPOINT
    payload = load_checkpoint(file)
    if not is_supernet(payload):
        raise CheckpointError(f"{file}: holds a single policy, no supernet; give a run of a supernet configuration")
    config = policy_meaning(file, payload).config
    assert config.supernet is not None
    if config.supernet.activations == "batchquant" and losses:
        raise CheckpointError(
            f"{file}: its activation ranges have to be estimated for each subnet (supernet.activations: batchquant), "
            "so losses of draws cannot be measured; give --losses 0 for shares and costs alone, or a run with learned "
            "quantizers"
        )
    config = override(config, data=data_section(data), run={"compile": False})  # nothing that is compiled runs
    trainer = SupernetTrainer(config, folder, change=["supernet.tables"])
    print(f"{folder}: step {trainer.step}, {len(trainer.sampler.predictor)} logged pairs", file=sys.stderr)
    tables = trainer.tables.as_in(payload)
    if not all(tables.values()):
        files = ", ".join(str(trainer.tables.files[device]) for device, same in tables.items() if not same)
        known = "" if False in tables.values() else " (which of them is not known: it keeps one hash of all)"
        print(
            f"{folder}: was trained with other tables than {files}{known}; costs are of the tables at hand, and its "
            "own sampler, in_run, was trained with the others",
            file=sys.stderr,
        )
    return trainer, tables


def _open_network(kind: str, folder: Path, first: SupernetTrainer, args: argparse.Namespace) -> SupernetTrainer:
    """The run whose network measures what one kind of sampler draws.

    Raises:
        ArgumentError: it was not trained with that kind, or not like the first run.
    """
    from training.commands import ArgumentError

    run, _ = _open(folder, args.data, args.losses)
    option, trained = f"--network {kind}={folder}", run.options.sampler.kind
    if trained != kind:
        raise ArgumentError(
            f"{option}: supernet.sampler.kind: expected {kind}, the run has {trained}; give a run trained with {kind}"
        )
    for field, mine, theirs in (
        ("policy", first.space.shape, run.space.shape),
        ("supernet.space", first.options.space, run.options.space),
        ("supernet.sandwich", first.options.sandwich, run.options.sandwich),
        ("supernet.only", first.options.only, run.options.only),
        ("step", first.step, run.step),
    ):
        if mine != theirs:
            values = f" ({theirs}, there {mine})" if field == "step" else ""
            raise ArgumentError(
                f"{option}: {field} is another one than that of {first.folder}{values}; networks are compared after "
                "equal training: give a run that differs in supernet.sampler.kind and run.seed alone"
            )
    return run


def _training(run: SupernetTrainer) -> dict[str, Any]:
    """What a run's network took: steps, samples of each member of a step, calls of the teacher (one a step)."""
    sandwich = run.options.sandwich
    batches = {name: getattr(sandwich, f"{name}_batch") for name in ("largest", "low", "smallest", "sampled")}
    return {
        "run": str(run.folder),
        "sampler": run.options.sampler.kind,
        "seed": run.config.run.seed,
        "steps": run.step,
        "batches": batches,
        "sampled": sandwich.sampled,
        "teacher_calls": run.step,
        "teacher_batch": max(size for name, size in batches.items() if name != "sampled" or sandwich.sampled),
    }


def _in_run(run: SupernetTrainer, other_tables: bool) -> Contestant:
    """The sampler as training left it."""
    from training.sampler_report import IN_RUN, Contestant

    return Contestant(IN_RUN, run.config.run.seed, run.sampler, other_tables=other_tables)


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
            f"{row['device']}{' (held out)' if row['held_out'] else ''}, budget {row['budget']:g}, {row['kind']}"
            f"{' (trained with other tables)' if row['other_tables'] else ''}: "
            f"{row['share_within']:.1%} within budget, latency {row['latency_ms']:.3g} ms, "
            f"memory {row['memory_bytes'] / 1e6:.3g} MB{loss}"
        )
    print(
        f"learned: least share within budget {report.least_share:.1%} (expected {REQUIRED_SHARE:.0%}), cost "
        f"{'rises' if report.monotone else 'does not rise'} with the budget, seeds differ by at most "
        f"{report.seed_difference:.3f} of a budget (expected {SEED_TOLERANCE:g}); plot: {plot}"
    )
