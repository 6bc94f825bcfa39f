"""``dcqfa bench engine|image``: how fast this computer is at what the robot needs.

Other distributions add benchmarks through the entry point group ``dcqfa.bench_commands``: name ->
``register(actions)``, which adds a parser of that name as a command does.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from dcqfa_ros.bundle.load import Bundle, load_bundle
from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.runtime.engines import ONNXRUNTIME

if TYPE_CHECKING:
    from dcqfa_ros.bench.engine import EngineReport
    from dcqfa_ros.devices.detect import Device

DEFAULT_BUNDLE = "pusht_keypoints"
ENTRY_POINT_GROUP = "dcqfa.bench_commands"
TRAINING = ("rollouts", "train")  # what the training package registers
NO_TRAINING = (
    "needs the training package: from the source tree, pip install -e . and pip install -r requirements/train.txt"
)


class MissingBenchmarkError(UserError):
    """A benchmark whose package is not installed; the message says what to install."""


def register(subparsers: Any) -> None:
    """Add ``bench`` and its subcommands."""
    parser = subparsers.add_parser(
        "bench",
        help="measure engines, image transport and training on this computer",
        description="Measure engines, image transport and, where the training package is installed, training.",
        epilog="example: dcqfa bench engine --json",
    )
    actions = parser.add_subparsers(metavar="WHAT", required=True)
    engine = actions.add_parser(
        "engine",
        help="latency of one action chunk per variant, and beside PyTorch where that is installed",
        description=(
            "Time whole action chunks (observation encoder and all denoising steps, batch 1) of each variant, and of "
            "PyTorch eager with diffusers where those are installed. All are measured in turn in one run; ratios are "
            "of medians."
        ),
        epilog="example: dcqfa bench engine --bundle pusht_keypoints --steps 16 --threads 1 --json",
    )
    engine.add_argument("--bundle", default=DEFAULT_BUNDLE, metavar="DIR", help="folder or name (default: %(default)s)")
    engine.add_argument("--variants", default="", metavar="A,B", help="variants to measure (default: all)")
    engine.add_argument(
        "--runtimes",
        default="",
        metavar="A,B",
        help="runtimes to measure, the first of which the ratios are about (default: those installed that this device "
        "can run, onnxruntime first)",
    )
    engine.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the bundle's)")
    engine.add_argument("--threads", type=int, default=1, metavar="N", help="threads per engine (default: %(default)s)")
    engine.add_argument("--rounds", type=int, default=60, metavar="N", help="chunks per engine (default: %(default)s)")
    engine.add_argument(
        "--small-pages", action="store_true", help="leave weights in small pages, to see what huge ones gain"
    )
    engine.add_argument("--save", action="store_true", help="keep the latencies for the selector, in the user's cache")
    engine.add_argument("--json", action="store_true", help="print JSON")
    engine.set_defaults(func=_engine)
    importlib.import_module("dcqfa_ros.commands.bench_image").register(actions)
    importlib.import_module("dcqfa_ros.commands.bench_camera").register(actions)
    importlib.import_module("dcqfa_ros.commands.bench_arm").register(actions)
    importlib.import_module("dcqfa_ros.commands.bench_stop").register(actions)
    importlib.import_module("dcqfa_ros.commands.bench_executor").register(actions)
    importlib.import_module("dcqfa_ros.commands.bench_loop").register(actions)
    importlib.import_module("dcqfa_ros.commands.bench_swap").register(actions)
    importlib.import_module("dcqfa_ros.commands.bench_chunking").register(actions)
    _register_others(actions)


def _register_others(actions: Any) -> None:
    """Add what other distributions registered; those of training say if it is missing."""
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    for name in sorted({*found, *TRAINING}):
        if name in found:
            found[name].load()(actions)
            continue
        parser = actions.add_parser(
            name,
            help=f"(not available: {NO_TRAINING})",
            epilog=f"example: dcqfa bench {name}",
            prefix_chars="+",  # whatever options follow, the error is the one below
            add_help=False,
        )
        parser.add_argument("anything", nargs="*")
        parser.set_defaults(func=_no_training, benchmark=name)


def _no_training(args: argparse.Namespace) -> int:
    raise MissingBenchmarkError(f"dcqfa bench {args.benchmark} {NO_TRAINING}")


def _engine(args: argparse.Namespace) -> int:
    from dcqfa_ros.bench.engine import compare_engines
    from dcqfa_ros.devices.detect import detect
    from dcqfa_ros.devices.records import bench_records, save_records

    bundle = load_bundle(find_bundle(args.bundle), verify=False)
    device = detect()
    variants = [name for name in args.variants.split(",") if name]
    runtimes = [name for name in args.runtimes.split(",") if name] or _at_hand(device)
    report = compare_engines(
        bundle,
        variants=variants,
        runtimes=runtimes,
        steps=args.steps,
        threads=args.threads,
        rounds=args.rounds,
        huge_pages=not args.small_pages,
    )
    facts = {
        "bundle": bundle.spec.name,
        "device": device.name,
        "fingerprint": device.fingerprint,
        **dataclasses.asdict(report),
    }
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(_describe(bundle, device, report)))
    if args.save:
        save_records(bench_records(facts))
    return 0


def _at_hand(device: Device) -> list[str]:
    """Names of the runtimes that are installed and that this device can run, ONNX Runtime first."""
    from dcqfa_ros.devices.capabilities import runtimes

    found = [runtime.name for runtime in runtimes(device) if runtime.unavailable is None]
    return sorted(found, key=lambda name: name != ONNXRUNTIME)


def _describe(bundle: Bundle, device: Device, report: EngineReport) -> Iterator[str]:
    yield f"{bundle.spec.name} on {device.name}, batch {report.batch}, load {report.conditions.load_1min:.1f}"
    yield f"{'engine':<14}{'variant':<12}{'threads':>8}{'steps':>7}{'p50 ms':>10}{'p99 ms':>10}"
    for row in report.rows:
        yield (f"{row.engine:<14}{row.variant:<12}{row.threads:>8}{row.steps:>7}{row.p50_ms:>10.2f}{row.p99_ms:>10.2f}")
    yield f"{'variant':<12}{'on disk MB':>12}{'FP16 / it':>11}{'paper MB':>10}{'FP16 / it':>11}"
    for size in report.sizes:
        disk, paper = (f"{x:.2f}" if x is not None else "-" for x in (size.fp16_over_disk, size.fp16_over_paper))
        yield (f"{size.variant:<12}{size.disk_bytes / 1e6:>12.2f}{disk:>11}{size.paper_bytes / 1e6:>10.2f}{paper:>11}")
    if any(layer.searched.weight == 4 for variant in bundle.spec.variants for layer in variant.layers):
        yield "on a processor 4-bit weights and activations execute in 8-bit containers: smaller files, no more speed"
    for name, ratio in report.ratios.items():
        if ratio is not None:
            yield f"{name}: {ratio:.2f} times faster"
    yield from report.notes
