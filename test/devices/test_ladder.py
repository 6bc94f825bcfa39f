"""The ladder holds what saves time or memory, by recorded quality; unrecorded steps only where they are allowed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.devices.budget import BudgetError, budget_for
from dcqfa_ros.devices.capabilities import runtimes
from dcqfa_ros.devices.detect import Device
from dcqfa_ros.devices.ladder import Ladder, build_ladder
from dcqfa_ros.devices.select import choose
from test.conftest import make_files, make_spec

SCORES = {("fp32", 16): 0.60, ("fp32", 8): 0.58, ("w8a8", 16): 0.56, ("w8a8", 8): 0.55, ("w8a8", 4): 0.2}


def spec_with(device: Device, scores: dict[tuple[str, int], float], times: dict[str, float]) -> BundleSpec:
    document = make_spec(make_files()).model_dump(mode="json")
    for variant in document["variants"]:
        name, size = variant["name"], 40 if variant["name"] == "fp32" else 10
        quality = variant["quality"][0]
        variant["quality"] = [
            quality | {"mean": score, "steps": steps} for (of, steps), score in scores.items() if of == name
        ]
        latency: dict[str, Any] = variant["latency"][0] | {"device": device.fingerprint, "kind": "predicted"}
        variant["latency"] = [latency | {"p50_ms": times[name], "p99_ms": times[name]}] if name in times else []
        variant["size"]["disk_bytes"] = size << 20
    return BundleSpec.model_validate(document)


def make(device: Device, scores: dict[tuple[str, int], float] = SCORES, times=None, **options: Any) -> Ladder:
    spec = spec_with(device, scores, {"fp32": 40.0, "w8a8": 20.0} if times is None else times)
    budget = budget_for(spec, device, latency_ms=100.0)
    choice = choose(spec, device, budget, runtime="onnxruntime")
    return build_ladder(spec, device, budget, choice=choice, runtime="onnxruntime", **options)


def rungs(ladder: Ladder) -> list[tuple[str, int, float]]:
    return [(r.variant, r.steps, r.cost) for r in ladder.rungs]


def test_the_choice_comes_first_and_the_rest_by_recorded_quality(recorded) -> None:
    ladder = make(recorded("cpu_vnni"), steps_allowed=[16, 8, 4])
    assert rungs(ladder) == [("fp32", 16, 40.0), ("fp32", 8, 20.0), ("w8a8", 16, 20.0), ("w8a8", 8, 10.0)]
    assert (ladder.in_ms, ladder.budget_ms, ladder.period_ms) == (True, 100.0, 100.0)
    assert [r.score for r in ladder.rungs] == [0.60, 0.58, 0.56, 0.55]
    assert "0.400 below the best, more than 0.1" in ladder.left_out["onnxruntime/w8a8 with 4 steps"]
    assert "no score is recorded with 4 steps" in ladder.left_out["onnxruntime/fp32 with 4 steps"]


def test_without_allowed_steps_only_variants_are_exchanged(recorded) -> None:
    assert [(r.variant, r.steps) for r in make(recorded("cpu_vnni")).rungs] == [("fp32", 16), ("w8a8", 16)]


def test_unrecorded_steps_come_last_where_the_operator_allows_them(recorded) -> None:
    ladder = make(recorded("cpu_vnni"), steps_allowed=[4], allow_unrecorded=True)
    assert [(r.variant, r.steps) for r in ladder.rungs] == [("fp32", 16), ("w8a8", 16), ("fp32", 4)]
    assert ladder.rungs[-1].score is None


def test_what_is_worse_by_more_than_the_margin_is_left_out(recorded) -> None:
    ladder = make(recorded("cpu_vnni"), load_margin=0.01)
    assert [r.variant for r in ladder.rungs] == ["fp32"]


def test_what_saves_nothing_is_left_out(recorded) -> None:
    scores = {("fp32", 16): 0.6, ("w8a8", 16): 0.6}
    ladder = make(recorded("cpu_vnni"), scores)
    assert [r.variant for r in ladder.rungs] == ["w8a8"], "the choice is the fastest of equal quality"
    assert "saves neither time nor memory" in ladder.left_out["onnxruntime/fp32 with 16 steps"]


def test_without_latencies_costs_are_modelled_and_compare_with_each_other(recorded) -> None:
    ladder = make(recorded("cpu_vnni"), times={}, steps_allowed=[8])
    assert not ladder.in_ms
    cost = {(r.variant, r.steps): r.cost for r in ladder.rungs}
    assert cost["fp32", 8] == pytest.approx(cost["fp32", 16] / 2)
    assert cost["w8a8", 16] < cost["fp32", 16]


def test_of_two_runtimes_of_one_variant_the_better_ranked_one_comes_first(recorded) -> None:
    device = recorded("cpu_vnni")
    spec = spec_with(device, SCORES, {"fp32": 40.0, "w8a8": 20.0})
    budget = budget_for(spec, device, latency_ms=100.0)
    found = [dataclasses.replace(r, unavailable=None) for r in runtimes(device) if r.runs_on == "cpu"]
    choice = choose(spec, device, budget, available=found)
    ladder = build_ladder(spec, device, budget, choice=choice, steps_allowed=[8], available=found)
    ranked = [c.engine for c in choice.ranking if c.accepted and c.variant == "w8a8"]
    assert [r.engine for r in ladder.rungs if (r.variant, r.steps) == ("w8a8", 8)] == ranked
    assert len(ranked) == 2
    scores = [r.score or 0.0 for r in ladder.rungs]
    assert scores == sorted(scores, reverse=True)


def test_a_device_on_which_nothing_fits_has_an_empty_ladder(recorded) -> None:
    device = recorded("cpu_vnni")
    spec = spec_with(device, SCORES, {})
    budget = budget_for(spec, device, memory_mb=1.0)
    choice = choose(spec, device, budget, runtime="onnxruntime")
    assert build_ladder(spec, device, budget, choice=choice, steps_allowed=[8]).rungs == ()


@pytest.mark.parametrize("options", [{"steps_allowed": [0]}, {"steps_allowed": [101]}, {"load_margin": -1.0}])
def test_values_out_of_range_are_refused(recorded, options: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match=next(iter(options))):
        make(recorded("cpu_vnni"), **options)
