"""What training adds to ``dcqfa bench``: ``train`` and ``rollouts``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.bench_train import TrainReport
    from training.rollouts_bench import RolloutReport

DEFAULT_SUPERNET = "models/pusht_keypoints_supernet"
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


def rollouts(actions: Any) -> None:
    """Register ``dcqfa bench rollouts``."""
    parser = actions.add_parser(
        "rollouts",
        help="closed-loop collection of states in parallel beside worlds stepped one by one",
        description="Collect the same Push-T states in three ways that take turns: one world after the other with one "
        "policy call each, all worlds with one batched call per chunk, and batched groups in one process per core, as "
        "on-policy distillation does; same cores, seeds and network. Keep the computer idle meanwhile.",
        epilog="example: dcqfa bench rollouts --worlds 64 --json",
    )
    parser.add_argument(
        "--run",
        type=Path,
        default=Path(DEFAULT_SUPERNET),
        metavar="RUN",
        help="run folder or checkpoint of a supernet (default: %(default)s)",
    )
    parser.add_argument("--variant", default="w4a4", help="its subnet that drives the worlds (default: %(default)s)")
    parser.add_argument("--worlds", type=int, default=64, metavar="N", help="environments (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=2, metavar="N", help="policy calls of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--denoising-steps", type=int, default=8, metavar="N", help="of a policy call (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--seed", type=int, default=400_000, metavar="S", help="first start seed (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_rollouts)


def _rollouts(args: argparse.Namespace) -> int:
    from dcqfa_ros.devices.detect import detect
    from training.rollouts_bench import Options, bench_rollouts

    options = Options(args.worlds, args.calls, args.rounds, args.denoising_steps, args.workers, args.seed)
    report = bench_rollouts(args.run, args.variant, options)
    processor = detect().processor.model
    if args.json:
        print(json.dumps({"processor": processor, **dataclasses.asdict(report)}, indent=2))
    else:
        print("\n".join(_describe_rollouts(processor, report)))
    return 0


def _describe_rollouts(processor: str, report: RolloutReport) -> Iterator[str]:
    yield (
        f"{report.policy} {report.subnet} on {report.device} ({processor}), {report.cores} cores, "
        f"{report.worlds} worlds, {report.calls} calls of {report.denoising_steps} denoising steps, "
        f"load {report.conditions.load_1min:.1f}"
    )
    for way in (report.one_by_one, report.batched, report.parallel):
        yield (
            f"{way.label.replace('_', ' '):<12}{way.states_per_second:9.1f} states/s   {way.processes} processes of "
            f"{way.threads} threads, batch {way.batch}"
        )
    yield f"parallel is {report.ratio:.1f} times as fast as one by one, batched alone {report.ratio_batched:.1f} times"
