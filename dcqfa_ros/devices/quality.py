"""What the recorded scores of a bundle's variants say about choosing between them.

Scores are compared only where metric, seeds and denoising steps are the same; more is better. A variant whose score is
lower than the best one by more than the margin is never taken for its latency alone: it ranks behind every variant that
is not, whatever that one's latency. A variant without a comparable score ranks between the two, because nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dcqfa_ros.bundle.schema import BundleSpec, QualityRecord
from dcqfa_ros.devices.budget import BudgetError

MARGIN = 0.03
"""By how much a recorded score may be lower than the bundle's best one, in units of the score."""

EQUAL, UNKNOWN, LOWER = 0, 1, 2

_Conditions = tuple[str, int, int, int]  # metric, first seed, seeds, steps


@dataclass(frozen=True, slots=True)
class Quality:
    """A variant's score beside the others'.

    Attributes:
        score: the comparable recorded mean, or None.
        tier: ``EQUAL`` within the margin (or nothing is recorded at all), ``UNKNOWN`` without a comparable score,
            ``LOWER`` below the margin.
        note: why the tier is not ``EQUAL``, or empty.
    """

    score: float | None
    tier: int
    note: str = ""


def judge(spec: BundleSpec, steps: int, margin: float = MARGIN) -> dict[str, Quality]:
    """Return variant name -> quality.

    Of several sets of conditions under which variants were scored, the one at ``steps`` counts, then the one that most
    variants share, then the one with most seeds.

    Args:
        spec: the bundle.
        steps: denoising steps that will be run.
        margin: see :data:`MARGIN`; at least 0.

    Raises:
        BudgetError: the margin is negative or not finite.
    """
    if not 0.0 <= margin < float("inf"):
        raise BudgetError(f"quality_margin: expected 0 or more, got {margin}")
    scores = _scores(spec)
    if not scores:
        return {variant.name: Quality(None, EQUAL) for variant in spec.variants}
    conditions = _that_count(scores, steps)
    counted = scores[conditions]
    best = max(counted, key=lambda name: counted[name])
    against = f"that of {best} ({counted[best]:.3f}, {conditions[2]} seeds, {conditions[3]} steps)"
    return {v.name: _quality(counted.get(v.name), counted[best], margin, against) for v in spec.variants}


def scores_by_steps(spec: BundleSpec, steps: int) -> dict[tuple[str, int], float]:
    """Return (variant, steps) -> score of everything scored under the metric and seeds that count at ``steps``."""
    scores = _scores(spec)
    if not scores:
        return {}
    metric, first_seed, seeds, _ = _that_count(scores, steps)
    return {
        (name, with_steps): score
        for (*conditions, with_steps), found in scores.items()
        if conditions == [metric, first_seed, seeds]
        for name, score in found.items()
    }


def _scores(spec: BundleSpec) -> dict[_Conditions, dict[str, float]]:
    scores: dict[_Conditions, dict[str, float]] = {}
    for variant in spec.variants:
        for record in variant.quality:
            scores.setdefault(_conditions(record), {}).setdefault(variant.name, record.mean)
    return scores


def _that_count(scores: Mapping[_Conditions, Mapping[str, float]], steps: int) -> _Conditions:
    return max(scores, key=lambda c: (c[3] == steps, len(scores[c]), c[2]))


def _quality(score: float | None, best: float, margin: float, against: str) -> Quality:
    if score is None:
        return Quality(None, UNKNOWN, f"no score is recorded to compare with {against}: evaluate it (dcqfa eval)")
    lack = best - score
    if lack > margin + 1e-9:  # a difference of exactly the margin is allowed, whatever binary fractions make of it
        return Quality(
            score, LOWER, f"score {score:.3f} is {lack:.3f} below {against}, more than the margin of {margin:g}"
        )
    return Quality(score, EQUAL)


def _conditions(record: QualityRecord) -> _Conditions:
    return record.metric, record.first_seed, record.seeds, record.steps
