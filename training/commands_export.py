"""``dcqfa export``: a trained policy, or subnets of a supernet, as a bundle of ONNX variants."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcqfa_ros.bundle.schema import BundleSpec
    from training.trained import TrainedPolicy

DEFAULT_VARIANTS = "fp32,w8a8"
SEARCHED = "searched"


def export(subparsers: Any) -> None:
    """Register ``dcqfa export``."""
    parser = subparsers.add_parser(
        "export",
        help="write a trained policy as a bundle of ONNX variants",
        description="Export the averaged network of a run or checkpoint as a bundle. A policy is written as it is "
        "(fp32) and quantized after training (w8a8, calibrated on observations of the training episodes). Subnets of a "
        "supernet are added to the bundle of the policy they were trained from, each in the bits it was trained in; "
        "other variants of that bundle stay. Everything is checked against the training-side network on ONNX Runtime "
        "before the bundle is written, in one step.",
        epilog="examples: dcqfa export runs/pusht_keypoints --out models/pusht_keypoints; dcqfa export "
        "runs/pusht_keypoints --out models/pusht_keypoints --variants fp32 --store float16 --keep; dcqfa export "
        "runs/pusht_keypoints_supernet --out models/pusht_keypoints --subnet w8a8 --subnet small=smallest; "
        "dcqfa export models/pusht_keypoints --config config/training/pusht_keypoints.yaml --out smaller "
        "--variants fp32 --store float16",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN",
        help="run folder or checkpoint file, or a bundle, whose full-precision policy is exported again",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--data", help="path of the demonstrations (default: where the run read them)")
    parser.add_argument(
        "--quality",
        action="append",
        default=[],
        metavar="VARIANT=FILE",
        help="record an evaluation of these weights (output of `dcqfa eval BUNDLE --json`); may be repeated",
    )
    parser.add_argument(
        "--latency",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="record latencies measured with these weights (output of `dcqfa bench engine --json`); may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print sizes and parity as JSON")
    plain = parser.add_argument_group("of a policy (an older bundle is replaced, see --keep)")
    plain.add_argument("--variants", help=f"comma-separated, the default one first (default: {DEFAULT_VARIANTS})")
    plain.add_argument("--config", type=Path, help="training YAML of the policy, which a bundle does not hold")
    plain.add_argument("--calibration", type=int, metavar="N", help="calibration observations (default: 256)")
    plain.add_argument(
        "--store",
        choices=("float32", "float16"),
        help="type that fp32's weights are stored in (default: float32). float16 halves its files; the policy is the "
        "rounded one, and everything is computed in float32 as before",
    )
    plain.add_argument(
        "--keep",
        action="store_true",
        help="leave the other variants of the bundle in --out and its default as they are",
    )
    subnets = parser.add_argument_group("of a supernet")
    subnets.add_argument(
        "--subnet",
        action="append",
        default=[],
        metavar="[VARIANT=]NAME",
        help="a subnet, under the variant's name or its own; may be repeated",
    )
    subnets.add_argument(
        "--front",
        action="append",
        default=[],
        metavar="[VARIANT=]FILE",
        help=f"the chosen network of a search (its front.json), as variant {SEARCHED!r} if no name is given; "
        "may be repeated",
    )
    subnets.add_argument("--default", metavar="VARIANT", help="the bundle's default variant (default: the one it has)")
    parser.set_defaults(func=_export)


def _export(args: argparse.Namespace) -> int:
    from dcqfa_ros.bundle.load import BUNDLE_YAML
    from training.checkpoint import CHECKPOINT, load_checkpoint
    from training.supernet_checkpoint import is_supernet

    file = args.checkpoint / CHECKPOINT if args.checkpoint.is_dir() else args.checkpoint
    if not file.exists() and (args.checkpoint / BUNDLE_YAML).is_file():
        spec = _policy(args, _of_bundle(args))
    elif is_supernet(load_checkpoint(file)):
        spec = _subnets(args)
    else:
        spec = _policy(args, args.checkpoint)
    _report(args, spec)
    return 0


def _of_bundle(args: argparse.Namespace) -> TrainedPolicy:
    from training.commands import ArgumentError
    from training.config import load_config
    from training.full_precision import load_full_precision

    if args.config is None:
        raise ArgumentError(f"--config: {args.checkpoint} is a bundle; give the training YAML of its policy")
    return load_full_precision(args.checkpoint, load_config(args.config))[0]


def _policy(args: argparse.Namespace, source: Path | TrainedPolicy) -> BundleSpec:
    from training.commands import ArgumentError
    from training.export.bundle import ExportOptions, export_bundle
    from training.export.records import read_latency, read_quality

    if args.config is not None and source is args.checkpoint:
        raise ArgumentError(f"--config: {args.checkpoint} holds its own training configuration; leave it out")
    for option in ("subnet", "front", "default"):
        if getattr(args, option):
            raise ArgumentError(f"--{option}: {args.checkpoint} holds a single policy, no supernet; leave it out")
    options = ExportOptions(
        variants=tuple(name.strip() for name in (args.variants or DEFAULT_VARIANTS).split(",")),
        calibration=256 if args.calibration is None else args.calibration,
        data=args.data,
        quality=read_quality(args.quality),
        latency=read_latency(args.latency),
        store=args.store or "float32",
        keep=args.keep,
    )
    return export_bundle(source, args.out, options)


def _subnets(args: argparse.Namespace) -> BundleSpec:
    from training.commands import ArgumentError
    from training.export.fronts import chosen_of
    from training.export.records import read_latency, read_quality
    from training.export.subnets import SubnetOptions, export_subnets

    for option in ("variants", "calibration", "store", "keep", "config"):
        if getattr(args, option) not in (None, False):
            raise ArgumentError(
                f"--{option}: {args.checkpoint} holds a supernet, whose subnets (--subnet) are added to what --out "
                "holds; leave it out"
            )
    named = [_named(text, None) for text in args.subnet]
    searched = {}
    for name, file in (_named(text, SEARCHED) for text in args.front):
        subnet, searched[name] = chosen_of(Path(file), args.checkpoint)
        named.append((name, subnet))
    subnets = dict(named)
    if len(subnets) != len(named):
        raise ArgumentError(f"--subnet, --front: a variant is named twice ({', '.join(name for name, _ in named)})")
    options = SubnetOptions(
        subnets=subnets,
        searched=searched,
        default=args.default,
        data=args.data,
        quality=read_quality(args.quality),
        latency=read_latency(args.latency),
    )
    return export_subnets(args.checkpoint, args.out, options)


def _named(text: str, default: str | None) -> tuple[str, str]:
    """``VARIANT=REST`` in two; the variant's name defaults to ``default``, or to the rest itself."""
    name, separator, rest = text.partition("=")
    return (name, rest) if separator else (default or text, text)


def _report(args: argparse.Namespace, spec: BundleSpec) -> None:
    rows: list[dict[str, Any]] = [
        {
            "variant": variant.name,
            "subnet": variant.subnet,
            "disk_bytes": variant.size.disk_bytes,
            "paper_bytes": variant.size.paper_bytes,
            "parity_max_abs": variant.parity.max_abs,
            "parity_rms": variant.parity.rms,
            "export_rms": variant.parity.export_rms,
            "block_rms": variant.parity.block_rms,
        }
        for variant in spec.variants
    ]
    if args.json:
        print(json.dumps({"bundle": str(args.out), "default_variant": spec.default_variant, "variants": rows}))
        return
    print(f"{args.out}: {spec.name}, {len(rows)} variants, {spec.default_variant} by default")
    for row in rows:
        block = "" if row["block_rms"] is None else f", worst block {row['block_rms']:.2g}"
        print(
            f"  {row['variant']}: {row['disk_bytes'] / 1e6:.1f} MB on disk, {row['paper_bytes'] / 1e6:.1f} MB by bits, "
            f"parity max {row['parity_max_abs']:.2g}, rms {row['parity_rms']:.2g}, export rms {row['export_rms']:.2g}"
            f"{block}"
        )
