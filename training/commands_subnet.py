"""``dcqfa subnet``: what one subnet of a supernet holds, costs, and achieves."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.shipped import DEFAULT_RUN, default_run

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.space import SearchSpace
    from training.subnet import Subnet
    from training.supernet_checkpoint import TrainedSupernet

DEFAULT_CONFIG = "training/pusht_keypoints_supernet.yaml"
DEFAULT_SEEDS = 50
DEFAULT_FIRST_SEED = 200_000  # the published seeds are for reported numbers, not for looking around
EVALUATION_OPTIONS = ("data", "seeds", "first_seed", "threads", "compile")


def subnet(subparsers: Any) -> None:
    """Register ``dcqfa subnet``."""
    parser = subparsers.add_parser(
        "subnet",
        help="what one subnet of a supernet holds, costs and achieves",
        description="Print a subnet's lossless name, genes, parameters, bits, operations, size and predicted cost on "
        "every device whose look-up table is at hand; with --eval also its held-out denoising loss and its score in "
        "simulated Push-T, both with the averaged weights of a run.",
        epilog="example: dcqfa subnet d6-h.75-m3-w4a4 --eval --seeds 20",
    )
    parser.add_argument(
        "subnet",
        metavar="CONFIG",
        help="name of a subnet: d6-h.75-m3-w4a4, w4a4.4h1024x2.0.3h768x5, or largest, smallest, fp32, fp16, fp8, w8a8, "
        "w4a8, w8a4, w4a4",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--run",
        type=Path,
        metavar="RUN",
        help=f"run folder or checkpoint of a supernet (default: {DEFAULT_RUN}, or else the shipped one for --eval)",
    )
    source.add_argument(
        "--config",
        metavar="YAML",
        help=f"its configuration alone, before training (default without a run: {DEFAULT_CONFIG})",
    )
    parser.add_argument(
        "--table",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="look-up table of a device; may be repeated (default: those of the configuration)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the configuration's)")
    parser.add_argument("--eval", action="store_true", help="measure held-out loss and closed-loop score; needs a run")
    group = parser.add_argument_group("with --eval")
    group.add_argument("--data", help="path of the demonstrations (default: where the run read them)")
    group.add_argument(
        "--seeds", type=int, metavar="N", help=f"start seeds; 0: no closed loop (default: {DEFAULT_SEEDS})"
    )
    group.add_argument("--first-seed", type=int, metavar="S", help=f"first start seed (default: {DEFAULT_FIRST_SEED})")
    group.add_argument("--threads", type=int, metavar="N", help="threads (default: 1)")
    group.add_argument(
        "--compile", action="store_true", help="compile for the closed loop: needs a C++ compiler and half a minute"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_subnet)


def _subnet(args: argparse.Namespace) -> int:
    _check(args)
    supernet, config = _source(args)
    from training.sandwich import search_space

    space = search_space(config)
    chosen = space.parse(args.subnet)
    facts = {
        **_counts(space, chosen),
        "run": None if supernet is None else str(supernet.path),
        "step": None if supernet is None else supernet.meaning.step,
        **_costs(args.table, config, space, chosen, args.steps),
    }
    if supernet is not None and args.eval:
        facts |= _measured(args, supernet, chosen)
    if args.json:
        print(json.dumps(facts))
    else:
        print("\n".join(_lines(facts)))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other or are out of range.

    Raises:
        ArgumentError: naming the option.
    """
    from training.commands import ArgumentError, check_least

    check_least(args, steps=1, seeds=0, first_seed=0, threads=1)
    if args.eval:
        if args.config is not None:
            raise ArgumentError("--eval: a configuration has no weights; give --run in place of --config")
        return
    for option in EVALUATION_OPTIONS:
        if getattr(args, option) not in (None, False):
            raise ArgumentError(f"--{option.replace('_', '-')}: has no effect without --eval")


def _source(args: argparse.Namespace) -> tuple[TrainedSupernet | None, TrainConfig]:
    """The trained supernet, where one is at hand, and the configuration."""
    from dcqfa_ros.paths import find_config
    from training.checkpoint import CHECKPOINT
    from training.commands import ArgumentError
    from training.config import load_config
    from training.supernet_checkpoint import load_supernet

    run = args.run
    if run is None and args.eval:  # --config was refused
        run = default_run()
        if not (run / CHECKPOINT).is_file():
            raise ArgumentError(
                f"--eval: measuring needs trained weights; give --run ({run} has none, none is shipped)"
            )
    elif run is None and args.config is None and (DEFAULT_RUN / CHECKPOINT).is_file():
        run = DEFAULT_RUN
    if run is not None:
        supernet = load_supernet(run)
        return supernet, supernet.meaning.config
    return None, load_config(find_config(args.config or DEFAULT_CONFIG))


def _counts(space: SearchSpace, chosen: Subnet) -> dict[str, Any]:
    """What follows from the architecture alone."""
    from training.space_counts import flops, mean_bits, paper_bytes, parameters, real_bytes

    shape = space.shape
    per_chunk, per_step = flops(shape, chosen)
    return {
        "subnet": space.name(chosen),
        "precision": chosen.precision.value,
        "depth": chosen.depth,
        "blocks": len(shape.blocks),
        "genes": list(space.encode(chosen)),
        "parameters": parameters(shape, chosen),
        "mean_bits": mean_bits(shape, chosen),
        "flops_per_chunk": per_chunk,
        "flops_per_step": per_step,
        "paper_bytes": paper_bytes(shape, chosen),
        "real_bytes": real_bytes(shape, chosen),
    }


