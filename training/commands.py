"""Commands that training adds to ``dcqfa``: ``train`` and ``eval``.

Each function registers one command; what a command needs (PyTorch above all) is imported when it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcqfa_ros.errors import UserError

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.supernet import SupernetTrainer
    from training.trainer import Trainer

EXIT_INTERRUPTED = 130


class ArgumentError(UserError, ValueError):
    """A command-line value that cannot be used; the message names the option."""


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse options below their least value; those that were not given pass.

    Raises:
        ArgumentError: naming the option.
    """
    for option, bound in least.items():
        value = getattr(args, option)
        if value is not None and value < bound:
            raise ArgumentError(f"--{option.replace('_', '-')}: expected at least {bound}, got {value}")


def train(subparsers: Any) -> None:
    """Register ``dcqfa train``."""
    parser = subparsers.add_parser(
        "train",
        help="train a policy or a supernet from demonstrations",
        description="Train a full-precision policy, or a supernet where the YAML has a section supernet. A run folder "
        "that holds a checkpoint is continued, bit for bit as if it had never stopped (with equal threads, compilation "
        "and device). Ctrl-C writes a checkpoint, a second one interrupts at once. TensorBoard events are written to "
        "the run folder. A YAML with warm_start fine-tunes another policy: with policy.prefix for real-time chunking, "
        "with a section consistency into one of few denoising steps. A YAML with a section distill trains a supernet "
        "further, on states that its networks visit in the simulated cell (docs/distillation.md). Several processes "
        "share every batch when torchrun starts them: torchrun --nproc-per-node 2 -m dcqfa_ros.cli train --config ... "
        "(--threads is then per process).",
        epilog="example: dcqfa train --config config/training/pusht_keypoints.yaml --data pusht_human_demos_lowdim.npz",
    )
    parser.add_argument("--config", type=Path, required=True, help="training YAML")
    parser.add_argument("--data", help="path of the demonstrations, in place of data.path in the YAML")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    parser.add_argument("--steps", type=int, help="optimizer steps of the whole run, in place of run.steps")
    parser.add_argument(
        "--change-length", action="store_true", help="continue a run although its number of steps is another one"
    )
    parser.add_argument(
        "--change-sandwich",
        action="store_true",
        help="continue a supernet's run although supernet.sandwich (networks of a step, their batches and weights) or "
        "supernet.sampler.stratified_share is another one",
    )
    parser.add_argument(
        "--change-optimizer",
        action="store_true",
        help="continue a run although its section optimizer, or supernet.step_learning_rate, is another one",
    )
    parser.add_argument(
        "--change-tables",
        action="store_true",
        help="continue a supernet's run although supernet.tables hold other measurements than it began with; going on "
        "from a copy of the shipped models/pusht_keypoints_supernet needs --change-length --change-tables",
    )
    parser.add_argument(
        "--only",
        metavar="SUBNET",
        help="train this one subnet of a supernet's space alone, for comparison (default run folder: runs/NAME.SUBNET)",
    )
    parser.add_argument("--start", help="supernet that distillation trains on, in place of distill.start")
    parser.add_argument("--workers", type=int, help="processes of rollouts, in place of distill.workers")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run rollouts on a Ray cluster: auto, local, host:port or ray://host:port, in place of distill.ray",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="in place of run.device")
    parser.add_argument("--threads", type=int, help="CPU threads, in place of run.threads")
    parser.add_argument("--seed", type=int, help="of all that the run draws, in place of run.seed")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(func=_train)


def _train(args: argparse.Namespace) -> int:
    from training.config import load_config, override
    from training.identity import CHANGEABLE
    from training.log import TensorBoardLog

    config = override(
        load_config(args.config),
        data=data_section(args.data),
        run={"steps": args.steps, "device": args.device, "threads": args.threads, "seed": args.seed},
    )
    if args.only is not None:
        if config.supernet is None:
            raise ArgumentError(f"--only {args.only}: {args.config} has no supernet section, hence no subnets")
        config = override(config, supernet={"only": args.only})
    distill = {field: getattr(args, field) for field in ("start", "workers", "ray") if getattr(args, field) is not None}
    if distill:
        if config.distill is None:
            raise ArgumentError(f"--{next(iter(distill))}: {args.config} has no distill section, hence no rollouts")
        config = override(config, distill=distill)
    name = config.name if args.only is None else f"{config.name}.{args.only}"
    folder = args.out or Path("runs") / name
    for option, what in (("change_sandwich", "sandwich"), ("change_tables", "tables")):
        if getattr(args, option) and config.supernet is None:
            raise ArgumentError(f"--{option.replace('_', '-')}: {args.config} has no supernet section, hence no {what}")
    change = [field for field, option in CHANGEABLE.items() if getattr(args, option.strip("-").replace("-", "_"))]
    trainer = _trainer(config, folder, change=change, config_file=args.config.name)
    first = trainer.world.first  # of the processes that torchrun started; the others are silent
    if trainer.step and first:
        print(f"continuing {trainer.checkpoint_path} at step {trainer.step}", file=sys.stderr)
    if trainer.changed and first:
        print(f"not bit for bit as before: {', '.join(trainer.changed)}", file=sys.stderr)
    with closing(TensorBoardLog(folder, trainer.step)) if first else nullcontext() as log:
        complete = trainer.run(log)
    outcome = {
        "complete": complete,
        "step": trainer.step,
        "steps": config.run.steps,
        "checkpoint": str(trainer.checkpoint_path),
        **_held_out(trainer, complete),
    }
    if first:
        _print_outcome(outcome, args.json)
    if complete:
        return 0
    if first:
        print("stopped; run the same command again to continue from here", file=sys.stderr)
    return EXIT_INTERRUPTED


