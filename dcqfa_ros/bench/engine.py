"""Latency of whole action chunks: engines measured in turn, so that drift and other load hit all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol

import numpy as np

from dcqfa_ros.bench.conditions import Conditions, no_garbage_collection, versions, watch_conditions
from dcqfa_ros.bench.sizes import SizeRow, is_smaller, sizes
from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.engine import ROLES
from dcqfa_ros.runtime.engines import ONNXRUNTIME, RUNTIMES, open_engine, runtime_facts
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.huge_pages import keep_heap_together, use_huge_pages
from dcqfa_ros.runtime.policy import PolicyError, PolicyRuntime

ENTRY_POINT_GROUP = "dcqfa.bench_engines"
EAGER = "torch_eager"
_WARM_UP_RUNS = 3
_PACKAGES = (*(name for facts in RUNTIMES.values() for name in facts.distributions), "numpy", "diffusers")


class BenchError(UserError, ValueError):
    """A benchmark that cannot be run as asked."""


class ReferenceEngine(Protocol):
    """What a function registered in ``dcqfa.bench_engines`` returns: something to compare with."""

    name: str

    def run(self) -> object:
        """Compute one whole chunk."""
        ...


@dataclass(frozen=True, slots=True)
class Contender:
    """One thing to measure: ``run`` computes one whole chunk at batch 1.

    ``weights`` is the identity of the variant's files; None where no bundle's weights are run. ``close`` releases what
    ``run`` needs.
    """

    engine: str
    variant: str
    precision: str
    threads: int
    steps: int
    run: Callable[[], object]
    weights: str | None = None
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True)
class Row:
    """Latency of one contender, milliseconds per chunk over ``samples`` chunks; ``weights`` as in the contender."""

    engine: str
    variant: str
    threads: int
    steps: int
    p50_ms: float
    p99_ms: float
    samples: int
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Result of :func:`compare_engines`.

    Attributes:
        rows: latencies.
        ratios: how many times faster, within the first runtime and against PyTorch eager; None where a row is missing.
            Those of a further runtime are prefixed with its name. ``w8a8`` and ``fp32`` are of the whole policy,
            ``searched`` is the fastest variant that a search chose.
        sizes: bytes per variant.
        notes: what could not be compared, and why.
        conditions: load of the computer meanwhile.
        versions: of packages.
        batch: chunks computed at a time.
    """

    rows: tuple[Row, ...]
    ratios: dict[str, float | None]
    sizes: tuple[SizeRow, ...]
    notes: tuple[str, ...]
    conditions: Conditions
    versions: dict[str, str]
    batch: int = 1


def compare_engines(
    bundle: Bundle,
    *,
    variants: Sequence[str] = (),
    runtimes: Sequence[str] = (ONNXRUNTIME,),
    steps: int | None = None,
    threads: int = 1,
    rounds: int = 60,
    huge_pages: bool = True,
) -> EngineReport:
    """Measure every variant on every runtime and every registered reference, one chunk each per round.

    Args:
        bundle: the policy.
        variants: names; all where empty.
        runtimes: names, the first of which the ratios are about; a variant that one cannot run becomes a note.
        steps: denoising steps; default: the bundle's.
        threads: threads of every engine.
        rounds: chunks per contender, at least 2.
        huge_pages: let weights lie in huge pages, as the robot does.

    Raises:
        BenchError: rounds or steps is out of range, there is no such variant, or no runtime can run one.
        BundleError: a file is missing or altered.
        EngineError: a runtime is unknown.
        PolicyError: a variant cannot be run.
    """
    if rounds < 2:
        raise BenchError(f"rounds: expected at least 2, got {rounds}")
    spec = bundle.spec
    count = spec.diffusion.steps if steps is None else steps
    if not 1 <= count <= spec.diffusion.most_steps:
        raise BenchError(f"steps: expected 1 to {spec.diffusion.most_steps}, got {count}")
    known = [variant.name for variant in spec.variants]
    for name in variants:
        if name not in known:
            raise BenchError(f"bundle {spec.name} has no variant {name!r}; it has {', '.join(known)}")
    for runtime in runtimes:
        runtime_facts(runtime)
    contenders: list[Contender] = []
    notes: list[str] = []
    if huge_pages:
        keep_heap_together()  # as the robot's worker process does
    try:
        for runtime in runtimes:
            for name in variants or known:
                try:
                    contenders.append(_engine(bundle, name, runtime, count, threads))
                except (EngineError, PolicyError) as error:
                    notes.append(f"no row {runtime} {name}: {error}")
        if not contenders:
            raise BenchError("\n".join(notes))
        if huge_pages:
            use_huge_pages()
        references, more = _references(spec, count, threads)
        conditions = watch_conditions()
        rows = measure(contenders + references, rounds)
    finally:
        for contender in contenders:
            contender.close()
    return EngineReport(
        tuple(rows),
        _ratios(spec, rows, runtimes),
        sizes(spec, known),
        tuple(notes + more),
        conditions(),
        versions(_PACKAGES),
    )


