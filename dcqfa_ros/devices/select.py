"""Choose the variant of a bundle for a device: the fastest that this device executes within the budgets, and why.

Latencies measured on this device decide where every variant that fits has one. Otherwise what is missing is modelled:
parameters x relative time of the layers' precision, scaled by a latency that is known. A modelled time is not held
against a budget in milliseconds; the choice then says ``modelled``, which variant is not measured, and how to measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dcqfa_ros.bundle.schema import BundleSpec, LatencyRecord, VariantSpec
from dcqfa_ros.devices.capabilities import Runtime, runtimes
from dcqfa_ros.devices.detect import Device
from dcqfa_ros.devices.records import LocalRecords, matches, records_of
from dcqfa_ros.errors import UserError

Basis = Literal["measured", "predicted", "modelled"]
_ORDER: dict[Basis, int] = {"measured": 0, "predicted": 1, "modelled": 2}

WORKER_BYTES = 90 * 2**20
"""Resident memory of an engine's worker process without weights: Python, NumPy and ONNX Runtime."""
WEIGHT_COPIES = 5
"""Copies of the weights at the peak of loading: the file's bytes, the graph as parsed and as lowered, the session's own
and its packed form (169 MiB measured for 32 MiB of FP32 weights)."""
_FREE_SHARE = 0.5
"""Of the free memory a variant may take half, so that a swap can hold the old and the new one."""


class BudgetError(UserError, ValueError):
    """A budget, rate or step count that makes no sense; names the value and what is expected."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper limits for one variant; ``memory_bytes`` None means that the free memory is unknown."""

    latency_ms: float
    memory_bytes: int | None
    latency_reason: str
    memory_reason: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One variant as ranked.

    Attributes:
        variant: its name.
        accepted: whether this device executes it within the budgets.
        basis: what is known of its own latency.
        latency_ms: p99 (p50 where the record has no p99) of one chunk; when modelled, scaled from another variant's, or
            None where no latency is known.
        relative_time: modelled time, the bundle's FP32 network = 1.
        memory_bytes: estimated resident memory of its worker.
        reason: why it has its rank or was rejected.
    """

    variant: str
    accepted: bool
    basis: Basis
    latency_ms: float | None
    relative_time: float
    memory_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The result: ``variant`` is None when no variant fits; ``ranking`` is best first, rejected variants last.

    ``basis`` is the weakest among the accepted variants: a choice is measured when all it compares is.
    """

    variant: str | None
    reason: str
    basis: Basis | None
    ranking: tuple[Candidate, ...]
    device: str
    runtime: str
    budget: Budget
    steps: int
    threads: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def budget_for(
    spec: BundleSpec, device: Device, control_rate: float = 0.0, latency_ms: float = 0.0, memory_mb: float = 0.0
) -> Budget:
    """Return the limits; 0 derives one.

    Args:
        spec: the bundle.
        device: where it runs.
        control_rate: actions per second; 0: the bundle's.
        latency_ms: time one chunk may take; 0: one control period, because a chunk is computed when the last action
            of the one before has been executed, and its first action is due one period later.
        memory_mb: MiB its worker may take; 0: half of the free memory.

    Raises:
        BudgetError: a value is negative or not finite.
    """
    for name, value in (("control_rate", control_rate), ("latency_ms", latency_ms), ("memory_mb", memory_mb)):
        if not 0.0 <= value < float("inf"):
            raise BudgetError(f"{name}: expected 0 (derive it) or more, got {value}")
    rate = control_rate or spec.action.rate_hz
    if latency_ms:
        latency, latency_reason = latency_ms, "given"
    else:
        latency = 1e3 / rate
        latency_reason = f"one control period at {rate:g} Hz"
    if memory_mb:
        return Budget(latency, int(memory_mb * 2**20), latency_reason, "given")
    if not device.memory_available_bytes:
        return Budget(latency, None, latency_reason, "the free memory is unknown")
    memory = int(device.memory_available_bytes * _FREE_SHARE)
    return Budget(latency, memory, latency_reason, "half of the free memory")


def choose(
    spec: BundleSpec,
    device: Device,
    budget: Budget,
    local: LocalRecords | None = None,
    *,
    steps: int = 0,
    threads: int = 1,
    available: Sequence[Runtime] | None = None,
) -> Choice:
    """Rank the variants of ``spec`` on ``device`` and choose one.

    Args:
        spec: the bundle.
        device: where it runs.
        budget: see :func:`budget_for`.
        local: measurements of this computer.
        steps: denoising steps; 0: the bundle's. Records of other step counts are not used.
        threads: threads of the engine.
        available: the device's runtimes; for tests.

    Raises:
        BudgetError: steps or threads are out of range.
    """
    if not 0 <= steps <= spec.diffusion.train_timesteps:
        raise BudgetError(f"steps: expected 0 (the bundle's) to {spec.diffusion.train_timesteps}, got {steps}")
    if threads < 1:
        raise BudgetError(f"threads: expected at least 1, got {threads}")
    steps = steps or spec.diffusion.steps
    runtime = next(iter(runtimes(device) if available is None else available))
    local = local or LocalRecords()
    candidates = [_candidate(v, spec, device, runtime, budget, local, steps, threads) for v in spec.variants]
    accepted = sorted(_scaled([c for c in candidates if c.accepted]), key=lambda c: _rank(c, spec))
    rejected = [c for c in candidates if not c.accepted]
    best = accepted[0] if accepted else None
    basis = max(accepted, key=lambda c: _ORDER[c.basis]).basis if accepted else None
    if best is None:
        reason = "no variant fits this device: " + "; ".join(f"{c.variant}: {c.reason}" for c in rejected)
    else:
        reason = f"{best.variant}: {best.reason}"
        if basis != "measured":
            options = f"--bundle {spec.name} --steps {steps} --threads {threads} --save"
            missing = ", ".join(c.variant for c in accepted if c.basis != "measured")
            reason += f"; {basis}, {missing} not measured on this device: profile it by 'dcqfa bench engine {options}'"
    return Choice(
        best.variant if best else None,
        reason,
        basis,
        (*accepted, *rejected),
        device.fingerprint,
        f"{runtime.name} {runtime.version or '(not installed)'}",
        budget,
        steps,
        threads,
    )


