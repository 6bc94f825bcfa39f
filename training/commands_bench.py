"""What training adds to ``dcqfa bench``: ``train``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.bench_train import TrainReport

DEFAULT_CONFIG = "training/pusht_keypoints_supernet.yaml"


def train(actions: Any) -> None:
    """Register ``dcqfa bench train``."""
    parser = actions.add_parser(
        "train",
        help="training steps of a supernet beside those of the plain policy",
        description="Time optimizer steps on random data: of the plain full-precision policy, of the supernet's "
        "largest network at W4A4, and of the set {largest FP32, largest W4A4, smallest, one sampled}, all at the same "
        "batch and compiled; the forward pass of the smallest network beside the largest; and the switch between "
        "configurations. All take turns in one run; ratios are medians of the ratios within a round. Keep the computer "
        "idle meanwhile.",
        epilog="example: dcqfa bench train --threads 1 --json",
    )
    parser.add_argument(
        "--config", default=DEFAULT_CONFIG, metavar="YAML", help="training YAML of a supernet (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="of every network (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: run.threads of the YAML)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="in place of run.device")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_train)


def _train(args: argparse.Namespace) -> int:
    from dcqfa_ros.devices.detect import detect
    from dcqfa_ros.paths import find_config
    from training.bench_train import Options, bench_train
    from training.config import load_config, override

    config = override(load_config(find_config(args.config)), run={"device": args.device})
    threads = config.run.threads if args.threads is None else args.threads
    options = Options(args.batch, threads, args.rounds, not args.no_compile)
    report = bench_train(config, options, lambda text: print(text, file=sys.stderr))
    processor = detect().processor.model
    if args.json:
        print(json.dumps({"processor": processor, **dataclasses.asdict(report)}, indent=2))
    else:
        print("\n".join(_describe(processor, report)))
    return 0


def _describe(processor: str, report: TrainReport) -> Iterator[str]:
    how = f"{report.precision}, {'compiled' if report.compile else 'not compiled'}"
    yield (
        f"{report.config} on {report.device} ({processor}), batch {report.batch}, {report.threads} threads, {how}, "
        f"load {report.conditions.load_1min:.1f}"
    )
    yield f"plain step            {report.plain_step_ms:9.1f} ms"
    yield f"W4A4 step             {report.w4a4_step_ms:9.1f} ms   {report.w4a4_step_ratio:.2f} of a plain step"
    with_teacher = f"{report.set_with_teacher_ratio:.2f} with the teacher's pass"
    yield f"set of four           {report.set_ms:9.1f} ms   {report.set_ratio:.2f} of a plain step, {with_teacher}"
    for part in report.parts:
        yield f"  {part.label:<20}{part.ms:9.1f} ms" + (f"   {part.subnet}" if part.subnet else "")
    yield (
        f"smallest forward pass {100 * report.smallest_forward_ratio:.1f} % of the largest at W4A4, "
        f"{100 * report.smallest_forward_fp32_ratio:.1f} % at FP32, batch {report.forward_batch} in float32 "
        f"({100 * report.smallest_forward_training_ratio:.1f} % at W4A4 in {report.precision})"
    )
    yield f"switch                {report.switch_us:9.1f} us   {report.switch_parameter_bytes} bytes of new tensors"
