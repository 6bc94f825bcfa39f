"""A variant is not taken for its latency where its score is lower than the best one by more than the margin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.schema import BundleSpec, QualityRecord
from dcqfa_ros.devices.budget import BudgetError
from dcqfa_ros.devices.capabilities import runtimes
from dcqfa_ros.devices.quality import EQUAL, LOWER, UNKNOWN, judge
from dcqfa_ros.devices.select import Choice, budget_for, choose


def scored(spec: BundleSpec, **scores: float | None) -> BundleSpec:
    """Return ``spec`` with the scores of its variants replaced; None: without one."""
    return with_records(spec, **{name: () if s is None else (record(s),) for name, s in scores.items()})


def with_records(spec: BundleSpec, **records: tuple[QualityRecord, ...]) -> BundleSpec:
    variants = tuple(v.model_copy(update={"quality": records.get(v.name, v.quality)}) for v in spec.variants)
    return spec.model_copy(update={"variants": variants})


def record(mean: float, **changes) -> QualityRecord:
    values = {"metric": "coverage", "ci95": 0.05, "first_seed": 0, "seeds": 50, "steps": 16, "command": "dcqfa eval"}
    return QualityRecord(mean=mean, **(values | changes))


@pytest.fixture
def spec(tiny_bundle: Callable[..., Path]) -> BundleSpec:
    return load_bundle(tiny_bundle()).spec


@pytest.fixture
def decide(recorded) -> Callable[..., Choice]:
    def decide(spec: BundleSpec, device: str = "cpu_vnni", **options) -> Choice:
        found = recorded(device)
        available = runtimes(found, lambda package: "1.31.1" if package == "onnxruntime" else None)
        return choose(spec, found, budget_for(spec, found), available=available, **options)

    return decide


def tiers(spec: BundleSpec, **options) -> dict[str, int]:
    return {name: quality.tier for name, quality in judge(spec, 16, **options).items()}


@pytest.mark.parametrize(("fp32", "w8a8", "chosen"), [(0.90, 0.87, "w8a8"), (0.90, 0.86, "fp32"), (0.8, 0.9, "w8a8")])
def test_a_faster_variant_is_taken_within_the_margin_only(spec, decide, fp32: float, w8a8: float, chosen: str) -> None:
    assert decide(scored(spec, fp32=fp32, w8a8=w8a8)).variant == chosen


def test_the_reason_names_both_scores_the_difference_and_the_margin(spec, decide) -> None:
    choice = decide(scored(spec, fp32=0.90, w8a8=0.80))
    text = next(c.reason for c in choice.ranking if c.variant == "w8a8")
    assert "score 0.800 is 0.100 below that of fp32 (0.900, 50 seeds, 16 steps), more than the margin of 0.03" in text
    assert "not chosen for latency alone: onnxruntime/w8a8" in choice.reason


def test_a_lower_score_is_taken_where_nothing_better_runs_and_this_is_said(spec, decide) -> None:
    choice = decide(scored(spec, fp32=0.5, w8a8=0.9), "cpu_arm")
    assert choice.variant == "fp32"
    assert "score 0.500 is 0.400 below that of w8a8" in choice.reason


def test_the_margin_can_be_set(spec, decide) -> None:
    spec = scored(spec, fp32=0.90, w8a8=0.80)
    assert decide(spec, quality_margin=0.2).variant == "w8a8"
    assert tiers(spec, margin=0.0)["w8a8"] == LOWER
    with pytest.raises(BudgetError, match="quality_margin"):
        judge(spec, 16, float("nan"))


def test_an_unscored_variant_ranks_behind_scored_ones_and_before_lower_ones(spec, decide) -> None:
    spec = scored(spec, fp32=0.90, w8a8=None)
    assert tiers(spec) == {"fp32": EQUAL, "w8a8": UNKNOWN}
    choice = decide(spec)
    assert choice.variant == "fp32"
    text = next(c.reason for c in choice.ranking if c.variant == "w8a8")
    assert "no score is recorded to compare with that of fp32" in text
    third = spec.variant("w8a8").model_copy(update={"name": "low", "quality": (record(0.1),)})
    spec = spec.model_copy(update={"variants": (*spec.variants, third)})
    assert [c.variant for c in decide(spec).ranking] == ["fp32", "w8a8", "low"]


def test_without_any_score_latency_decides(spec, decide) -> None:
    spec = scored(spec, fp32=None, w8a8=None)
    assert tiers(spec) == {"fp32": EQUAL, "w8a8": EQUAL}
    assert decide(spec).variant == "w8a8"


def test_scores_of_other_conditions_are_not_compared(spec) -> None:
    other = with_records(spec, fp32=(record(0.9),), w8a8=(record(0.1, metric="something else"),))
    assert sorted(tiers(other).values()) == [EQUAL, UNKNOWN]
    at_steps = with_records(
        spec, fp32=(record(0.9), record(0.6, steps=8)), w8a8=(record(0.5), record(0.6, steps=8, seeds=100))
    )
    assert tiers(at_steps) == {"fp32": EQUAL, "w8a8": LOWER}, "those at the steps that are run count"
    more = with_records(spec, fp32=(record(0.9),), w8a8=(record(0.5), record(0.99, seeds=500)))
    assert tiers(more) == {"fp32": EQUAL, "w8a8": LOWER}, "those that most variants share count"