def _costs(
    files: list[Path], config: TrainConfig, space: SearchSpace, chosen: Subnet, steps: int | None
) -> dict[str, Any]:
    """Predicted cost on every device; tables of the configuration that are not there are listed as missing."""
    from training.commands import ArgumentError
    from training.cost import cost
    from training.lut import load_table
    from training.tables_at_hand import tables_at_hand

    timesteps = config.diffusion.train_timesteps
    steps = config.diffusion.steps if steps is None else steps
    if steps > timesteps:
        raise ArgumentError(f"--steps: expected at most the {timesteps} time steps of training, got {steps}")
    missing: list[str] = []
    if not files:
        files, missing = tables_at_hand(config)
    rows = []
    for file in files:
        table = load_table(file)
        predicted = cost(table, space.shape, chosen, steps)
        rows.append(
            {
                "table": table.name,
                "file": str(file),
                "device": table.device.name,
                "modelled": table.modelled,
                "latency_ms": predicted.latency_ms,
                "memory_bytes": predicted.memory_bytes,
            }
        )
    return {"denoising_steps": steps, "costs": rows, "missing_tables": missing}


def _measured(args: argparse.Namespace, supernet: TrainedSupernet, chosen: Subnet) -> dict[str, Any]:
    """Held-out loss and closed-loop score of the run's averaged weights."""
    import torch

    from training.evaluate import evaluate
    from training.search.session import check_closed_loop

    torch.set_num_threads(args.threads or 1)
    seeds = DEFAULT_SEEDS if args.seeds is None else args.seeds
    first = DEFAULT_FIRST_SEED if args.first_seed is None else args.first_seed
    if seeds:
        check_closed_loop(supernet, range(first, first + seeds))  # now, not when the loss has been measured
    loss = _held_out_loss(supernet, chosen, args.data)
    score = None
    if seeds:
        path, name = str(supernet.path), supernet.space.name(chosen)
        score = evaluate(
            path, name, range(first, first + seeds), steps=args.steps, threads=args.threads, compiled=args.compile
        )
    return {"held_out_loss": loss, "closed_loop": score}


def _held_out_loss(supernet: TrainedSupernet, chosen: Subnet, path: str | None) -> float | None:
    """The figure that training logs for this subnet; None where the run holds no episode out.

    Raises:
        DataError: the demonstrations cannot be read, or are not those of the run.
    """
    import torch

    from training.commands import data_section
    from training.config import override
    from training.data.episodes import DataError
    from training.data.policy_data import PolicyData
    from training.held_out import held_out_loss
    from training.objective import Objective

    config = override(supernet.meaning.config, data=data_section(path))
    data = PolicyData(config)
    if supernet.meaning.data_sha256 not in (None, data.sha256):
        raise DataError(
            f"{config.data.path}: not the demonstrations that {supernet.path} was trained on; give those with --data"
        )
    if not len(data.held_out):
        print(f"{supernet.path}: the run holds no episode out, so no loss is measured", file=sys.stderr)
        return None
    supernet.network.activate(chosen)
    loss = held_out_loss(supernet.network, Objective(config, torch.device("cpu")), data)
    return loss if math.isfinite(loss) else None


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    origin = "" if facts["run"] is None else f" ({facts['run']}, step {facts['step']})"
    yield f"{facts['subnet']}{origin}"
    yield f"  blocks       {facts['depth']} of {facts['blocks']}, precision {facts['precision']}"
    yield f"  genes        {' '.join(map(str, facts['genes']))}"
    yield f"  parameters   {facts['parameters']:,}, weights of the blocks at {facts['mean_bits']:.2f} bits on average"
    per_chunk, per_step, steps = facts["flops_per_chunk"], facts["flops_per_step"], facts["denoising_steps"]
    yield f"  operations   {per_chunk / 1e6:.2f} MFLOP per chunk, {per_step / 1e6:.2f} MFLOP in each of {steps} steps"
    yield (
        f"  size         {facts['paper_bytes'] / 1e6:.2f} MB by the paper's convention, "
        f"{facts['real_bytes'] / 1e6:.2f} MB packed with scales"
    )
    for row in facts["costs"]:
        kind = "modelled" if row["modelled"] else "measured"
        yield (
            f"  cost         {row['table']} ({kind} table): {row['latency_ms']:.2f} ms per chunk, "
            f"{row['memory_bytes'] / 1e6:.1f} MB"
        )
    for text in facts["missing_tables"]:
        yield f"  cost         {text}: no such table; `dcqfa profile` makes one"
    if facts.get("held_out_loss") is not None:
        yield f"  held out     denoising loss {facts['held_out_loss']:.4f}"
    score = facts.get("closed_loop")
    if score is not None:
        half_width = "" if score["ci95"] is None else f" +- {score['ci95']:.3f}"
        last = score["first_seed"] + len(score["seeds"]) - 1
        yield (
            f"  closed loop  mean score {score['mean']:.3f}{half_width} over seeds {score['first_seed']} to {last} "
            f"({score['seconds']} s)"
        )
