"""What a policy may be changed to while it runs: variant, runtime and denoising steps, by expected quality.

The first rung is the selector's choice. The others cost less time or less memory than it does. Their quality is what
the bundle records for that variant *with those steps*, under the conditions (metric, seeds) of the choice: a number of
steps that nobody has scored is not used unless the operator allows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.devices.budget import Budget, BudgetError
from dcqfa_ros.devices.candidates import Candidate
from dcqfa_ros.devices.capabilities import Runtime
from dcqfa_ros.devices.detect import Device
from dcqfa_ros.devices.quality import MARGIN, scores_by_steps
from dcqfa_ros.devices.records import LocalRecords
from dcqfa_ros.devices.select import Choice, choose
from dcqfa_ros.runtime.engines import AUTO

LOAD_MARGIN = 0.1
"""By how much a recorded score may be lower than the bundle's best one while the device is short of something."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to run the policy.

    Attributes:
        variant: its name.
        runtime: name of the runtime.
        steps: denoising steps per chunk.
        cost: expected time of one chunk on this device when it has nothing else to do. Milliseconds (p99 where
            recorded); where no latency is known, modelled time times steps, which compares rungs with each other only.
        memory_bytes: estimated memory of its worker, as :class:`Candidate`.
        gpu_memory_bytes: on a GPU with memory of its own.
        score: recorded score with these steps, None where there is none.
    """

    variant: str
    runtime: str
    steps: int
    cost: float
    memory_bytes: int
    gpu_memory_bytes: int
    score: float | None

    @property
    def engine(self) -> str:
        """``<runtime>/<variant>``."""
        return f"{self.runtime}/{self.variant}"

    @property
    def label(self) -> str:
        """Engine and steps, for people."""
        return f"{self.engine} with {self.steps} steps"


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rungs by expected quality, the selector's choice first; empty where nothing fits the device.

    Attributes:
        rungs: best first.
        in_ms: whether costs are milliseconds.
        left_out: what is not used -> why.
        budget_ms: what a chunk may take.
        period_ms: one control period.
    """

    rungs: tuple[Rung, ...]
    in_ms: bool
    left_out: Mapping[str, str]
    budget_ms: float
    period_ms: float

    def find(self, engine: str, steps: int) -> int | None:
        """Return the index of a rung, None where it is not of the ladder."""
        return next((i for i, r in enumerate(self.rungs) if (r.engine, r.steps) == (engine, steps)), None)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def build_ladder(
    spec: BundleSpec,
    device: Device,
    budget: Budget,
    local: LocalRecords | None = None,
    *,
    choice: Choice,
    steps_allowed: Sequence[int] = (),
    allow_unrecorded: bool = False,
    load_margin: float = LOAD_MARGIN,
    runtime: str = AUTO,
    quality_margin: float = MARGIN,
    available: Sequence[Runtime] | None = None,
) -> Ladder:
    """Return the ladder that begins with ``choice``.

    Args:
        spec: the bundle.
        device: where it runs.
        budget: as for :func:`choose`.
        local: measurements of this computer.
        choice: what the selector chose; its steps and threads count.
        steps_allowed: further numbers of denoising steps to use.
        allow_unrecorded: use variants with these steps also where no score is recorded for them.
        load_margin: by how much a recorded score may be lower than the best one.
        runtime: as for :func:`choose`.
        quality_margin: as for :func:`choose`.
        available: as for :func:`choose`.

    Raises:
        BudgetError: a number of steps or the margin is out of range.
    """
    most = spec.diffusion.most_steps
    for steps in steps_allowed:
        if not 1 <= steps <= most:
            raise BudgetError(f"steps_allowed: expected numbers from 1 to {most}, got {steps}")
    if not 0.0 <= load_margin < float("inf"):
        raise BudgetError(f"load_margin: expected 0 or more, got {load_margin}")
    base = {c.engine: c for c in choice.ranking}
    in_ms = any(c.accepted and c.latency_ms is not None for c in base.values())
    scores = scores_by_steps(spec, choice.steps)
    best = max((score for (_, steps), score in scores.items() if steps == choice.steps), default=None)
    left_out: dict[str, str] = {}
    rungs: list[Rung] = []
    for steps in dict.fromkeys((choice.steps, *steps_allowed)):
        ranking = choice.ranking
        if steps != choice.steps:
            ranking = choose(
                spec,
                device,
                budget,
                local,
                steps=steps,
                threads=choice.threads,
                runtime=runtime,
                quality_margin=quality_margin,
                available=available,
            ).ranking
        for one in ranking:
            rung = _rung(one, base.get(one.engine), steps, choice.steps, in_ms, scores.get((one.variant, steps)))
            if not one.accepted:
                continue
            if not rungs:
                rungs.append(rung)  # the choice itself
                continue
            why = _unused(rung, rungs[0], best, load_margin, allow_unrecorded or steps == choice.steps)
            if why:
                left_out[rung.label] = why
            else:
                rungs.append(rung)
    return Ladder(
        (*rungs[:1], *_by_quality(rungs[1:], list(base))), in_ms, left_out, budget.latency_ms, budget.period_ms
    )


def _by_quality(rungs: Sequence[Rung], engines: Sequence[str]) -> list[Rung]:
    """Order by recorded score, then by steps; where neither says anything, what costs most is taken to be best.

    The runtimes of one variant with the same steps compute the same: of them the order of ``engines`` decides, the
    selector's.
    """
    cost: dict[tuple[str, int], float] = {}
    for rung in rungs:
        key = rung.variant, rung.steps
        cost[key] = max(rung.cost, cost.get(key, 0.0))

    def order(rung: Rung) -> tuple[bool, float, int, float, str, int]:
        dearest = cost[rung.variant, rung.steps]
        place = engines.index(rung.engine) if rung.engine in engines else len(engines)
        return rung.score is None, -(rung.score or 0.0), -rung.steps, -dearest, rung.variant, place

    return sorted(rungs, key=order)


def _rung(
    one: Candidate, base: Candidate | None, steps: int, base_steps: int, in_ms: bool, score: float | None
) -> Rung:
    """Give a candidate its cost: its own latency, else that with the choice's steps in proportion, else modelled."""
    cost = one.relative_time * steps
    if in_ms:
        known = None if base is None or base.latency_ms is None else base.latency_ms * steps / base_steps
        if one.latency_ms is not None and (one.basis != "modelled" or known is None):
            known = one.latency_ms
        cost = cost if known is None else known
    return Rung(one.variant, one.runtime, steps, cost, one.memory_bytes, one.gpu_memory_bytes, score)


def _unused(rung: Rung, first: Rung, best: float | None, margin: float, unrecorded: bool) -> str:
    """Return why a rung is not used, or nothing."""
    if rung.score is None and not unrecorded:
        return f"no score is recorded with {rung.steps} steps: evaluate it (dcqfa eval), or allow unrecorded steps"
    if rung.score is not None and best is not None and best - rung.score > margin + 1e-9:
        return f"score {rung.score:.3f} is {best - rung.score:.3f} below the best, more than {margin:g}"
    saves = rung.cost < first.cost or rung.memory_bytes < first.memory_bytes
    if not saves and rung.gpu_memory_bytes >= first.gpu_memory_bytes:
        return f"saves neither time nor memory against {first.label}"
    return ""
