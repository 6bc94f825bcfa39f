"""The selector takes the fastest variant the device executes within its budgets and says why, for each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.schema import Bits, BundleSpec, LatencyRecord
from dcqfa_ros.devices.capabilities import Runtime
from dcqfa_ros.devices.capabilities import runtimes as real_runtimes
from dcqfa_ros.devices.detect import Device
from dcqfa_ros.devices.records import LocalRecord, LocalRecords
from dcqfa_ros.devices.select import BudgetError, Choice, budget_for, choose

MIB = 2**20


def latency(this: Device, p50: float, p99: float | None = None, **changes) -> LatencyRecord:
    values = {
        "device": this.fingerprint,
        "runtime": "onnxruntime 1.31.1",
        "kind": "measured",
        "threads": 1,
        "steps": 16,
        "p50_ms": p50,
        "p99_ms": p99,
        "command": "dcqfa bench engine",
    }
    return LatencyRecord(**(values | changes))


def with_variant(spec: BundleSpec, name: str, **changes) -> BundleSpec:
    """Return ``spec`` with fields of one variant replaced."""
    variants = tuple(v.model_copy(update=changes) if v.name == name else v for v in spec.variants)
    return spec.model_copy(update={"variants": variants})


def with_layers(spec: BundleSpec, name: str, exported: Bits, executed: dict[str, Bits]) -> BundleSpec:
    layer = spec.variant(name).layers[0].model_copy(update={"exported": exported, "executed": executed})
    return with_variant(spec, name, layers=(layer,))


@pytest.fixture
def spec(tiny_bundle: Callable[..., Path]) -> BundleSpec:
    loaded = load_bundle(tiny_bundle()).spec
    for name in ("fp32", "w8a8"):
        loaded = with_variant(loaded, name, latency=())
    return loaded


def installed(device: Device) -> tuple[Runtime, ...]:
    return real_runtimes(device, lambda _: "1.31.1")


def decide(
    spec: BundleSpec, device: Device, local: LocalRecords | None = None, *, ms: float = 0, mb: float = 0
) -> Choice:
    budget = budget_for(spec, device, latency_ms=ms, memory_mb=mb)
    return choose(spec, device, budget, local, available=installed(device))


def reason(choice: Choice, variant: str) -> str:
    return next(c.reason for c in choice.ranking if c.variant == variant)


def test_without_measurements_the_ranking_is_modelled_and_says_how_to_measure(spec, recorded) -> None:
    choice = decide(spec, recorded("cpu_vnni"))
    assert (choice.variant, choice.basis) == ("w8a8", "modelled")
    assert "modelled" in choice.reason
    assert "dcqfa bench engine --bundle tiny --steps 16 --threads 1 --save" in choice.reason
    assert [c.variant for c in choice.ranking] == ["w8a8", "fp32"]


def test_a_precision_the_processor_cannot_execute_is_never_chosen(spec, recorded) -> None:
    choice = decide(spec, recorded("cpu_arm"))
    assert choice.variant == "fp32"
    assert "8-bit dot product" in reason(choice, "w8a8")
    assert "blocks.0.mlp" in reason(choice, "w8a8")


def test_measurements_on_this_device_beat_the_model(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    spec = with_variant(spec, "fp32", latency=(latency(device, 10.0, 12.0),))
    spec = with_variant(spec, "w8a8", latency=(latency(device, 20.0, 25.0),))
    choice = decide(spec, device)
    assert (choice.variant, choice.basis) == ("fp32", "measured")
    assert "measured p99 12.0 ms" in choice.reason
    assert "profile it" not in choice.reason


@pytest.mark.parametrize(
    "changes", [{"device": "another computer"}, {"runtime": "tensorrt 10.3"}, {"steps": 8}, {"threads": 4}]
)
def test_records_of_other_conditions_do_not_count(spec, recorded, changes: dict) -> None:
    device = recorded("cpu_vnni")
    spec = with_variant(spec, "fp32", latency=(latency(device, 0.1, **changes),))
    assert decide(spec, device).basis == "modelled"


def test_records_in_the_users_cache_count_for_the_same_weights_only(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    weights = spec.variant("fp32").files["denoiser"].sha256
    own = LocalRecord(variant="fp32", weights=weights, record=latency(device, 5.0, 6.0))
    foreign = LocalRecord(variant="w8a8", weights="0" * 64, record=latency(device, 1.0, 1.0))
    choice = decide(spec, device, LocalRecords(records=(own, foreign)))
    basis = {c.variant: c.basis for c in choice.ranking}
    assert basis == {"fp32": "measured", "w8a8": "modelled"}


def test_a_measured_variant_does_not_beat_one_that_nobody_has_measured(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    spec = with_variant(spec, "fp32", latency=(latency(device, 50.0, 60.0),))
    choice = decide(spec, device)
    assert (choice.variant, choice.basis) == ("w8a8", "modelled")
    assert choice.ranking[0].latency_ms == pytest.approx(60.0 * 0.33)
    assert "scaled from fp32 (measured)" in reason(choice, "w8a8")
    assert "modelled, w8a8 not measured on this device" in choice.reason
    slow = with_variant(spec, "fp32", latency=())
    slow = with_variant(slow, "w8a8", latency=(latency(device, 60.0, 80.0),))
    choice = decide(slow, device)
    assert (choice.variant, choice.basis) == ("w8a8", "modelled")
    assert "fp32 not measured" in choice.reason


def test_a_variant_over_the_latency_budget_is_rejected_with_both_figures(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    spec = with_variant(spec, "fp32", latency=(latency(device, 900.0, 950.0),))
    choice = decide(spec, device)
    assert choice.variant == "w8a8"
    assert "950.0 ms" in reason(choice, "fp32")
    assert "100.0 ms (one control period at 10 Hz)" in reason(choice, "fp32")


def test_no_variant_within_budget_is_no_choice(spec, recorded) -> None:
    choice = decide(spec, recorded("cpu_vnni"), mb=10)
    assert (choice.variant, choice.basis) == (None, None)
    assert choice.reason.startswith("no variant fits this device")
    assert choice.reason.count("the budget is 10 MiB") == 2


def test_memory_follows_the_size_on_disk(spec, recorded) -> None:
    size = spec.variant("fp32").size.model_copy(update={"disk_bytes": 400 * MIB})
    spec = with_variant(spec, "fp32", size=size)
    choice = decide(spec, recorded("cpu_vnni"), mb=512)
    assert choice.variant == "w8a8"
    assert "needs about 2090 MiB" in reason(choice, "fp32")


def test_executed_bits_decide_over_exported_ones(spec, recorded) -> None:
    int4, int8 = Bits(weight=4, activation=4, kind="int"), Bits(weight=8, activation=8, kind="int")
    device = recorded("cpu_vnni")
    assert decide(with_layers(spec, "w8a8", int4, {"onnxruntime": int8}), device).variant == "w8a8"
    refused = decide(with_layers(spec, "w8a8", int4, {}), device)
    assert refused.variant == "fp32"
    assert "4-bit activations" in reason(refused, "w8a8")


def test_a_choice_that_compares_with_predictions_says_so(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    spec = with_variant(spec, "w8a8", latency=(latency(device, 1.0, kind="predicted"),))
    assert decide(spec, device).basis == "modelled"
    spec = with_variant(spec, "fp32", latency=(latency(device, 30.0),))
    choice = decide(spec, device)
    assert (choice.variant, choice.basis) == ("w8a8", "predicted")
    assert "predicted, w8a8 not measured" in choice.reason
    spec = with_variant(spec, "w8a8", latency=(latency(device, 1.0, kind="predicted"), latency(device, 40.0)))
    assert (decide(spec, device).variant, decide(spec, device).basis) == ("fp32", "measured")


def test_without_a_runtime_nothing_is_chosen(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    choice = choose(spec, device, budget_for(spec, device), available=real_runtimes(device, lambda _: None))
    assert choice.variant is None
    assert "onnxruntime is not installed" in choice.reason


def test_budgets_derive_from_rate_chunk_and_free_memory(spec, recorded) -> None:
    budget = budget_for(spec, recorded("cpu_vnni"), control_rate=20.0)
    assert (budget.latency_ms, budget.memory_bytes) == (50.0, int(10.5 * 2**30))
    assert budget_for(spec, recorded("unknown")).memory_bytes is None
    given_budget = budget_for(spec, recorded("cpu_avx2"), latency_ms=50, memory_mb=256)
    assert (given_budget.latency_ms, given_budget.memory_bytes) == (50, 256 * MIB)


@pytest.mark.parametrize(
    ("field", "value"), [("control_rate", -1.0), ("latency_ms", float("nan")), ("memory_mb", -3.0)]
)
def test_senseless_budgets_are_refused_by_name(spec, recorded, field: str, value: float) -> None:
    with pytest.raises(BudgetError, match=field):
        budget_for(spec, recorded("cpu_vnni"), **{field: value})


@pytest.mark.parametrize("options", [{"steps": 101}, {"steps": -1}, {"threads": 0}])
def test_senseless_conditions_are_refused(spec, recorded, options: dict) -> None:
    device = recorded("cpu_vnni")
    with pytest.raises(BudgetError, match=next(iter(options))):
        choose(spec, device, budget_for(spec, device), **options)


def test_a_choice_is_plain_json(spec, recorded) -> None:
    document = json.loads(json.dumps(decide(spec, recorded("orin_nx_8")).as_dict()))
    assert document["variant"] == "w8a8"
    assert document["device"].startswith("Jetson Orin NX 8 GB")


@given(st.lists(st.tuples(st.floats(0.1, 2000), st.sampled_from(["measured", "predicted"])), min_size=2, max_size=2))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_choice_is_never_slower_than_another_accepted_variant_of_its_kind(spec, recorded, records) -> None:
    device = recorded("cpu_vnni")
    for name, (p50, kind) in zip(("fp32", "w8a8"), records, strict=True):
        spec = with_variant(spec, name, latency=(latency(device, p50, kind=kind),))
    choice = decide(spec, device)
    accepted = [c for c in choice.ranking if c.accepted]
    assert all(c.latency_ms is not None and c.latency_ms <= choice.budget.latency_ms for c in accepted)
    assert (choice.variant is None) == (not accepted)
    same = [c.latency_ms for c in accepted if c.basis == choice.basis and c.latency_ms is not None]
    assert not same or same[0] == min(same)
