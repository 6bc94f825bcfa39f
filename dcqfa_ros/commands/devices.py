"""``dcqfa devices``: what this computer is, which precisions it executes, and which variant of a bundle suits it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcqfa_ros.bundle.load import Bundle, load_bundle
from dcqfa_ros.devices.capabilities import Runtime, runtimes
from dcqfa_ros.devices.detect import Device, detect
from dcqfa_ros.devices.records import load_records
from dcqfa_ros.devices.select import Choice, budget_for, choose
from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import find_bundle

_GIB = 2**30


class DevicesError(UserError, ValueError):
    """The root folder of a recorded device is not there."""


def register(subparsers: Any) -> None:
    """Add ``devices``."""
    parser = subparsers.add_parser(
        "devices",
        help="describe this computer and choose a variant for it",
        description="Describe this computer: device, memory, precisions it executes. With --bundle, rank the variants "
        "against the budgets and say why; 'dcqfa bench engine --save' measures the latencies it then uses.",
        epilog="example: dcqfa devices --bundle pusht_keypoints",
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON")
    add("--bundle", metavar="NAME", help="rank the variants of this bundle (a name in models/ or a folder)")
    add("--steps", type=int, default=0, metavar="N", help="denoising steps (default: the bundle's)")
    add("--threads", type=int, default=1, metavar="N", help="threads of the engine (default %(default)s)")
    add("--control-rate", type=float, default=0.0, metavar="HZ", help="actions per second (default: the bundle's)")
    add(
        "--latency-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="latency budget (default: one control period)",
    )
    add("--memory-mb", type=float, default=0.0, metavar="MIB", help="memory budget (default: half of the free memory)")
    add("--root", type=Path, default=Path("/"), metavar="DIR", help="read a recorded device instead of this one")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    if not args.root.is_dir():
        raise DevicesError(f"--root {args.root}: no such folder")
    device = detect(args.root)
    found = runtimes(device)
    choice = None
    if args.bundle:
        choice = _choose(args, load_bundle(find_bundle(args.bundle), verify=False), device)
    if args.json:
        print(json.dumps(_document(device, found, choice), indent=2))
    else:
        print("\n".join([*_describe(device, found), *(() if choice is None else _explain(choice))]))
    return 0 if choice is None or choice.variant else 1


def _choose(args: argparse.Namespace, bundle: Bundle, device: Device) -> Choice:
    budget = budget_for(bundle.spec, device, args.control_rate, args.latency_ms, args.memory_mb)
    return choose(bundle.spec, device, budget, load_records(), steps=args.steps, threads=args.threads)


def _document(device: Device, found: tuple[Runtime, ...], choice: Choice | None) -> dict[str, Any]:
    document: dict[str, Any] = {"device": dataclasses.asdict(device)}
    document["runtimes"] = [
        {
            "name": r.name,
            "version": r.version,
            "runs_on": r.runs_on,
            "unavailable": r.unavailable,
            "precisions": r.precisions(),
        }
        for r in found
    ]
    document["choice"] = None if choice is None else choice.as_dict()
    return document


def _describe(device: Device, found: tuple[Runtime, ...]) -> Iterator[str]:
    yield f"{device.name} ({device.kind})"
    yield f"  fingerprint   {device.fingerprint}"
    yield (
        f"  processor     {device.processor.model}, {device.processor.architecture}, {device.processor.cores} cores, "
        f"8-bit dot product: {', '.join(device.processor.features) or 'none'}"
    )
    if device.gpu is not None:
        major, minor = device.gpu.compute_capability
        memory = device.gpu.memory_bytes
        shared = "shares the system's memory" if memory is None else f"{memory / _GIB:.1f} GiB"
        yield f"  GPU           {device.gpu.name}, compute capability {major}.{minor}, {shared}"
    if device.l4t is not None:
        yield f"  Jetson Linux  {device.l4t}"
    yield f"  memory        {device.memory_bytes / _GIB:.1f} GiB, {device.memory_available_bytes / _GIB:.1f} GiB free"
    for runtime in found:
        answers = runtime.precisions()
        state = runtime.unavailable or "ready"
        yield f"  {runtime.name:<13} {runtime.version or 'not installed'}, on the {runtime.runs_on}: {state}"
        yield f"    executes    {', '.join(name for name, answer in answers.items() if answer == 'yes')}"
        yield from (f"    refuses     {answer}" for answer in answers.values() if answer != "yes")
    yield from (f"  note          {note}" for note in device.notes)


def _explain(choice: Choice) -> Iterator[str]:
    budget = choice.budget
    memory = "unknown" if budget.memory_bytes is None else f"{budget.memory_bytes >> 20} MiB"
    yield f"choice: {choice.variant or 'none'}"
    yield f"  why           {choice.reason}"
    yield (
        f"  budget        {budget.latency_ms:.1f} ms per chunk ({budget.latency_reason}), {memory} "
        f"({budget.memory_reason}); {choice.steps} steps, {choice.threads} thread(s)"
    )
    for candidate in choice.ranking:
        yield f"  {candidate.variant:<13} {'' if candidate.accepted else 'rejected: '}{candidate.reason}"