def measure(contenders: Sequence[Contender], rounds: int) -> list[Row]:
    """Time ``rounds`` chunks of each contender; every round runs all of them, starting with another one each time."""
    for contender in contenders:
        for _ in range(_WARM_UP_RUNS):
            contender.run()
    times = np.empty((len(contenders), rounds))
    with no_garbage_collection():
        for number in range(rounds):
            for place in range(len(contenders)):
                index = (number + place) % len(contenders)
                begin = time.perf_counter()
                contenders[index].run()
                times[index, number] = time.perf_counter() - begin
    p50, p99 = 1e3 * np.percentile(times, [50, 99], axis=1)
    return [
        Row(c.engine, c.variant, c.threads, c.steps, round(float(a), 4), round(float(b), 4), rounds, c.weights)
        for c, a, b in zip(contenders, p50, p99, strict=True)
    ]


def _engine(bundle: Bundle, variant: str, runtime: str, steps: int, threads: int) -> Contender:
    files = {role: bundle.read(variant, role) for role in ROLES}
    engine = open_engine(runtime, files, threads=threads, name=variant)
    policy = PolicyRuntime(bundle.spec, engine)
    generator = np.random.default_rng(0)
    observation = {}
    for key in policy.observations.keys:
        normalised = generator.uniform(-1.0, 1.0, (1, policy.observations.history, *key.shape))
        observation[key.name] = key.normalizer.denormalize(normalised)
    described = bundle.spec.variant(variant)

    def run() -> object:
        return policy.predict(observation, [0], [0], steps)

    try:
        run()  # some runtimes build or compile only now
    except BaseException:
        engine.close()
        raise
    return Contender(
        runtime,
        variant,
        described.precision,
        threads,
        steps,
        run,
        described.weights,
        engine.close,
    )


def _references(spec: BundleSpec, steps: int, threads: int) -> tuple[list[Contender], list[str]]:
    """Load what other distributions registered for comparison; what cannot be loaded becomes a note."""
    contenders: list[Contender] = []
    notes: list[str] = []
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        try:
            reference: ReferenceEngine = entry.load()(spec, steps, threads)
        except (ImportError, UserError) as error:
            notes.append(f"no row {entry.name}: {error}")
            continue
        contenders.append(Contender(entry.name, "fp32", "fp32", threads, steps, reference.run))
    if not contenders and not notes:
        notes.append("no row torch_eager: nothing is registered for comparison (install the training requirements)")
    return contenders, notes


def _ratios(spec: BundleSpec, rows: Sequence[Row], runtimes: Sequence[str]) -> dict[str, float | None]:
    kinds = {variant.name: variant.precision for variant in spec.variants}
    whole = {variant.name for variant in spec.variants if not is_smaller(spec, variant)}
    searched = {variant.name for variant in spec.variants if variant.searched_for is not None}
    eager = next((row.p50_ms for row in rows if row.engine == EAGER), None)
    ratios: dict[str, float | None] = {}
    for place, runtime in enumerate(runtimes):
        own = [row for row in rows if row.engine == runtime]

        def fastest(names: Callable[[str], bool], own: Sequence[Row] = own) -> float | None:
            return min((row.p50_ms for row in own if names(row.variant)), default=None)

        w8a8 = fastest(lambda name: name in whole and kinds[name] == "w8a8")
        prefix = "" if place == 0 else f"{runtime}."
        ratios[f"{prefix}w8a8_vs_torch_eager"] = _times_faster(eager, w8a8)
        fp32 = fastest(lambda name: name in whole and kinds[name] == "fp32")
        ratios[f"{prefix}w8a8_vs_fp32"] = _times_faster(fp32, w8a8)
        ratios[f"{prefix}searched_vs_torch_eager"] = _times_faster(eager, fastest(lambda name: name in searched))
    return ratios


def _times_faster(other: float | None, ours: float | None) -> float | None:
    return None if other is None or ours is None else round(other / ours, 3)