def memory_estimate(variant: VariantSpec) -> int:
    """Return the estimated peak of resident bytes of the variant's worker process."""
    return WORKER_BYTES + WEIGHT_COPIES * variant.size.disk_bytes


def _scaled(accepted: list[Candidate]) -> list[Candidate]:
    """Give variants of unknown latency that of the best known one times the ratio of modelled times.

    Being known does not make a variant fast: it must not win against one that nobody has measured yet.
    """
    known = [c for c in accepted if c.latency_ms is not None]
    if not known:
        return accepted
    base = min(known, key=lambda c: (_ORDER[c.basis], c.latency_ms))
    assert base.latency_ms is not None
    result = []
    for candidate in accepted:
        if candidate.latency_ms is None:
            latency = base.latency_ms * candidate.relative_time / base.relative_time
            reason = (
                f"modelled {latency:.1f} ms per chunk, scaled from {base.variant} ({base.basis}); not measured here"
            )
            candidate = replace(candidate, latency_ms=latency, reason=reason)
        result.append(candidate)
    return result


def _rank(candidate: Candidate, spec: BundleSpec) -> tuple[float, int, bool]:
    """Fastest; then smallest; then the bundle's default. Either all candidates have a latency or none has."""
    time = candidate.relative_time if candidate.latency_ms is None else candidate.latency_ms
    size = spec.variant(candidate.variant).size.disk_bytes
    return time, size, candidate.variant != spec.default_variant


def _candidate(
    variant: VariantSpec,
    spec: BundleSpec,
    device: Device,
    runtime: Runtime,
    budget: Budget,
    local: LocalRecords,
    steps: int,
    threads: int,
) -> Candidate:
    relative = _relative_time(variant, spec, runtime)
    memory = memory_estimate(variant)
    record = _record(variant, local, device, runtime, steps, threads)
    latency = None if record is None else record.p99_ms or record.p50_ms
    basis: Basis = "modelled" if record is None else record.kind

    def result(accepted: bool, reason: str) -> Candidate:
        return Candidate(variant.name, accepted, basis, latency, relative, memory, reason)

    if runtime.unavailable:
        return result(False, runtime.unavailable)
    refusal = _refusal(variant, runtime)
    if refusal:
        return result(False, refusal)
    if budget.memory_bytes is not None and memory > budget.memory_bytes:
        return result(
            False,
            f"needs about {memory >> 20} MiB, the budget is {budget.memory_bytes >> 20} MiB ({budget.memory_reason})",
        )
    if latency is None:
        return result(True, f"modelled time {relative:.2f} of FP32 on {runtime.name}")
    figure = f"{basis} {'p99' if record is not None and record.p99_ms else 'p50'} {latency:.1f} ms per chunk"
    limit = f"{budget.latency_ms:.1f} ms ({budget.latency_reason})"
    if latency > budget.latency_ms:
        return result(False, f"{figure} on this device exceeds the budget of {limit}")
    return result(True, f"{figure} on this device, the budget is {limit}")


def _refusal(variant: VariantSpec, runtime: Runtime) -> str | None:
    """Return why the runtime does not execute some layer, or None."""
    for layer in variant.layers:
        reason = runtime.refuses(layer.executed.get(runtime.name, layer.exported))
        if reason:
            return f"layer {layer.layer}: {reason}"
    return None


def _relative_time(variant: VariantSpec, spec: BundleSpec, runtime: Runtime) -> float:
    times = [runtime.relative_time(layer.executed.get(runtime.name, layer.exported)) for layer in variant.layers]
    largest = max(v.size.parameters for v in spec.variants)
    return sum(times) / len(times) * variant.size.parameters / largest


def _record(
    variant: VariantSpec, local: LocalRecords, device: Device, runtime: Runtime, steps: int, threads: int
) -> LatencyRecord | None:
    """Return the record that counts: measured before predicted, this computer's own before the bundle's."""
    found = [r for r in records_of(variant, local) if matches(r, device.fingerprint, runtime.name, threads, steps)]
    return min(found, key=lambda r: _ORDER[r.kind], default=None)
