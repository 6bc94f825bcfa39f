"""``dcqfa bundle show|verify|record-chunks``: look at a bundle, check it, let it say what its variants compute."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from dcqfa_ros.bundle.load import Bundle, load_bundle
from dcqfa_ros.bundle.schema import VariantSpec
from dcqfa_ros.bundle.verify import verify_bundle
from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import find_bundle


def register(subparsers: Any) -> None:
    """Add ``bundle`` and its subcommands."""
    parser = subparsers.add_parser(
        "bundle",
        help="show or check a policy bundle",
        description="Show or check a bundle: the folder that holds everything a robot needs to run a policy. "
        "record-chunks adds what its variants compute on ONNX Runtime for fixed observations: robots compare newly "
        "loaded engines with it.",
        epilog="example: dcqfa bundle verify models/pusht_keypoints --json",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, function, text in (
        ("show", _show, "print what the policy sees and does, and its variants; every file is checked first"),
        ("verify", _verify, "check every byte and every field; exit code 1 where something is wrong"),
        (
            "record-chunks",
            _record_chunks,
            "write into bundle.yaml what every variant computes for fixed observations; no other file changes",
        ),
    ):
        action = actions.add_parser(
            name, help=text, description=text, epilog=f"example: dcqfa bundle {name} models/pusht_keypoints"
        )
        action.add_argument("bundle", metavar="DIR", help="folder of a bundle, or its name in models/ or DCQFA_MODELS")
        action.add_argument("--json", action="store_true", help="print JSON")
        action.set_defaults(func=function)
    action.add_argument("--anew", action="store_true", help="also where they are recorded (after a meant edit)")
    action.add_argument("--threads", type=int, default=1, metavar="N", help="threads of the engine (default: 1)")


def _show(args: argparse.Namespace) -> int:
    bundle = load_bundle(find_bundle(args.bundle))
    if args.json:
        print(json.dumps(bundle.spec.model_dump(mode="json"), indent=2))
    else:
        print("\n".join(_describe(bundle)))
    return 0


def _verify(args: argparse.Namespace) -> int:
    folder = find_bundle(args.bundle)
    report = verify_bundle(folder)
    if args.json:
        print(json.dumps({"folder": str(folder), **dataclasses.asdict(report)}, indent=2))
        return 0 if report.ok else 1
    for issue in report.errors:
        print(f"{folder}/{issue}")
    for name in report.unlisted:
        print(f"{folder}/{name}: not part of the bundle (never read)")
    state = "ok" if report.ok else f"{len(report.errors)} error(s)"
    print(f"{folder}: {state}; {report.files} files, {report.bytes} bytes right")
    return 0 if report.ok else 1


def _record_chunks(args: argparse.Namespace) -> int:
    from dcqfa_ros.runtime.record_chunks import record_chunks  # an engine: the other actions need none

    if args.threads < 1:
        raise UserError(f"--threads: expected at least 1, got {args.threads}")
    folder = find_bundle(args.bundle)
    names = record_chunks(folder, threads=args.threads, anew=args.anew)
    if args.json:
        print(json.dumps({"folder": str(folder), "recorded": list(names)}, indent=2))
    else:
        told = f"recorded the chunks of {', '.join(names)}" if names else "every variant's chunks are recorded already"
        print(f"{folder}: {told}")
    return 0


def _describe(bundle: Bundle) -> Iterator[str]:
    spec = bundle.spec
    action = spec.action
    yield f"{spec.name} ({bundle.folder}): {spec.task}"
    yield f"  backbone      {spec.backbone}, licence {spec.license}"
    for key, observation in spec.observations.items():
        shape = "x".join(str(n) for n in observation.shape)
        yield (
            f"  observation   {key}: {observation.type} {shape} {observation.dtype}, {observation.units}, frame "
            f"{observation.frame}, {observation.history} step(s) at {observation.rate_hz:g} Hz, "
            f"at most {observation.max_age_ms:g} ms old"
        )
    units = ", ".join(dict.fromkeys(action.units))
    yield (
        f"  action        {action.space.value} ({', '.join(action.names)}), {units}, frame {action.frame}, "
        f"{action.mode}, {action.rate_hz:g} Hz"
    )
    yield f"  chunk         {action.horizon} predicted, {action.executed} executed from index {action.first_executed}"
    diffusion = spec.diffusion
    known = f", up to {diffusion.prefix} leading actions known" if diffusion.prefix else ""
    yield f"  denoising     {diffusion.sampler}, {diffusion.steps} of {diffusion.train_timesteps} steps{known}"
    training = spec.training
    yield f"  trained on    {training.data}: {training.episodes} episodes, {training.steps} steps of {training.batch}"
    for variant in spec.variants:
        yield from _describe_variant(variant, is_default=variant.name == spec.default_variant)


def _describe_variant(variant: VariantSpec, *, is_default: bool) -> Iterator[str]:
    size = variant.size
    yield f"  variant       {variant.name}{' (default)' if is_default else ''}: {variant.description}"
    yield (
        f"                {variant.precision}, {size.parameters / 1e6:.2f} M parameters, "
        f"{size.paper_bytes / 1e6:.2f} MB by bits, {size.disk_bytes / 1e6:.2f} MB on disk"
    )
    yield f"                parity rms {variant.parity.rms:.2g} (at most {variant.parity.tolerance_rms:g})"
    for quality in variant.quality:
        last = quality.first_seed + quality.seeds - 1
        yield (
            f"                {quality.metric} {quality.mean:.3f} +- {quality.ci95:.3f} "
            f"(seeds {quality.first_seed} to {last}, {quality.steps} steps)"
        )
    for latency in variant.latency:
        tail = f", p99 {latency.p99_ms:.1f} ms" if latency.p99_ms is not None else ""
        yield (
            f"                {latency.device}, {latency.runtime}, {latency.threads} thread(s): "
            f"p50 {latency.p50_ms:.1f} ms{tail} ({latency.kind})"
        )
