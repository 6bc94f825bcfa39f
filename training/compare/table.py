"""Rows, differences and verdicts, all computed from the scores of results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dcqfa_ros.trials.statistics import Interval, mean_interval, paired_difference
from training.compare.config import Claim, CompareConfig
from training.compare.paper import PaperFigures
from training.compare.results import Results, unlike, unlike_cells

Verdict = Literal["found", "not found", "not measured"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired mean difference ``first - second`` with its 95 % interval, and what it shows.

    Attributes:
        first, second: entries.
        task, seeds: where.
        interval: of the difference.
        margin: of non-inferiority.
        verdict_seeds: fewest seeds of which it is said what the interval shows.
    """

    first: str
    second: str
    task: str
    seeds: str
    interval: Interval
    margin: float
    verdict_seeds: int = 1

    @property
    def judged(self) -> bool:
        """Whether there are seeds enough to say what the interval shows."""
        return self.interval.n >= self.verdict_seeds

    @property
    def non_inferior(self) -> bool:
        """Whether ``first`` is shown to be worse by less than the margin, if at all."""
        return self.interval.not_below(self.margin)

    @property
    def shows(self) -> str:
        """What the interval shows, in words."""
        low, high = self.interval.low, self.interval.high
        if low is None or high is None:
            return "nothing (one seed)"
        if low > 0.0:
            return "better"
        if high < -self.margin:
            return "worse by more than the margin"
        if self.non_inferior:
            return "worse, within the margin" if high < 0.0 else "non-inferior"
        return "worse" if high < 0.0 else "undecided"

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "task": self.task,
            "seeds": self.seeds,
            "n": self.interval.n,
            "mean": self.interval.estimate,
            "ci95": self.interval.half_width,
            "low": self.interval.low,
            "high": self.interval.high,
            "margin": self.margin,
            "non_inferior": self.non_inferior if self.judged else None,
            "shows": self.shows if self.judged else None,
        }


@dataclass(frozen=True, slots=True)
class Judged:
    """A claim of the paper, with what the intervals say to it."""

    claim: Claim
    verdict: Verdict
    difference: Difference | None
    opposite: bool

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.claim.model_dump(mode="json"),
            "verdict": self.verdict,
            "opposite_found": self.opposite,
            "difference": None if self.difference is None else self.difference.document(),
            "paper_within_interval": self.paper_within,
        }

    @property
    def paper_within(self) -> bool | None:
        """Whether the paper's own difference lies in our interval; None where one of them is missing."""
        ours = None if self.difference is None else self.difference.interval
        paper = self.claim.paper_difference
        if ours is None or ours.low is None or ours.high is None or paper is None:
            return None
        return ours.low <= paper <= ours.high


def difference(
    results: Results, first: str, second: str, task: str, seeds: str, margin: float, verdict_seeds: int = 1
) -> Difference | None:
    """The paired difference of two entries; None where one did not play."""
    one, other = results.cell(first, task, seeds), results.cell(second, task, seeds)
    if one is None or other is None:
        return None
    paired = paired_difference(one.by_seed(), other.by_seed())
    return Difference(first, second, task, seeds, paired, margin, verdict_seeds)


def rows(results: Results, config: CompareConfig, paper: PaperFigures) -> list[dict[str, Any]]:
    """The table: one row per entry, task and seed set, JSON-ready."""
    made = []
    words = {entry.name: entry.paper or entry.method for entry in config.entries}
    for task, seeds in results.groups():
        planned = next((t for t in config.tasks if t.name == task), None)
        for entry in results.entries:
            cell = results.cell(entry.name, task, seeds)
            if cell is None:
                continue
            interval = mean_interval(cell.scores)
            against = difference(
                results, entry.name, results.reference, task, seeds, results.margin, config.verdict_seeds
            )
            called = words.get(entry.name, entry.method)
            figure = paper.value(planned.paper, called, entry.bits) if planned is not None else None
            made.append(
                {
                    "entry": entry.name,
                    "method": entry.method,
                    "bits": entry.bits,
                    "task": task,
                    "stress": cell.protocol.stress.described() or None,
                    "seeds": seeds,
                    "first_seed": cell.first_seed,
                    "n": len(cell.scores),
                    "mean": interval.estimate,
                    "ci95": interval.half_width,
                    "difference": None if against is None or entry.name == results.reference else against.document(),
                    "size": entry.size.model_dump(mode="json"),
                    "latency": None if entry.latency is None else entry.latency.model_dump(mode="json"),
                    "cost": entry.cost.model_dump(mode="json"),
                    "executed": entry.executed,
                    "device_executes": entry.device_executes,
                    "engines": None if cell.engines is None else {name: list(of) for name, of in cell.engines.items()},
                    "sampler": entry.sampler,
                    "denoising_steps": entry.denoising_steps,
                    "mean_episode_steps": cell.mean_steps,
                    "paper": figure,
                }
            )
    return made


def pairs(results: Results, config: CompareConfig) -> list[Difference]:
    """The named pairs, on every task and seed set that both played."""
    found = []
    for pair in config.pairs:
        for task, seeds in results.groups():
            made = difference(results, pair.first, pair.second, task, seeds, results.margin, config.verdict_seeds)
            if made is not None:
                found.append(made)
    return found


def judged(results: Results, config: CompareConfig) -> list[Judged]:
    """The paper's claims, each judged by the interval of its difference."""
    return [judge(results, claim) for claim in config.claims]


def judge(results: Results, claim: Claim) -> Judged:
    """Judge one claim.

    It is found where the whole interval lies where the claim says, and not found otherwise; the opposite is found where
    the whole interval lies on the other side.
    """
    made = difference(results, claim.first, claim.second, claim.task, claim.seeds, results.margin)
    if made is None or made.interval.low is None or made.interval.high is None:
        return Judged(claim, "not measured", made, opposite=False)
    low, high = made.interval.low, made.interval.high
    bound = -results.margin if claim.kind == "not_worse" else 0.0
    above, under = low > bound, high < bound
    is_found, opposite = (under, above) if claim.kind == "below" else (above, under)
    return Judged(claim, "found" if is_found else "not found", made, opposite)


def reproduced(ours: Results, committed: Results) -> list[dict[str, Any]]:
    """For every cell that both hold, whether our mean lies in the committed interval, JSON-ready.

    ``differs`` names the field where the two are not of the same network, start seeds or protocol; ``within`` is then
    None. Files of graphs and quantized tensors may differ in their last bits from machine to machine.
    """
    entries, others = ({e.name: e for e in results.entries} for results in (ours, committed))
    found = []
    for cell in ours.cells:
        other = committed.cell(cell.entry, cell.task, cell.seeds)
        if other is None:
            continue
        fields = [name for name, _, _ in unlike(entries[cell.entry], others[cell.entry], "artifact")]
        fields += [name for name, _, _ in unlike_cells(cell, other)]
        mean, before = mean_interval(cell.scores).estimate, mean_interval(other.scores)
        within = before.half_width is None or abs(mean - before.estimate) <= before.half_width
        found.append(
            {
                "entry": cell.entry,
                "task": cell.task,
                "seeds": cell.seeds,
                "mean": mean,
                "committed": before.estimate,
                "committed_ci95": before.half_width,
                "within": None if fields else within,
                "differs": fields[0] if fields else None,
            }
        )
    return found
