"""Choose variant and runtime for a device: the fastest that this device executes within the budgets, and why.

In this order: recorded quality (:mod:`dcqfa_ros.devices.quality`), runtimes that somebody has executed before those
that neither their authors have nor a measurement on this device shows to run, runtimes with a measurement before
runtimes that nothing is known of here, latency. Latencies measured on this device decide where every variant that fits
has one. Otherwise what is missing is modelled: parameters x relative time of the layers as executed, scaled by a
latency that is known. A modelled time is not held against a budget in milliseconds; the choice then says ``modelled``,
which variant is not measured, and how to measure. Equal ones are ordered by what is known of them, size, the bundle's
default, and their order in bundle and runtimes, so that the same facts always give the same choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.devices.advice import measure_command, profile_command
from dcqfa_ros.devices.budget import Budget, BudgetError, budget_for
from dcqfa_ros.devices.candidates import BASIS_ORDER, Basis, Candidate, Conditions, candidate, is_untried, scaled
from dcqfa_ros.devices.capabilities import Runtime, runtimes
from dcqfa_ros.devices.detect import Device
from dcqfa_ros.devices.quality import LOWER, MARGIN, judge
from dcqfa_ros.devices.records import LocalRecords
from dcqfa_ros.runtime.engines import AUTO, runtime_facts

__all__ = ["MARGIN", "Budget", "BudgetError", "Candidate", "Choice", "budget_for", "choose"]

_SAME_MS = 4  # digits: latencies that agree to 0.1 microseconds are equal


@dataclass(frozen=True, slots=True)
class Choice:
    """The result of :func:`choose`.

    Attributes:
        variant: what to run; None when nothing fits.
        runtime: what to run it on; None when nothing fits.
        runtime_version: version of that runtime.
        reason: why.
        basis: the weakest among those that were compared by latency: a choice is measured when all it compares is.
        device: fingerprint.
        known_device: whether any record is of this device.
        budget: the limits.
        steps: denoising steps.
        threads: threads of the engine.
        quality_margin: see :mod:`dcqfa_ros.devices.quality`.
        ranking: best first, rejected ones last.
        left_out: runtime -> why nothing can run on it now.
    """

    variant: str | None
    runtime: str | None
    runtime_version: str | None
    reason: str
    basis: Basis | None
    device: str
    known_device: bool
    budget: Budget
    steps: int
    threads: int
    quality_margin: float
    ranking: tuple[Candidate, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def runtime_of(self, variant: str) -> str | None:
        """Return the best runtime of a variant on this device, None where it fits on none."""
        return next((c.runtime for c in self.ranking if c.accepted and c.variant == variant), None)


def choose(
    spec: BundleSpec,
    device: Device,
    budget: Budget,
    local: LocalRecords | None = None,
    *,
    steps: int = 0,
    threads: int = 1,
    runtime: str = AUTO,
    quality_margin: float = MARGIN,
    available: Sequence[Runtime] | None = None,
) -> Choice:
    """Rank the variants of ``spec`` on the runtimes of ``device`` and choose one.

    Args:
        spec: the bundle.
        device: where it runs.
        budget: see :func:`budget_for`.
        local: measurements of this computer.
        steps: denoising steps; 0: the bundle's. Records of other step counts are not used.
        threads: threads of the engine.
        runtime: the only runtime to consider, or ``auto``.
        quality_margin: by how much a recorded score may be lower than the bundle's best.
        available: the device's runtimes; for tests.

    Raises:
        BudgetError: steps, threads or quality_margin are out of range.
        EngineError: there is no such runtime.
    """
    if not 0 <= steps <= spec.diffusion.most_steps:
        raise BudgetError(f"steps: expected 0 (the bundle's) to {spec.diffusion.most_steps}, got {steps}")
    if threads < 1:
        raise BudgetError(f"threads: expected at least 1, got {threads}")
    if runtime != AUTO:
        runtime_facts(runtime)
    conditions = Conditions(device, steps or spec.diffusion.steps, threads, local or LocalRecords())
    quality = judge(spec, conditions.steps, quality_margin)
    considered = [r for r in (runtimes(device) if available is None else available) if runtime in (AUTO, r.name)]
    usable = [r for r in considered if r.unavailable is None]
    untried = frozenset(r.name for r in usable if is_untried(r, spec, conditions))
    found = [
        candidate(v, spec, r, budget, conditions, quality[v.name], r.name in untried)
        for r in usable
        for v in spec.variants
    ]
    fitting = [c for c in found if c.accepted]
    unmeasured = _unmeasured(fitting)
    known_of = {r.name: (r.name in untried, r.name in unmeasured) for r in usable}
    accepted = sorted(scaled(fitting, budget), key=lambda c: _rank(c, spec, usable, known_of))
    rejected = [c for c in found if not c.accepted]
    left_out = {r.name: r.unavailable for r in considered if r.unavailable is not None}
    known = _is_known(spec, conditions)
    best = accepted[0] if accepted else None
    basis, reason = None, _why_none(rejected, left_out)
    if best is not None:
        basis, reason = _explain(best, accepted, known_of, spec, conditions, known)
    return Choice(
        best.variant if best else None,
        best.runtime if best else None,
        next((r.version for r in usable if best and r.name == best.runtime), None),
        reason,
        basis,
        device.fingerprint,
        known,
        budget,
        conditions.steps,
        threads,
        quality_margin,
        (*accepted, *rejected),
        left_out,
    )


def _rank(
    one: Candidate, spec: BundleSpec, usable: Sequence[Runtime], known_of: Mapping[str, tuple[bool, bool]]
) -> tuple[Any, ...]:
    """Sort key. Either all candidates have a latency or none has."""
    time = one.relative_time if one.latency_ms is None else one.latency_ms
    variant = spec.variant(one.variant)
    return (
        one.quality_tier,
        -one.score if one.quality_tier == LOWER and one.score is not None else 0.0,
        known_of[one.runtime],
        round(time, _SAME_MS),
        BASIS_ORDER[one.basis],
        variant.size.disk_bytes,
        one.variant != spec.default_variant,
        spec.variants.index(variant),
        [r.name for r in usable].index(one.runtime),
    )


def _unmeasured(fitting: Sequence[Candidate]) -> frozenset[str]:
    """Return the runtimes of which nothing is known here while another one is measured.

    A model that scales between layers of one runtime says little about another runtime.
    """
    if not any(c.basis == "measured" for c in fitting):
        return frozenset()
    return frozenset(c.runtime for c in fitting) - {c.runtime for c in fitting if c.basis != "modelled"}


def _is_known(spec: BundleSpec, conditions: Conditions) -> bool:
    records = [r for v in spec.variants for r in v.latency] + [r.record for r in conditions.local.records]
    return any(r.device == conditions.device.fingerprint for r in records)


def _explain(
    best: Candidate,
    accepted: Sequence[Candidate],
    known_of: Mapping[str, tuple[bool, bool]],
    spec: BundleSpec,
    conditions: Conditions,
    known: bool,
) -> tuple[Basis, str]:
    """Return the basis of a choice and why it was made."""
    compared = [
        c for c in accepted if c.quality_tier == best.quality_tier and known_of[c.runtime] == known_of[best.runtime]
    ]
    basis = max(compared, key=lambda c: BASIS_ORDER[c.basis]).basis
    parts = [f"{best.variant} on {best.runtime}: {best.reason}"]
    faster = [c for c in accepted if c.quality_tier > best.quality_tier and _time(c) < _time(best)]
    if faster:
        parts.append(f"not chosen for latency alone: {', '.join(c.engine for c in faster)} (see there)")
    measure = measure_command(spec, conditions.steps, conditions.threads)
    behind = sorted({c.runtime for c in accepted if any(known_of[c.runtime])})
    if behind:
        parts.append(f"nothing is measured here on {', '.join(behind)}, which therefore rank last")
    if basis == "modelled" and not known:
        profile = profile_command(spec, conditions.device, conditions.threads)
        parts.append(
            f"modelled, because there is no record of this device: profile it by '{profile}' and measure the variants "
            f"by '{measure}'"
        )
    elif basis != "measured":
        missing = ", ".join(c.engine for c in compared if c.basis != "measured")
        parts.append(f"{basis}, {missing} not measured on this device: measure by '{measure}'")
    return basis, "; ".join(parts)


def _time(one: Candidate) -> float:
    return one.relative_time if one.latency_ms is None else one.latency_ms


def _why_none(rejected: Sequence[Candidate], left_out: dict[str, str]) -> str:
    """Say why nothing fits: the closest one and by how much it misses, or every refusal."""
    over = [c for c in rejected if c.excess is not None]
    if over:
        closest = min(over, key=lambda c: c.excess or 0.0)
        return f"no variant fits this device; the closest is {closest.variant} on {closest.runtime}: {closest.reason}"
    if rejected:
        return "no variant fits this device: " + "; ".join(f"{c.engine}: {c.reason}" for c in rejected)
    return "no variant fits this device: " + "; ".join(f"{name}: {why}" for name, why in left_out.items())
