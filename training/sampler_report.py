"""How well samplers keep budgets and what their draws lose: learned, rejection and uniform side by side.

Each contestant draws for every device at every budget. A draw fits if it keeps both budgets; costs are those of the
device's table; losses are measured with a network on held-out data, on the first few draws of each cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from dcqfa_ros.errors import UserError
from training.conditions import Conditions
from training.cost import CostTensors
from training.sampler import ConfigurationSampler, SamplerConfig
from training.schedules import step_seed
from training.space import SearchSpace
from training.subnet import Subnet

BUDGETS = (0.3, 0.5, 0.8)  # shares of the way from the smallest to the largest subnet
SEEDS = (0, 1, 2)
KINDS = ("learned", "rejection", "uniform")
IN_RUN = "in_run"  # label of a learned sampler as a training run left it
LEARNED = ("learned", IN_RUN)
REQUIRED_SHARE = 0.95
SEED_TOLERANCE = 0.1  # of the budget: how far mean costs may differ between seeds; single draws differ by more

Loss = Callable[[Subnet], float]


class ReportError(UserError, ValueError):
    """A report that cannot be made; the message says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A sampler in the comparison.

    Attributes:
        label: what it is called: the kind of sampler, or ``IN_RUN``.
        seed: of its training and its draws.
        sampler: draws.
        loss: held-out loss of a subnet, from the network trained with this kind of sampler; None to leave it out.
        other_tables: whether it was trained with other tables of the devices than those it is judged by.
    """

    label: str
    seed: int
    sampler: ConfigurationSampler
    loss: Loss | None = None
    other_tables: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One sampler at one budget of one device; means are over its draws.

    Attributes:
        device: name.
        held_out: whether the device was kept out of the sampler's training.
        budget: share of the way from the smallest to the largest subnet's cost.
        kind: label of the sampler.
        seed: of the sampler.
        latency_budget_ms: per chunk.
        memory_budget_bytes: resident.
        share_within: draws that keep both budgets.
        latency_ms: mean.
        memory_bytes: mean.
        entropy: of the distribution, nats; None where it is not known.
        loss: mean held-out loss of the first draws.
        loss_within: the same of those that keep both budgets; None if none does.
        distinct: different subnets among the draws.
        other_tables: whether the sampler was trained with other tables of the devices than these.
    """

    device: str
    held_out: bool
    budget: float
    kind: str
    seed: int
    latency_budget_ms: float
    memory_budget_bytes: float
    share_within: float
    latency_ms: float
    memory_bytes: float
    entropy: float | None
    loss: float | None
    loss_within: float | None
    distinct: int
    other_tables: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """All rows and what they say of the learned sampler, as far as it was trained with the tables it is judged by.

    Attributes:
        rows: one per device, budget, sampler and seed.
        draws: subnets drawn per row.
        losses: of which so many were evaluated.
        least_share: smallest share within budget of any learned row.
        monotone: whether the mean cost of the learned sampler, latency and memory, rises with the budget everywhere.
        seed_difference: largest difference between the seeds' mean costs of the learned sampler, over the budget.
    """

    rows: tuple[Row, ...]
    draws: int
    losses: int
    least_share: float | None
    monotone: bool | None
    seed_difference: float | None

    @property
    def holds(self) -> bool | None:
        """Whether the learned sampler does what it should; None without one."""
        if self.least_share is None or self.monotone is None or self.seed_difference is None:
            return None
        return self.least_share >= REQUIRED_SHARE and self.monotone and self.seed_difference <= SEED_TOLERANCE

    def document(self) -> dict[str, Any]:
        """As JSON."""
        summary = {
            "least_share": self.least_share,
            "required_share": REQUIRED_SHARE,
            "monotone": self.monotone,
            "seed_difference": self.seed_difference,
            "seed_tolerance": SEED_TOLERANCE,
            "holds": self.holds,
        }
        means = summarize(self.rows)
        rows = [asdict(row) for row in self.rows]
        return {"learned": summary, "draws": self.draws, "losses": self.losses, "means": means, "rows": rows}


def train_samplers(
    space: SearchSpace,
    devices: Mapping[str, CostTensors],
    synthetic: Sequence[CostTensors],
    pairs: tuple[Sequence[Subnet], Sequence[float]],
    config: SamplerConfig,
    *,
    held_out: str | None,
    kinds: Sequence[str] = KINDS,
    seeds: Sequence[int] = SEEDS,
    updates: int = 600,
) -> list[Contestant]:
    """Train samplers of every kind and seed on the pairs logged in a run, as the run itself does, without its network.

    Args:
        space: the search space.
        devices: measured and modelled tables by name.
        synthetic: made-up tables.
        pairs: subnets and their losses against the teacher, oldest first.
        config: of the learned sampler; ``kind`` is replaced.
        held_out: device kept out of training.
        kinds: samplers to train.
        seeds: one sampler of each kind for each.
        updates: of every learned sampler.

    Raises:
        ReportError: no pairs.
        BudgetError: ``held_out`` is not among the devices.
    """
    subnets, losses = pairs
    if not subnets:
        raise ReportError("pairs: the run has logged none yet; train it further")
    conditions = Conditions(space, devices, synthetic, held_out)
    result = []
    with tqdm(
        total=len(seeds) * sum(updates if kind == "learned" else 1 for kind in kinds),
        desc="samplers",
        unit="update",
        disable=None,
    ) as progress:
        for seed in seeds:
            for kind in kinds:
                sampler = ConfigurationSampler(space, conditions, config.model_copy(update={"kind": kind}), seed)
                sampler.observe(subnets, losses)
                for update in range(updates if kind == "learned" else 1):  # the others only fit the predictor
                    sampler.update(torch.Generator().manual_seed(step_seed(seed, update)))
                    progress.update()
                result.append(Contestant(kind, seed, sampler))
    return result


