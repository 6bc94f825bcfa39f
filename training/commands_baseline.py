"""``dcqfa baseline``: quantize a trained policy by another method, and say how far it is from the original."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

DEFAULT_CHECKPOINT = Path("models/pusht_keypoints")
DEFAULT_CONFIG = "training/pusht_keypoints.yaml"
DEFAULT_FOLDER = Path("runs/baselines")


def baseline(subparsers: Any) -> None:
    """Register ``dcqfa baseline``."""
    from training.baselines import BASELINES

    parser = subparsers.add_parser(
        "baseline",
        help="quantize a trained policy by another method",
        description="Quantize a full-precision policy by a published method, with the calibration and the excluded "
        "layers that all methods share. Prints size by both conventions, output error layer by layer, the distance of "
        "the denoiser to the full-precision one on held-out data and what a device would execute, and stores a "
        "checkpoint that 'dcqfa eval' runs. Methods that train need --trained: a run of 'dcqfa train' of their own "
        "configuration (docs/baselines.md).",
        epilog="example: dcqfa baseline smoothquant --checkpoint models/pusht_keypoints --bits w8a8 "
        "--data pusht_human_demos_lowdim.npz --json",
    )
    parser.add_argument("method", metavar="METHOD", help=", ".join(BASELINES))
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=DEFAULT_CHECKPOINT,
        metavar="RUN",
        help=f"run folder, checkpoint or bundle of the full-precision policy (default: {DEFAULT_CHECKPOINT})",
    )
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        metavar="YAML",
        help="training configuration of a bundle's policy; runs hold their own (default: %(default)s)",
    )
    parser.add_argument("--bits", default="w8a8", help="w8a8, w4a4, w4a16 (weights alone), fp8 (default: w8a8)")
    parser.add_argument("--data", help="path of the demonstrations (default: data.path of the configuration)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {DEFAULT_FOLDER}/NAME.METHOD.BITS")
    parser.add_argument("--trained", type=Path, metavar="RUN", help="run of a method that trains (sqil, batchquant)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the method, such as alpha=0.7 (smoothquant), clip=false (awq), block=64 (hadamard); may be "
        "repeated",
    )
    parser.add_argument("--observations", type=int, metavar="N", help="calibration observations (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of what a method draws (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument(
        "--cross-check",
        action="store_true",
        help="compare the distance with that of nvidia-modelopt's network (rtn and smoothquant at w8a8; it has to be "
        "installed, docs/baselines.md)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a quantized policy that FOLDER holds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_baseline)


def _baseline(args: argparse.Namespace) -> int:
    import torch

    from dcqfa_ros.paths import find_config
    from training.baselines import find_baseline, parse_bits
    from training.baselines.artifact import save_artifact
    from training.baselines.calibration import OBSERVATIONS, calibrate, calibration_data
    from training.baselines.modelopt import check_possible, cross_check
    from training.baselines.quality import held_out, quality
    from training.commands import ArgumentError, check_least
    from training.config import load_config
    from training.full_precision import load_full_precision

    check_least(args, observations=1, seed=0, threads=1)
    method, bits = find_baseline(args.method), parse_bits(args.bits)
    options = _options(args.option)
    if method.trains:
        if args.trained is None:
            raise ArgumentError(f"--trained: {method.name} trains; give a run of its own (docs/baselines.md)")
        options["trained"] = args.trained
    elif args.trained is not None:
        raise ArgumentError(f"--trained {args.trained}: {method.name} does not train; leave it out")
    if args.cross_check:
        check_possible(method.name, bits, options)
    policy, _ = load_full_precision(args.checkpoint, load_config(find_config(args.config)))
    folder = args.out or DEFAULT_FOLDER / f"{policy.config.name}.{method.name}.{bits}"
    _check_free(folder, args.overwrite)
    torch.set_num_threads(args.threads)
    data = calibration_data(policy, args.data)
    measure = held_out(policy, data)
    started = time.monotonic()
    calibration = calibrate(policy, data, args.observations or OBSERVATIONS)
    seconds = time.monotonic() - started
    quantized = method.quantize(policy, bits, calibration, seed=args.seed, **options)
    quantized.report.update(quality(measure, quantized.network, aligned=not method.trains))
    quantized.report.update(
        calibration_seconds=round(seconds, 2), threads=args.threads, seed=args.seed, checkpoint=str(policy.path)
    )
    if args.cross_check:
        static = bool(options.get("static", False))
        quantized.report["cross_check"] = cross_check(
            policy.network, quantized.network, method.name, bits, calibration, measure, static
        )
    path = save_artifact(folder, policy, quantized)
    facts = {**quantized.report, "artifact": str(path), "artifact_mib": path.stat().st_size / 2**20}
    print(json.dumps(facts) if args.json else _text(facts))
    return 0


def _options(given: list[str]) -> dict[str, Any]:
    """Options of a method: numbers, true and false are read as such, anything else is text.

    Raises:
        ArgumentError: one is not NAME=VALUE, or is given twice.
    """
    from training.commands import ArgumentError

    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier() and value):
            raise ArgumentError(f"--option {text}: expected NAME=VALUE, such as alpha=0.7")
        if name in options or name in ("seed", "trained"):
            raise ArgumentError(f"--option {name}: given twice, or an option of its own (--seed, --trained)")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        options[name] = parsed if isinstance(parsed, bool | int | float | str) else value
    return options


def _check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something else.

    Raises:
        ArgumentError: it holds a checkpoint that is not to be replaced.
    """
    from training.checkpoint import BASELINE, CHECKPOINT, load_checkpoint
    from training.commands import ArgumentError

    file = folder / CHECKPOINT
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"--out {folder}: is a file, expected a folder")
    if not file.exists():
        return
    if BASELINE not in load_checkpoint(file):
        raise ArgumentError(f"--out {folder}: holds the checkpoint of a training run; give another folder")
    if not overwrite:
        raise ArgumentError(f"--out {folder}: holds a quantized policy already; give --overwrite or another folder")


def _text(facts: dict[str, Any]) -> str:
    worst = sorted((facts["layer_error"] or {}).items(), key=lambda item: -item[1])[:3]
    rows = {
        "distance": f"{facts['distance']:.3e} mean squared difference of the predicted noise, held out "
        f"({facts['distance_samples']} samples; the noise itself has {facts['teacher_power']:.2f})",
        "size": f"{facts['size_paper_mib']:.2f} MiB by the paper's convention, {facts['size_packed_mib']:.2f} MiB "
        f"packed with scales, {facts['artifact_mib']:.2f} MiB on disk",
        "weights": f"{facts['mean_weight_bits']:.2f} bits on average; in floating point: "
        f"{', '.join(facts['excluded'])}",
        "calibration": f"{facts['calibration_observations']} observations, {facts['calibration_steps']} denoising "
        f"steps; {facts['seconds']} s after {facts['calibration_seconds']} s for the chunks",
        "executes as": facts["executes_as"],
        "worst layers": ", ".join(f"{name} {error:.1e}" for name, error in worst) or "not comparable: trained on",
    }
    check = facts.get("cross_check")
    if check is not None:
        agrees = "within" if check["within_noise"] else "outside"
        rows["cross-check"] = (
            f"{check['library']}, {check['activations']}: {check['library_distance']:.3e}; difference "
            f"{check['difference']:+.1e} +- {check['ci95']:.1e}, {agrees} noise; {check['between']:.1e} between both"
        )
    head = f"{facts['label']} {facts['bits']} of {facts['checkpoint']}: {facts['artifact']}"
    return "\n".join([head, *(f"  {name:<12} {text}" for name, text in rows.items())])