def _trainer(config: TrainConfig, folder: Path, **options: Any) -> Trainer | SupernetTrainer:
    """The run that ``config`` describes, continued where ``folder`` holds a checkpoint."""
    if config.distill is not None:
        from training.distill import DistillTrainer

        return DistillTrainer(config, folder, **options)
    if config.supernet is not None:
        from training.supernet import SupernetTrainer

        return SupernetTrainer(config, folder, **options)
    if config.consistency is not None:
        from training.consistency import ConsistencyTrainer

        return ConsistencyTrainer(config, folder, **options)
    from training.trainer import Trainer

    return Trainer(config, folder, **options)


def _held_out(trainer: Trainer | SupernetTrainer, complete: bool) -> dict[str, Any]:
    """What a finished run reaches on held-out episodes (all processes have to ask); None where nothing is held out."""
    figures = trainer.validate() if complete else None
    if isinstance(figures, dict):
        known = {name: loss for name, loss in figures.items() if math.isfinite(loss)}
        return {"validation_loss": known.get("largest"), "held_out": known or None}
    by_prefix = trainer.validate_prefixes() if complete else {}
    known = {f"prefix {n}": loss for n, loss in by_prefix.items() if math.isfinite(loss)}
    held_out = {"held_out": known} if known else {}
    return {"validation_loss": figures if figures is not None and math.isfinite(figures) else None, **held_out}


def _print_outcome(outcome: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(outcome))
        return
    print(f"step {outcome['step']} of {outcome['steps']}: {outcome['checkpoint']}")
    table = outcome.get("held_out")
    if table:
        print("held-out denoising loss of the averaged networks:")
        for name, loss in table.items():
            print(f"  {name:<10} {loss:.4f}")


def data_section(path: str | None) -> dict[str, Any]:
    """Fields of the data section for ``--data``: another path may be of another format than the file says."""
    return {} if path is None else {"path": path, "format": "auto"}


def eval(subparsers: Any) -> None:  # noqa: A001 (the command is called eval)
    """Register ``dcqfa eval``."""
    parser = subparsers.add_parser(
        "eval",
        help="score a policy in simulated Push-T",
        description="Run a policy closed loop in Push-T by the published protocol, up to 250 seeds together, and "
        "report the mean score with its 95 % interval. A policy is a bundle, which needs no PyTorch, or a run; the "
        "variants of a supernet's run are its subnets. Seeds 100000 to 100049 are for the reported number only: choose "
        "checkpoints and tune with others.",
        epilog="example: dcqfa eval models/pusht_keypoints --variant fp32 --seeds 50 --first-seed 100000 --json",
    )
    parser.add_argument("policy", metavar="POLICY", help="bundle (folder or name), run folder or checkpoint file")
    parser.add_argument(
        "--variant",
        help="variant of the bundle (default: the bundle's own), or subnet of a supernet's run such as w4a4, smallest "
        "or d6-h.75-m3-w4a4 (default: largest)",
    )
    parser.add_argument(
        "--against",
        metavar="[POLICY:]VARIANT",
        help="a second variant or subnet, of this policy or of another one (models/pusht_keypoints:fp32), compared in "
        "pairs on the same seeds",
    )
    parser.add_argument("--seeds", type=int, default=50, metavar="N", help="number of start seeds (default: 50)")
    parser.add_argument(
        "--first-seed", type=int, default=100_000, metavar="S", help="first start seed (default: 100000)"
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: the bundle's)")
    parser.add_argument("--threads", type=int, help="inference threads (default: every core; 1 for a checkpoint)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile subnets, which needs a C++ compiler and half a minute each and pays from some hundred seeds on",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from training.evaluate import evaluate as run

    for option in ("seeds", "steps", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ArgumentError(f"--{option}: expected at least 1, got {value}")
    if args.first_seed < 0:
        raise ArgumentError(f"--first-seed: expected at least 0, got {args.first_seed}")
    result = run(
        args.policy,
        args.variant,
        range(args.first_seed, args.first_seed + args.seeds),
        steps=args.steps,
        threads=args.threads,
        against=args.against,
        compiled=args.compile,
    )
    if args.json:
        print(json.dumps(result))
        return 0
    half_width = "" if result["ci95"] is None else f" +- {result['ci95']:.3f}"
    last = result["first_seed"] + len(result["seeds"]) - 1
    print(
        f"{result['policy']}/{result['variant']}: mean score {result['mean']:.3f}{half_width} over seeds "
        f"{result['first_seed']} to {last}, {result['sampler']} {result['denoising_steps']} steps "
        f"({result['seconds']} s)"
    )
    paired = result["paired"]
    if paired is not None:
        half_width = "" if paired["ci95"] is None else f" +- {paired['ci95']:.3f}"
        how = (paired["other_sampler"], paired["other_denoising_steps"])
        otherwise = "" if how == (result["sampler"], result["denoising_steps"]) else f", {how[0]} {how[1]} steps"
        print(
            f"against {args.against} (mean score {paired['other_mean']:.3f}{otherwise}), in pairs: "
            f"{paired['mean']:+.3f}{half_width} (95 % interval)"
        )
    return 0