def sampler_report(
    contestants: Sequence[Contestant], budgets: Sequence[float] = BUDGETS, draws: int = 400, losses: int = 24
) -> Report:
    """Let every contestant draw for every device, the held-out one included, at every budget.

    Args:
        contestants: their samplers know the devices.
        budgets: shares of the way from the smallest to the largest subnet's cost, for latency and memory alike.
        draws: per contestant, device and budget.
        losses: draws of these whose held-out loss is measured.

    Raises:
        ReportError: no contestant, or numbers out of range.
    """
    if not contestants or not budgets or draws < 1 or losses < 0 or not all(share >= 0.0 for share in budgets):
        raise ReportError(
            "sampler report: expected at least one sampler, budget and draw, and budgets of at least 0; "
            f"got {len(contestants)} samplers, budgets {list(budgets)}, {draws} draws, {losses} losses"
        )
    known: dict[tuple[Loss, Subnet], float] = {}
    rows = []
    cells = [
        (contestant, device, budget)
        for contestant in contestants
        for device in (*contestant.sampler.conditions.measured, *contestant.sampler.conditions.held_out)
        for budget in sorted(budgets)
    ]
    for contestant, device, budget in tqdm(cells, desc="draws", unit="cell", disable=None):
        rows.append(_row(contestant, device, budget, draws, losses, known))
    learned = [row for row in rows if row.kind in LEARNED and not row.other_tables]
    return Report(
        tuple(rows),
        draws,
        losses,
        min((row.share_within for row in learned), default=None),
        _monotone(learned) if learned else None,
        _seed_difference(learned) if learned else None,
    )


def _row(
    contestant: Contestant,
    device: str,
    budget: float,
    draws: int,
    losses: int,
    known: dict[tuple[Loss, Subnet], float],
) -> Row:
    sampler = contestant.sampler
    condition = sampler.conditions.between(device, budget)
    # The same stream in every cell: contestants and budgets are compared in pairs.
    drawn = sampler.draw_many(condition, torch.Generator().manual_seed(step_seed(contestant.seed, 0)), draws)
    costs = [condition.costs.total(subnet) for subnet in drawn]
    fits = [condition.fits(subnet) for subnet in drawn]
    measured: list[float] = []
    if contestant.loss is not None:
        for subnet in drawn[:losses]:
            if (contestant.loss, subnet) not in known:
                known[contestant.loss, subnet] = contestant.loss(subnet)
            measured.append(known[contestant.loss, subnet])
    within = [loss for loss, fit in zip(measured, fits[: len(measured)], strict=True) if fit]
    return Row(
        device=device,
        held_out=device in sampler.conditions.held_out,
        budget=budget,
        kind=contestant.label,
        seed=contestant.seed,
        latency_budget_ms=condition.latency_ms,
        memory_budget_bytes=condition.memory_bytes,
        share_within=sum(fits) / draws,
        latency_ms=math.fsum(cost.latency_ms for cost in costs) / draws,
        memory_bytes=math.fsum(cost.memory_bytes for cost in costs) / draws,
        entropy=sampler.entropy(condition) if sampler.config.kind == "learned" else None,
        loss=math.fsum(measured) / len(measured) if measured else None,
        loss_within=math.fsum(within) / len(within) if within else None,
        distinct=len(set(drawn)),
        other_tables=contestant.other_tables,
    )


def _monotone(rows: Sequence[Row]) -> bool:
    """Whether mean latency and memory rise with the budget for each device, label and seed."""
    curves: dict[tuple[str, str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.budget):
        curves.setdefault((row.device, row.kind, row.seed), []).append(row)
    return all(
        before.latency_ms < after.latency_ms and before.memory_bytes < after.memory_bytes
        for curve in curves.values()
        for before, after in itertools.pairwise(curve)
    )


def _seed_difference(rows: Sequence[Row]) -> float:
    """Largest difference of mean cost over budget between samplers, in any cell."""
    cells: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.device, row.budget), []).append(row)
    difference = 0.0
    for cell in cells.values():
        for values in (
            [row.latency_ms / row.latency_budget_ms for row in cell],
            [row.memory_bytes / row.memory_budget_bytes for row in cell],
        ):
            difference = max(difference, max(values) - min(values))
    return difference


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over the seeds of each device, budget and kind; the loss with the spread (range) of the seeds."""
    cells: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.device, row.budget, row.kind), []).append(row)
    result = []
    for (device, budget, kind), cell in sorted(cells.items()):
        losses = [row.loss for row in cell if row.loss is not None]
        within = [row.loss_within for row in cell if row.loss_within is not None]
        result.append(
            {
                "device": device,
                "held_out": cell[0].held_out,
                "budget": budget,
                "kind": kind,
                "other_tables": cell[0].other_tables,
                "seeds": len(cell),
                "share_within": math.fsum(row.share_within for row in cell) / len(cell),
                "least_share_within": min(row.share_within for row in cell),
                "latency_over_budget": math.fsum(row.latency_ms / row.latency_budget_ms for row in cell) / len(cell),
                "memory_over_budget": math.fsum(row.memory_bytes / row.memory_budget_bytes for row in cell) / len(cell),
                "latency_ms": math.fsum(row.latency_ms for row in cell) / len(cell),
                "memory_bytes": math.fsum(row.memory_bytes for row in cell) / len(cell),
                "loss": math.fsum(losses) / len(losses) if losses else None,
                "loss_range": max(losses) - min(losses) if losses else None,
                "loss_within": math.fsum(within) / len(within) if within else None,
            }
        )
    return result
