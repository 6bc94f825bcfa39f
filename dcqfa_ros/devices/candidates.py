"""A variant on a runtime of a device: whether it is executed within the budgets, how fast, and how that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dcqfa_ros.bundle.schema import Bits, BundleSpec, LatencyRecord, VariantSpec
from dcqfa_ros.bundle.stored import computed_bits, loaded_bytes
from dcqfa_ros.devices import modelled
from dcqfa_ros.devices.budget import Budget
from dcqfa_ros.devices.capabilities import Runtime
from dcqfa_ros.devices.detect import Device
from dcqfa_ros.devices.precisions import PRECISIONS, Execution, label
from dcqfa_ros.devices.quality import Quality
from dcqfa_ros.devices.records import LocalRecords, is_of_version, matches, records_of

Basis = Literal["measured", "predicted", "modelled"]
BASIS_ORDER: dict[Basis, int] = {"measured": 0, "predicted": 1, "modelled": 2}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One variant on one runtime, as ranked.

    Attributes:
        variant: its name.
        runtime: name of the runtime.
        accepted: whether this device executes it within the budgets.
        basis: what is known of its own latency.
        latency_ms: p99 (p50 where the record has no p99) of one chunk; when modelled, scaled from another's, or None
            where no latency is known.
        relative_time: modelled time, the bundle's largest network in FP32 on ONNX Runtime = 1.
        memory_bytes: estimated resident memory of its worker, with what it takes of a GPU that shares this memory.
        gpu_memory_bytes: estimated memory on a GPU with memory of its own.
        score: recorded score, None where there is none to compare.
        quality_tier: see :class:`dcqfa_ros.devices.quality.Quality`.
        excess: how many times the budget it needs where it was rejected for that, else None.
        reason: why it has its rank or was rejected.
    """

    variant: str
    runtime: str
    accepted: bool
    basis: Basis
    latency_ms: float | None
    relative_time: float
    memory_bytes: int
    gpu_memory_bytes: int
    score: float | None
    quality_tier: int
    excess: float | None
    reason: str

    @property
    def engine(self) -> str:
        """``<runtime>/<variant>``, as the opened engine will be named."""
        return f"{self.runtime}/{self.variant}"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a chunk is computed with: device, denoising steps and threads; ``local`` holds what was measured here."""

    device: Device
    steps: int
    threads: int
    local: LocalRecords


def candidate(
    variant: VariantSpec,
    spec: BundleSpec,
    runtime: Runtime,
    budget: Budget,
    conditions: Conditions,
    quality: Quality,
    untried: bool = False,
) -> Candidate:
    """Judge one variant of ``spec`` on one runtime that is available; the reason says where that is ``untried``."""
    executions = _executions(variant, runtime)
    refusal = next((f"layer {name}: {e.note}" for name, e in executions if e.bits is None), None)
    record, unused = _record(variant, runtime, conditions)
    latency = None if record is None else record.p99_ms or record.p50_ms
    memory, gpu_memory = _memory(variant, runtime, conditions.device)
    found = Candidate(
        variant.name,
        runtime.name,
        False,
        "modelled" if record is None else record.kind,
        latency,
        _relative_time(variant, spec, runtime, executions),
        memory,
        gpu_memory,
        quality.score,
        quality.tier,
        None,
        "",
    )
    if refusal:
        return replace(found, reason=refusal)
    caveat = f"{runtime.name} was {runtime.caveat}" if untried else ""
    notes = [*_replaced(variant, executions), *unused, *(note for note in (quality.note, caveat) if note)]
    figure = ""
    if record is not None:
        figure = f"{record.kind} {'p99' if record.p99_ms else 'p50'} {latency:.1f} ms per chunk on this device"
    problems = _problems(found, figure, budget)
    if problems:
        excess, texts = max(ratio for ratio, _ in problems), [text for _, text in problems]
        return replace(found, excess=excess, reason="; ".join([*texts, *notes]))
    if record is None:
        reason = f"modelled time {found.relative_time:.2f} of FP32 on onnxruntime"
    else:
        reason = f"{figure}, the budget is {budget.latency_ms:.1f} ms ({budget.latency_reason})"
        notes = [note for note in (held_still(latency, budget), *notes) if note]
    return replace(found, accepted=True, reason="; ".join([reason, *notes]))


def is_untried(runtime: Runtime, spec: BundleSpec, conditions: Conditions) -> bool:
    """Tell whether nobody has executed a runtime: neither its authors, nor this bundle's variants on this device."""
    return bool(runtime.caveat) and not any(
        record is not None and record.kind == "measured"
        for record, _ in (_record(variant, runtime, conditions) for variant in spec.variants)
    )


def held_still(latency_ms: float | None, budget: Budget) -> str:
    """Say for how long the arm has no action at each chunk, or nothing where it always has one."""
    late = 0.0 if latency_ms is None else latency_ms - budget.period_ms
    return f"the arm holds still for {late:.0f} ms at each chunk" if late >= 1.0 else ""


