"""``dcqfa devices``: what this computer is, what it executes, which variant of each bundle suits it and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dcqfa_ros.bundle.errors import BundleError
from dcqfa_ros.bundle.load import BUNDLE_YAML, load_bundle
from dcqfa_ros.commands import device_health
from dcqfa_ros.devices.capabilities import Runtime, runtimes
from dcqfa_ros.devices.detect import Device, detect
from dcqfa_ros.devices.health import Health
from dcqfa_ros.devices.ladder import LOAD_MARGIN, Ladder, build_ladder
from dcqfa_ros.devices.quality import MARGIN
from dcqfa_ros.devices.records import load_records
from dcqfa_ros.devices.select import Choice, budget_for, choose
from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import MODELS_VARIABLE, find_bundle, share_directory
from dcqfa_ros.runtime.engines import AUTO, runtime_facts

_GIB = 2**30
_RECORDED = "a recorded device: which runtimes are installed, and latencies measured here, are those of this computer"


class DevicesError(UserError, ValueError):
    """The root folder of a recorded device is not there."""


@dataclasses.dataclass(frozen=True, slots=True)
class BundleChoice:
    """The choice for one bundle, or why it cannot be read."""

    bundle: str
    folder: str
    choice: Choice | None
    error: str | None
    ladder: Ladder | None = None

    @property
    def is_runnable(self) -> bool:
        """Whether some variant fits."""
        return self.choice is not None and self.choice.variant is not None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        choice = None if self.choice is None else self.choice.as_dict()
        ladder = None if self.ladder is None else self.ladder.as_dict()
        return {
            "bundle": self.bundle,
            "folder": self.folder,
            "choice": choice,
            "ladder": ladder,
            "error": self.error,
        }


def register(subparsers: Any) -> None:
    """Add ``devices``."""
    parser = subparsers.add_parser(
        "devices",
        help="describe this computer and choose a variant and a runtime for it",
        description="Describe this computer: device, memory, health, runtimes, precisions they execute. For each "
        "bundle, or the one named, rank variants and runtimes against the budgets and say why, and what the selector "
        "may go to under load; 'dcqfa bench engine --save' measures the latencies it then uses.",
        epilog="examples: dcqfa devices --bundle pusht_keypoints --steps-allowed 8,4; dcqfa devices --watch 60",
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON")
    add("--bundle", metavar="NAME", help="this bundle only: a name in models/ or a folder (default: all in models/)")
    add("--runtime", default=AUTO, metavar="NAME", help="consider this runtime only (default: all)")
    add("--steps", type=int, default=0, metavar="N", help="denoising steps (default: the bundle's)")
    add("--threads", type=int, default=1, metavar="N", help="threads of the engine (default %(default)s)")
    add("--control-rate", type=float, default=0.0, metavar="HZ", help="actions per second (default: the bundle's)")
    add(
        "--latency-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="latency budget (default: the time the executed actions of a chunk take)",
    )
    add("--memory-mb", type=float, default=0.0, metavar="MIB", help="memory budget (default: half of the free memory)")
    add(
        "--quality-margin",
        type=float,
        default=MARGIN,
        metavar="SCORE",
        help="by how much a recorded score may be lower than the bundle's best (default %(default)s)",
    )
    add("--watch", type=_seconds, default=0.0, metavar="S", help="show the health every second, this long, only")
    add(
        "--steps-allowed",
        type=_numbers,
        default=(),
        metavar="N,N",
        help="denoising steps that may be used under load, beside --steps",
    )
    add("--steps-unrecorded", action="store_true", help="also steps with which no score is recorded")
    add(
        "--load-margin",
        type=float,
        default=LOAD_MARGIN,
        metavar="SCORE",
        help="by how much a score may be lower than the bundle's best under load (default %(default)s)",
    )
    add("--root", type=Path, default=Path("/"), metavar="DIR", help="read a recorded device instead of this one")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    if not args.root.is_dir():
        raise DevicesError(f"--root {args.root}: no such folder")
    if args.runtime != AUTO:
        runtime_facts(args.runtime)
    device = detect(args.root)
    if args.root.resolve() != Path("/"):
        device = dataclasses.replace(device, notes=(*device.notes, _RECORDED))
    if args.watch:
        return device_health.watch(args.root, args.watch, device, args.json)
    found = runtimes(device)
    health = device_health.look(args.root)
    folders = [find_bundle(args.bundle)] if args.bundle else list(_bundles())
    choices = [_choose(args, folder, device, found) for folder in folders]
    if args.json:
        print(json.dumps(_document(device, health, found, choices, bool(args.bundle)), indent=2))
    else:
        lines = [*_describe(device, health, found), *(line for choice in choices for line in _explain(choice))]
        print("\n".join(lines))
    if args.bundle:
        return 0 if all(choice.is_runnable for choice in choices) else 1
    return 1 if any(choice.error for choice in choices) else 0


def _bundles() -> Iterator[Path]:
    """Yield the folders of all bundles in the models folders, by name; of equal names the one that is found first."""
    folders = [Path(entry).expanduser() for entry in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if entry]
    found: dict[str, Path] = {}
    for folder in [*folders, share_directory() / "models"]:
        for file in folder.glob(f"[!.]*/{BUNDLE_YAML}"):
            found.setdefault(file.parent.name, file.parent)
    return (found[name] for name in sorted(found))


def _choose(args: argparse.Namespace, folder: Path, device: Device, found: Sequence[Runtime]) -> BundleChoice:
    try:
        spec = load_bundle(folder, verify=False).spec
    except BundleError as error:
        if args.bundle:
            raise
        return BundleChoice(folder.name, str(folder), None, str(error))
    budget = budget_for(spec, device, args.control_rate, args.latency_ms, args.memory_mb)
    local = load_records()
    common: dict[str, Any] = {"runtime": args.runtime, "quality_margin": args.quality_margin, "available": found}
    choice = choose(spec, device, budget, local, steps=args.steps, threads=args.threads, **common)
    ladder = build_ladder(
        spec,
        device,
        budget,
        local,
        choice=choice,
        steps_allowed=args.steps_allowed,
        allow_unrecorded=args.steps_unrecorded,
        load_margin=args.load_margin,
        **common,
    )
    return BundleChoice(spec.name, str(folder), choice, None, ladder)


def _seconds(text: str) -> float:
    value = float(text)
    if not 1.0 <= value <= 86_400.0:
        raise argparse.ArgumentTypeError(f"expected 1 to 86400 seconds, got {text}")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace(",", " ").split())


def _document(
    device: Device, health: Health, found: Sequence[Runtime], choices: Sequence[BundleChoice], one: bool
) -> dict[str, Any]:
    """``choice`` is that of the bundle named by ``--bundle``; ``bundles`` holds all that were looked at."""
    bundles = [choice.as_dict() for choice in choices]
    return {
        "device": dataclasses.asdict(device),
        "health": health.as_dict(),
        "runtimes": [runtime.as_dict() for runtime in found],
        "choice": bundles[0]["choice"] if one else None,
        "bundles": bundles,
    }


def _describe(device: Device, health: Health, found: Sequence[Runtime]) -> Iterator[str]:
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
    yield from device_health.describe(health)
    for runtime in found:
        yield from _describe_runtime(runtime, device)
    yield from (f"  note          {note}" for note in device.notes)


def _describe_runtime(runtime: Runtime, device: Device) -> Iterator[str]:
    state = runtime.unavailable or "ready"
    yield f"  {runtime.name:<13} {runtime.version or 'not installed'}, on the {runtime.runs_on}: {state}"
    if runtime.caveat:
        yield f"    caution     {runtime.caveat}"
    if runtime.runs_on == "gpu" and device.gpu is None:
        return
    answers = runtime.precisions()
    yield f"    executes    {', '.join(name for name, answer in answers.items() if answer == 'yes') or 'nothing'}"
    yield from (f"    {name:<11} {answer}" for name, answer in answers.items() if answer.startswith("as "))
    refused = [answer for name, answer in answers.items() if name not in runtime.executed_precisions()]
    yield from (f"    refuses     {answer}" for answer in refused)


def _explain(found: BundleChoice) -> Iterator[str]:
    yield f"bundle {found.bundle}"
    choice = found.choice
    if choice is None:
        yield f"  error         {found.error}"
        return
    budget = choice.budget
    memory = "unknown" if budget.memory_bytes is None else f"{budget.memory_bytes >> 20} MiB"
    gpu = "" if budget.gpu_memory_bytes is None else f", {budget.gpu_memory_bytes >> 20} MiB on the GPU"
    yield f"  choice: {choice.variant} on {choice.runtime} ({choice.basis})" if choice.variant else "  choice: none"
    yield f"  why           {choice.reason}"
    yield (
        f"  budget        {budget.latency_ms:.1f} ms per chunk ({budget.latency_reason}), {memory} "
        f"({budget.memory_reason}){gpu}; {choice.steps} steps, {choice.threads} thread(s); a score may be lower by "
        f"{choice.quality_margin:g}"
    )
    for candidate in choice.ranking:
        state = "" if candidate.accepted else "rejected: "
        yield f"  {candidate.variant + ' on ' + candidate.runtime:<24} {state}{candidate.reason}"
    yield from (f"  {'all on ' + name:<24} rejected: {why}" for name, why in choice.left_out.items())
    for rung in found.ladder.rungs[1:] if found.ladder else ():
        cost = f"{rung.cost:.1f} ms" if found.ladder and found.ladder.in_ms else f"modelled {rung.cost:.1f}"
        score = "no recorded score" if rung.score is None else f"score {rung.score:.3f}"
        yield f"  under load    {rung.label}: {cost}, about {rung.memory_bytes >> 20} MiB, {score}"
