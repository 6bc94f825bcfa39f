"""``dcqfa profile``: measure or model the look-up table of a device, or compare its predictions with measurements."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.lut import LookUpTable
    from training.profile_networks import Workbench
    from training.profile_validate import Report
    from training.space import SearchSpace

CONFIG = "config/training/pusht_keypoints_supernet.yaml"
MODELLED = ("orin_nx_16gb", "orin_nx_8gb", "orin_nano_8gb", "agx_orin_64gb", "rtx_4090", "h200")
"""Names of ``training.device_peaks.DEVICES``, here because help texts must not wait for what that imports."""
DEFAULTS = {"runs": 100, "warm_ups": 20, "subnets": 30, "seed": 1}
IGNORED = {
    "measure": ("table", "plot", "seed"),
    "model": ("table", "plot", "seed", "runtime", "threads", "name", "runs", "warm_ups", "subnets"),
    "validate": ("model", "out", "name", "subnets"),
}
"""Options that would change nothing, by what is done; they are refused."""
WHY = {
    "measure": "is for --validate N",
    "model": "--model measures nothing, and a modelled table is called as its device",
    "validate": "--validate N compares N subnets with an existing table and writes none",
}


def profile(subparsers: Any) -> None:
    """Register ``dcqfa profile``."""
    modelled = ", ".join(MODELLED)
    parser = subparsers.add_parser(
        "profile",
        help="measure what each block of a search space takes on this computer",
        description="Write a look-up table of latencies for every block size of a supernet's search space: measured on "
        "this computer in the context of whole networks, on the runtime that will execute them, or modelled from "
        "published peaks with --model. Keep the computer idle meanwhile. An interrupted measurement continues where it "
        "stopped. With --validate no table is written: random networks are measured and compared with an existing one.",
        epilog=f"examples: dcqfa profile --runtime openvino --threads 1 --out config/tables/openvino_1_thread.json; "
        f"dcqfa profile --validate 30 --table config/tables/cpu_1_thread.json --json. Devices to model: {modelled}",
    )
    parser.add_argument("--config", type=Path, help=f"training YAML with a search space (default: {CONFIG})")
    parser.add_argument("--out", type=Path, help="JSON file of the table; an older one is replaced")
    parser.add_argument(
        "--runtime",
        metavar="NAME",
        help="what executes the networks: onnxruntime (default), openvino, torch_cuda, tensorrt or tensorrt_rtx; with "
        "--validate by default that of the table",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the engine (default: 1, or the table's)")
    parser.add_argument("--name", help="name of the table (default: that of the file)")
    parser.add_argument(
        "--tokens",
        metavar="N,N",
        help="action tokens computed per step (default: those up to the last executed action, and the whole horizon; "
        "with --validate the former)",
    )
    parser.add_argument("--runs", type=int, metavar="N", help="timed chunks per network (default: 100)")
    parser.add_argument("--warm-ups", type=int, metavar="N", help="chunks before (default: 20)")
    parser.add_argument("--subnets", type=int, metavar="N", help="random subnets to check a new table on (default: 30)")
    parser.add_argument("--model", metavar="DEVICE", help=f"model this device instead of measuring; one of {modelled}")
    group = parser.add_argument_group("validation of an existing table")
    group.add_argument(
        "--validate",
        type=int,
        metavar="N",
        help="compare predictions with measurements of N random subnets, 2 at least",
    )
    group.add_argument(
        "--table", type=Path, help="table of this device (default: the configuration's first that was measured here)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the draw of subnets (default: 1)")
    group.add_argument("--plot", type=Path, metavar="PNG", help="the picture (default: beside the table)")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(func=_profile)


def _profile(args: argparse.Namespace) -> int:
    from dcqfa_ros.paths import share_directory
    from dcqfa_ros.runtime.huge_pages import keep_heap_together
    from training.commands import ArgumentError, check_least
    from training.config import load_config

    keep_heap_together()  # as the robot's worker process does
    if args.config is None:
        args.config = share_directory() / CONFIG
    config = load_config(args.config)
    purpose = "validate" if args.validate is not None else "model" if args.model is not None else "measure"
    for option in IGNORED[purpose]:
        if getattr(args, option) is not None:
            raise ArgumentError(f"--{option.replace('_', '-')}: {WHY[purpose]}; leave it out")
    for option, value in DEFAULTS.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    if args.validate is not None:
        check_least(args, validate=2)
        return _validate(args, config)
    if args.out is None:
        raise ArgumentError("--out: expected the file of the table to write")
    return _write(args, config)


def _write(args: argparse.Namespace, config: TrainConfig) -> int:
    from training.lut import merged, save_table

    spaces = [_space(config, args.config, tokens) for tokens in _tokens(args.tokens, config)]
    if args.model is not None:
        table = merged([_model(args.model, space) for space in spaces])
        save_table(args.out, table)
    else:
        progress = [args.out.with_name(f".{args.out.name}.{s.shape.blocks[-1].tokens}_tokens.progress") for s in spaces]
        parts = zip(spaces, progress, strict=True)
        table = merged([_measure(args, config, space, file) for space, file in parts])
        save_table(args.out, table)
        for file in progress:
            file.unlink(missing_ok=True)
    _report(args, table)
    return 0


def _validate(args: argparse.Namespace, config: TrainConfig) -> int:
    """Compare a table with this computer; a table of another one is refused before anything is measured."""
    from dcqfa_ros.devices.detect import detect
    from training.commands import ArgumentError
    from training.lut import load_table
    from training.profile_plot import plot_report
    from training.profile_tables import checked_runtime
    from training.profile_validate import validate

    device = detect()
    file = args.table or _table_of_this_device(config, device.fingerprint, args.runtime, args.threads)
    table = load_table(file)
    runtime = checked_runtime(table, device, args.runtime, args.threads)
    tokens = _tokens(args.tokens, config)
    if args.tokens is not None and len(tokens) > 1:
        raise ArgumentError(f"--tokens {args.tokens}: expected one number with --validate")
    bench = _bench(args, config, _space(config, args.config, tokens[0]), table.name, table.threads, runtime)
    report = validate(table, bench, args.validate, args.seed, quiet=False)
    plot = args.plot or file.with_name(f"{file.stem}_validation.png")
    title = f"{table.name}: {device.name}, {runtime.name}, {table.threads} threads, {tokens[0]} tokens"
    plot_report(report, title, plot)
    _report_validation(args, file, plot, table, report)
    return 0


def _table_of_this_device(config: TrainConfig, fingerprint: str, runtime: str | None, threads: int | None) -> Path:
    from training.commands import ArgumentError
    from training.profile_tables import runtime_of, tables_measured_here

    here, others = tables_measured_here(config, fingerprint)
    for path, table in here:
        if runtime in (None, runtime_of(table)) and threads in (None, table.threads):
            return path
    names = [f"{p.stem} ({'modelled' if t.modelled else t.device.fingerprint}, {t.runtime})" for p, t in here + others]
    raise ArgumentError(
        f"--validate: no table at hand was measured on this device ({fingerprint}); there is "
        f"{', '.join(names) or 'none'}. Measure one with `dcqfa profile --out FILE`, or give --table FILE"
    )


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
    from dcqfa_ros.devices.detect import detect
    from dcqfa_ros.runtime.engines import ONNXRUNTIME
    from training.profile import measure
    from training.profile_runtime import profiled_runtime

    runtime = profiled_runtime(args.runtime or ONNXRUNTIME, detect())
    threads = 1 if args.threads is None else args.threads
    bench = _bench(args, config, space, args.name or args.out.stem, threads, runtime)
    if progress.exists():
        print(f"continuing {progress}", file=sys.stderr)
    return measure(space, bench.graphs, bench.settings, progress, quiet=False, runtime=runtime)


def _bench(
    args: argparse.Namespace, config: TrainConfig, space: SearchSpace, name: str, threads: int, runtime: Any
) -> Workbench:
    from training.commands import ArgumentError
    from training.profile_graphs import DiffusionPolicyTGraphs
    from training.profile_networks import Workbench
    from training.profile_table import ProfileSettings

    if config.policy.image is not None:
        raise ArgumentError(
            f"--config {args.config}: its policy reads images, and their encoder cannot be exported and timed; model a "
            "device with --model, or train on made-up devices alone (supernet.synthetic, no supernet.tables)"
        )
    settings = ProfileSettings(name=name, threads=threads, runs=args.runs, warm_ups=args.warm_ups, subnets=args.subnets)
    graphs = DiffusionPolicyTGraphs(config.policy, space.shape.blocks[-1].tokens)
    return Workbench(space, graphs, settings, runtime)


def _model(name: str, space: SearchSpace) -> LookUpTable:
    from training.commands import ArgumentError
    from training.device_peaks import DEVICES
    from training.modelled_tables import modelled_table

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


def _report_validation(args: argparse.Namespace, file: Path, plot: Path, table: LookUpTable, report: Report) -> None:
    facts = report.as_dict()
    for note in report.notes:
        print(f"{file}: {note}", file=sys.stderr)
    if args.json:
        networks = [
            {
                "executed": point.executed,
                "blocks": point.subnet.depth,
                "predicted": asdict(point.predicted),
                "measured": asdict(point.measured),
                "present_ms": point.present_ms,
            }
            for point in report.points
        ]
        print(
            json.dumps({"table": str(file), "plot": str(plot), "runtime": table.runtime, **facts, "subnets": networks})
        )
        return
    print(f"{file}: {table.device.name}, {table.runtime}, {table.threads} threads; {plot}")
    for label, row in (("all", facts), *facts["forms"].items()):
        print(
            f"  {label}, {row['n']} random subnets: latency off by {row['mape']:.1%} in the mean, {row['worst']:.1%} "
            f"at most (at the present speed {row['present_mape']:.1%} and {row['present_worst']:.1%}), memory by "
            f"{row['memory_mape']:.1%} in the mean, {row['memory_worst']:.1%} at most"
        )
    for form, part in facts["forms"].items():
        print(f"  {form}: the computer takes {part['speed']:.3f} times what it took for the table")
    busy = "; the computer is busy: validate again when it is idle" if facts["busy"] else ""
    print(f"  the references varied by {facts['reference_spread']:.1%} (interquartile range / median){busy}")