def scaled(accepted: Sequence[Candidate], budget: Budget) -> list[Candidate]:
    """Give candidates of unknown latency that of the best known one times the ratio of modelled times.

    The best known one is that of the same runtime where it has any. Being known does not make a variant fast: it must
    not win against one that nobody has measured yet.
    """
    known = [c for c in accepted if c.latency_ms is not None]
    if not known:
        return list(accepted)
    result = []
    for one in accepted:
        if one.latency_ms is None:
            base = min(known, key=lambda k: (k.runtime != one.runtime, BASIS_ORDER[k.basis], k.latency_ms))
            assert base.latency_ms is not None
            latency = base.latency_ms * one.relative_time / base.relative_time
            on = "" if base.runtime == one.runtime else f" on {base.runtime}"
            text = (
                f"modelled {latency:.1f} ms per chunk, scaled from {base.variant}{on} ({base.basis}); not measured here"
            )
            notes = [held_still(latency, budget), one.reason.partition("; ")[2]]
            one = replace(one, latency_ms=latency, reason="; ".join([text, *(n for n in notes if n)]))
        result.append(one)
    return result


def _problems(found: Candidate, figure: str, budget: Budget) -> list[tuple[float, str]]:
    """Return how many times each budget is exceeded, and by how much in words."""
    problems = []
    for needed, limit, what, reason in (
        (found.memory_bytes, budget.memory_bytes, "", budget.memory_reason),
        (found.gpu_memory_bytes, budget.gpu_memory_bytes, " on the GPU", "half of its free memory"),
    ):
        if limit is not None and needed > limit:
            over = -(-(needed - limit) // 2**20)
            text = f"needs about {needed >> 20} MiB{what}, {over} MiB over the budget of {limit >> 20} MiB ({reason})"
            problems.append((needed / max(limit, 1), text))
    if found.latency_ms is not None and found.latency_ms > budget.latency_ms:
        over_ms = found.latency_ms - budget.latency_ms
        limit_text = f"the budget of {budget.latency_ms:.1f} ms ({budget.latency_reason})"
        problems.append((found.latency_ms / budget.latency_ms, f"{figure}, {over_ms:.1f} ms over {limit_text}"))
    return problems


def _executions(variant: VariantSpec, runtime: Runtime) -> list[tuple[str, Execution]]:
    """Return layer -> how it is executed; what the bundle records of this runtime comes before what was exported.

    Runtimes on a GPU execute layers in FP32 in FP16 where the variant reduces any layer. Records say that already.
    """
    asked = [r.executed.get(runtime.name, computed_bits(variant, r)) for r in variant.layers]
    reduced = any(runtime.executes(bits).bits not in (None, PRECISIONS["fp32"]) for bits in asked)
    return [
        (r.layer, runtime.executes(bits, reduced and runtime.name not in r.executed))
        for r, bits in zip(variant.layers, asked, strict=True)
    ]


def _replaced(variant: VariantSpec, executions: Sequence[tuple[str, Execution]]) -> list[str]:
    pairs: dict[tuple[Bits, Bits], None] = {}
    for layer, (_, execution) in zip(variant.layers, executions, strict=True):
        if execution.bits is not None and execution.bits != layer.searched:
            pairs[layer.searched, execution.bits] = None
    return [f"executes {label(searched)} as {label(bits)}" for searched, bits in pairs]


def _relative_time(
    variant: VariantSpec, spec: BundleSpec, runtime: Runtime, executions: Sequence[tuple[str, Execution]]
) -> float:
    times = [
        runtime.relative_time(execution.bits or computed_bits(variant, layer))
        for layer, (_, execution) in zip(variant.layers, executions, strict=True)
    ]
    largest = max(v.size.parameters for v in spec.variants)
    return sum(times) / len(times) * variant.size.parameters / largest


def _memory(variant: VariantSpec, runtime: Runtime, device: Device) -> tuple[int, int]:
    """Return the estimated bytes in the system's memory, and on a GPU that has its own."""
    size = loaded_bytes(variant)
    host, gpu = modelled.host_bytes(runtime.name, size), modelled.gpu_bytes(runtime.name, size)
    shared = device.gpu is None or device.gpu.memory_bytes is None
    return (host + gpu, 0) if shared else (host, gpu)


def _record(variant: VariantSpec, runtime: Runtime, conditions: Conditions) -> tuple[LatencyRecord | None, list[str]]:
    """Return the record that counts, and notes on those of other versions of the runtime, which do not.

    Measured comes before predicted, this computer's own before the bundle's.
    """
    threads = conditions.threads if runtime.runs_on == "cpu" else None
    found = [
        r
        for r in records_of(variant, conditions.local)
        if matches(r, conditions.device.fingerprint, runtime.name, threads, conditions.steps)
    ]
    current = [r for r in found if is_of_version(r, runtime.version)]
    best = min(current, key=lambda r: BASIS_ORDER[r.kind], default=None)
    unused: dict[str, None] = {}
    for record in found:
        if record not in current and record.kind == "measured" and (best is None or best.kind != "measured"):
            figure = record.p99_ms or record.p50_ms
            unused[f"{figure:.1f} ms measured with {record.runtime} are not used: {runtime.title} runs here"] = None
    return best, list(unused)
