"""``dcqfa profile``: measure or model the look-up table of a device."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.lut import LookUpTable
    from training.space import SearchSpace


def profile(subparsers: Any) -> None:
    """Register ``dcqfa profile``."""
    parser = subparsers.add_parser(
        "profile",
        help="measure what each block of a search space takes on this computer",
        description="Write a look-up table of latencies for every block size of a supernet's search space: measured on "
        "this computer's CPU in the context of whole networks, or modelled from published peaks with --model. Keep the "
        "computer idle meanwhile. An interrupted measurement continues where it stopped.",
        epilog="example: dcqfa profile --config config/training/pusht_keypoints_supernet.yaml --threads 1 "
        "--out config/tables/cpu_1_thread.json",
    )
    parser.add_argument("--config", type=Path, required=True, help="training YAML with a search space")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the table; an older one is replaced")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of the engine (default: 1)")
    parser.add_argument("--name", help="name of the table (default: that of the file)")
    parser.add_argument(
        "--tokens",
        metavar="N,N",
        help="action tokens computed per step (default: those up to the last executed action, and the whole horizon)",
    )
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="timed chunks per network (default: 100)")
    parser.add_argument("--warm-ups", type=int, default=20, metavar="N", help="chunks before (default: 20)")
    parser.add_argument(
        "--subnets", type=int, default=30, metavar="N", help="random subnets to compare predictions on (default: 30)"
    )
    parser.add_argument("--model", metavar="DEVICE", help="model this device instead of measuring: orin_nx_16gb")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(func=_profile)


def _profile(args: argparse.Namespace) -> int:
    from training.config import load_config
    from training.lut import merged, save_table

    config = load_config(args.config)
    spaces = [_space(config, args.config, tokens) for tokens in _tokens(args.tokens, config)]
    progress = [args.out.with_name(f".{args.out.name}.{s.shape.blocks[-1].tokens}_tokens.progress") for s in spaces]
    if args.model is not None:
        tables = [_model(args.model, space) for space in spaces]
    else:
        tables = [_measure(args, config, space, file) for space, file in zip(spaces, progress, strict=True)]
    table = merged(tables)
    save_table(args.out, table)
    for file in progress:
        file.unlink(missing_ok=True)
    _report(args, table)
    return 0


def _tokens(text: str | None, config: TrainConfig) -> list[int]:
    """Numbers of tokens to measure, ascending.

    Raises:
        ArgumentError: not a list of numbers from 1 to the horizon.
    """
    from training.commands import ArgumentError

    horizon = config.policy.horizon
    if text is None:
        return sorted({min(horizon, config.policy.observation_horizon - 1 + config.executed_actions), horizon})
    try:
        tokens = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ArgumentError(f"--tokens {text}: expected whole numbers separated by commas") from error
    if tokens[0] < 1 or tokens[-1] > horizon:
        raise ArgumentError(f"--tokens {text}: expected numbers from 1 to the horizon {horizon}")
    return tokens


def _space(config: TrainConfig, file: Path, tokens: int) -> SearchSpace:
    from training.commands import ArgumentError
    from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
    from training.space import SearchSpace

    if config.supernet is None:
        raise ArgumentError(f"--config {file}: it has no section supernet; give the configuration of a supernet")
    return SearchSpace(diffusion_policy_t_shape(config.policy, tokens), config.supernet.space)


def _measure(args: argparse.Namespace, config: TrainConfig, space: SearchSpace, progress: Path) -> LookUpTable:
    from training.commands import ArgumentError
    from training.profile import measure
    from training.profile_graphs import DiffusionPolicyTGraphs
    from training.profile_table import ProfileSettings

    if config.policy.image is not None:
        raise ArgumentError(
            f"--config {args.config}: its policy reads images, and their encoder cannot be exported and timed; model a "
            "device with --model, or train on made-up devices alone (supernet.synthetic, no supernet.tables)"
        )
    settings = ProfileSettings(
        name=args.name or args.out.stem,
        threads=args.threads,
        runs=args.runs,
        warm_ups=args.warm_ups,
        subnets=args.subnets,
    )
    graphs = DiffusionPolicyTGraphs(config.policy, space.shape.blocks[-1].tokens)
    if progress.exists():
        print(f"continuing {progress}", file=sys.stderr)
    return measure(space, graphs, settings, progress, quiet=False)


def _model(name: str, space: SearchSpace) -> LookUpTable:
    from training.commands import ArgumentError
    from training.modelled_tables import DEVICES, modelled_table

    device = next((device for device in DEVICES if device.name == name), None)
    if device is None:
        raise ArgumentError(f"--model {name}: unknown; there is {', '.join(device.name for device in DEVICES)}")
    return modelled_table(device, space)


def _report(args: argparse.Namespace, table: LookUpTable) -> None:
    if args.json:
        facts = {
            "table": str(args.out),
            "name": table.name,
            "device": table.device.name,
            "runtime": table.runtime,
            "threads": table.threads,
            "modelled": table.modelled,
            "entries": len(table.blocks),
            "workspace_bytes": table.workspace_bytes,
            "notes": table.method.notes,
            "validation": [report.model_dump(mode="json") for report in table.validation],
        }
        print(json.dumps(facts))
        return
    kind = "modelled" if table.modelled else f"{table.method.runs} runs, {table.threads} threads"
    print(f"{args.out}: {table.device.name}, {table.runtime}, {len(table.blocks)} entries ({kind})")
    for report in table.validation:
        print(
            f"  {report.precision}, {report.tokens} tokens: predictions of {report.subnets} random subnets are off by "
            f"{report.median_absolute:.1%} in the median, {report.max_absolute:.1%} at most"
        )
    print(f"  {table.method.notes[-1]}")
