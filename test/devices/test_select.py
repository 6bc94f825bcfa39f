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
from dcqfa_ros.runtime.errors import EngineError

MIB = 2**20
VERSIONS = {"tensorrt": "10.3.0"}
"""Those that are not 1.31.1."""
INT4, INT8 = Bits(weight=4, activation=4, kind="int"), Bits(weight=8, activation=8, kind="int")


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
    bits = {"searched": exported, "exported": exported, "executed": executed}
    return with_variant(spec, name, layers=(spec.variant(name).layers[0].model_copy(update=bits),))


@pytest.fixture
def spec(tiny_bundle: Callable[..., Path]) -> BundleSpec:
    loaded = load_bundle(tiny_bundle()).spec
    for name in ("fp32", "w8a8"):
        loaded = with_variant(loaded, name, latency=())
    return loaded


def installed(device: Device, *names: str) -> tuple[Runtime, ...]:
    """Return the device's runtimes, of which only ``names`` (default: ONNX Runtime) are installed, all as 1.31.1."""
    found = names or ("onnxruntime",)
    return real_runtimes(device, lambda package: VERSIONS.get(package, "1.31.1") if package in found else None, bool)


def decide(
    spec: BundleSpec,
    device: Device,
    local: LocalRecords | None = None,
    *,
    ms: float = 0,
    mb: float = 0,
    packages: tuple[str, ...] = (),
    **options,
) -> Choice:
    budget = budget_for(spec, device, latency_ms=ms, memory_mb=mb)
    return choose(spec, device, budget, local, available=installed(device, *packages), **options)


def reason(choice: Choice, variant: str, runtime: str = "onnxruntime") -> str:
    return next(c.reason for c in choice.ranking if (c.variant, c.runtime) == (variant, runtime))


def order(choice: Choice) -> list[str]:
    return [c.engine for c in choice.ranking if c.accepted]


def test_an_unknown_device_gets_a_modelled_choice_and_the_commands_that_measure_it(spec, recorded) -> None:
    choice = decide(spec, recorded("cpu_vnni"))
    assert (choice.variant, choice.runtime, choice.runtime_version) == ("w8a8", "onnxruntime", "1.31.1")
    assert (choice.basis, choice.known_device) == ("modelled", False)
    assert "modelled, because there is no record of this device" in choice.reason
    assert "dcqfa bench engine --bundle tiny --steps 16 --threads 1 --save" in choice.reason
    assert (
        "'dcqfa profile --config config/training/tiny.yaml --threads 1 --out config/tables/intel_r_xeon"
        in choice.reason
    )
    assert order(choice) == ["onnxruntime/w8a8", "onnxruntime/fp32"]


def test_the_profile_command_names_the_supernet_of_the_bundle(spec, recorded) -> None:
    command = "dcqfa train --config config/training/pusht_keypoints.yaml --steps 3"
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"command": command})})
    assert "--config config/training/pusht_keypoints_supernet.yaml " in decide(spec, recorded("orin_nx_16")).reason


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
    assert (choice.variant, choice.basis, choice.known_device) == ("fp32", "measured", True)
    assert "measured p99 12.0 ms" in choice.reason
    assert "modelled" not in choice.reason


@pytest.mark.parametrize(
    "changes", [{"device": "another computer"}, {"runtime": "tensorrt 10.3"}, {"steps": 8}, {"threads": 4}]
)
def test_records_of_other_conditions_do_not_count(spec, recorded, changes: dict) -> None:
    device = recorded("cpu_vnni")
    spec = with_variant(spec, "fp32", latency=(latency(device, 0.1, **changes),))
    assert decide(spec, device).basis == "modelled"


@pytest.mark.parametrize("version", ["onnxruntime 1.30.0", "onnxruntime"])
def test_a_record_of_another_version_is_not_used_and_this_is_said(spec, recorded, version: str) -> None:
    device = recorded("cpu_vnni")
    spec = with_variant(spec, "fp32", latency=(latency(device, 0.1, runtime=version),))
    choice = decide(spec, device)
    assert (choice.variant, choice.basis) == ("w8a8", "modelled")
    text = f"0.1 ms measured with {version} are not used: onnxruntime 1.31.1 runs here"
    assert text in reason(choice, "fp32")
    newer = with_variant(spec, "fp32", latency=(latency(device, 0.1, runtime=version), latency(device, 5.0)))
    assert "not used" not in reason(decide(newer, device), "fp32")


def test_a_prediction_may_leave_the_version_open(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    record = latency(device, 3.0, kind="predicted", runtime="onnxruntime")
    choice = decide(with_variant(spec, "w8a8", latency=(record,)), device)
    assert next(c.basis for c in choice.ranking if c.variant == "w8a8") == "predicted"


def test_records_in_the_users_cache_count_for_the_same_weights_only(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    weights = spec.variant("fp32").weights
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
    assert "modelled, onnxruntime/w8a8 not measured on this device" in choice.reason
    slow = with_variant(spec, "fp32", latency=())
    slow = with_variant(slow, "w8a8", latency=(latency(device, 60.0, 80.0),))
    choice = decide(slow, device)
    assert (choice.variant, choice.basis) == ("w8a8", "modelled")
    assert "onnxruntime/fp32 not measured" in choice.reason


def test_a_variant_over_the_latency_budget_is_rejected_with_by_how_much(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    spec = with_variant(spec, "fp32", latency=(latency(device, 900.0, 950.0),))
    choice = decide(spec, device)
    assert choice.variant == "w8a8"
    assert "p99 950.0 ms" in reason(choice, "fp32")
    assert "150.0 ms over the budget of 800.0 ms (8 executed actions at 10 Hz)" in reason(choice, "fp32")


def test_a_chunk_that_takes_longer_than_a_control_period_says_that_the_arm_holds_still(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    slow = with_variant(spec, "fp32", latency=(latency(device, 300.0, 350.0),))
    assert "the arm holds still for 250 ms at each chunk" in reason(decide(slow, device), "fp32")
    fast = with_variant(spec, "fp32", latency=(latency(device, 30.0, 35.0),))
    assert "holds still" not in reason(decide(fast, device), "fp32")


def test_an_infeasible_budget_says_by_how_much_and_names_the_closest(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    spec = with_variant(spec, "fp32", latency=(latency(device, 40.0),))
    spec = with_variant(spec, "w8a8", latency=(latency(device, 15.0),))
    choice = decide(spec, device, ms=10)
    assert (choice.variant, choice.runtime, choice.basis) == (None, None, None)
    assert "the closest is w8a8 on onnxruntime: measured p50 15.0 ms" in choice.reason
    assert "5.0 ms over the budget of 10.0 ms (given)" in choice.reason
    assert next(c.excess for c in choice.ranking if c.variant == "fp32") == pytest.approx(4.0)


def test_no_variant_within_the_memory_budget_is_no_choice(spec, recorded) -> None:
    choice = decide(spec, recorded("cpu_vnni"), mb=10)
    assert (choice.variant, choice.basis) == (None, None)
    assert choice.reason.startswith("no variant fits this device; the closest is ")
    assert "81 MiB over the budget of 10 MiB (given)" in choice.reason


def test_both_budgets_are_named_where_both_are_exceeded(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    spec = with_variant(spec, "fp32", latency=(latency(device, 40.0),))
    text = reason(decide(spec, device, ms=10, mb=10), "fp32")
    assert "MiB over the budget" in text and "30.0 ms over the budget" in text


def test_memory_follows_the_size_on_disk(spec, recorded) -> None:
    size = spec.variant("fp32").size.model_copy(update={"disk_bytes": 400 * MIB})
    spec = with_variant(spec, "fp32", size=size)
    choice = decide(spec, recorded("cpu_vnni"), mb=512)
    assert choice.variant == "w8a8"
    assert "needs about 2090 MiB" in reason(choice, "fp32")


def test_memory_of_a_gpu_counts_where_it_is(spec, recorded) -> None:
    device = recorded("rtx_4090")
    size = spec.variant("fp32").size.model_copy(update={"disk_bytes": 7000 * MIB})
    choice = decide(with_variant(spec, "fp32", size=size), device, packages=("tensorrt",))
    assert "needs about 14300 MiB on the GPU, 2250 MiB over the budget of 12050 MiB" in reason(
        choice, "fp32", "tensorrt"
    )
    shared = decide(spec, recorded("orin_nx_8"), packages=("tensorrt",)).ranking[0]
    assert shared.memory_bytes >= 1000 * MIB and shared.gpu_memory_bytes == 0


def test_executed_bits_decide_over_exported_ones(spec, recorded) -> None:
    device = recorded("cpu_arm")
    assert decide(with_layers(spec, "w8a8", INT8, {}), device).variant == "fp32"
    as_float = {"onnxruntime": Bits(weight=32, activation=32, kind="float")}
    choice = decide(with_layers(spec, "w8a8", INT8, as_float), device)
    assert set(order(choice)) == {"onnxruntime/fp32", "onnxruntime/w8a8"}
    assert "executes W8A8 as FP32" in reason(choice, "w8a8")


def test_4_bit_activations_run_in_8_bit_containers_and_this_is_said(spec, recorded) -> None:
    choice = decide(with_layers(spec, "w8a8", INT4, {}), recorded("cpu_vnni"))
    assert choice.variant == "w8a8"
    assert "executes W4A4 as W8A8" in choice.reason
    refused = decide(with_layers(spec, "w8a8", INT4, {}), recorded("cpu_arm"))
    assert refused.variant == "fp32"
    assert "W4A4" in reason(refused, "w8a8")


def test_executed_bits_that_the_gpu_refuses_are_refused_by_name(spec, recorded) -> None:
    fp8 = Bits(weight=8, activation=8, kind="float")
    spec = with_layers(spec, "w8a8", fp8, {"tensorrt": fp8})
    choice = decide(spec, recorded("orin_nx_16"), packages=("tensorrt",))
    assert order(choice) == ["tensorrt/fp32"]
    text = "layer blocks.0.mlp: FP8: needs compute capability 8.9, this GPU has 8.7"
    assert reason(choice, "w8a8", "tensorrt") == text


def test_a_choice_that_compares_with_predictions_says_so(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    spec = with_variant(spec, "w8a8", latency=(latency(device, 1.0, kind="predicted"),))
    assert decide(spec, device).basis == "modelled"
    spec = with_variant(spec, "fp32", latency=(latency(device, 30.0),))
    choice = decide(spec, device)
    assert (choice.variant, choice.basis) == ("w8a8", "predicted")
    assert "predicted, onnxruntime/w8a8 not measured" in choice.reason
    spec = with_variant(spec, "w8a8", latency=(latency(device, 1.0, kind="predicted"), latency(device, 40.0)))
    assert (decide(spec, device).variant, decide(spec, device).basis) == ("fp32", "measured")


def test_the_runtime_is_chosen_with_the_variant(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    choice = decide(spec, device, packages=("onnxruntime", "openvino"))
    assert (choice.variant, choice.runtime) == ("w8a8", "openvino")
    measured = with_variant(
        spec,
        "w8a8",
        latency=(latency(device, 9.0), latency(device, 12.0, runtime="openvino 1.31.1")),
    )
    choice = decide(measured, device, packages=("onnxruntime", "openvino"))
    assert (choice.variant, choice.runtime) == ("w8a8", "onnxruntime")
    assert choice.runtime_of("fp32") == "onnxruntime"


def test_a_runtime_of_which_nothing_is_known_ranks_behind_a_measured_one(spec, recorded) -> None:
    device = recorded("rtx_4090")
    packages = ("onnxruntime", "tensorrt")
    spec = with_variant(spec, "w8a8", latency=(latency(device, 9.0),))
    choice = decide(spec, device, packages=packages)
    assert order(choice)[:2] == ["onnxruntime/w8a8", "onnxruntime/fp32"]
    assert "nothing is measured here on tensorrt, which therefore rank last" in choice.reason
    on_gpu = (latency(device, 9.0), latency(device, 2.0, runtime="tensorrt 10.3.0", threads=4))
    assert decide(with_variant(spec, "w8a8", latency=on_gpu), device, packages=packages).runtime == "tensorrt"


def test_a_runtime_that_nobody_has_executed_ranks_behind_and_says_so(spec, recorded) -> None:
    device = recorded("rtx_4090")
    packages = ("onnxruntime", "tensorrt")
    choice = decide(spec, device, packages=packages)
    assert [c.runtime for c in choice.ranking] == ["onnxruntime", "onnxruntime", "tensorrt", "tensorrt"]
    assert choice.ranking[2].relative_time < choice.ranking[0].relative_time
    assert "nothing is measured here on tensorrt, which therefore rank last" in choice.reason
    caveat = "tensorrt was compiled, never executed by its authors"
    assert caveat in reason(choice, "w8a8", "tensorrt")
    alone = decide(spec, device, packages=("tensorrt",))
    assert alone.runtime == "tensorrt"
    assert caveat in alone.reason
    measured = with_variant(spec, "fp32", latency=(latency(device, 2.0, runtime="tensorrt 10.3.0"),))
    choice = decide(measured, device, packages=packages)
    assert choice.runtime == "tensorrt"
    assert caveat not in reason(choice, "w8a8", "tensorrt")


def test_layers_in_fp32_of_a_reduced_variant_run_in_fp16_on_a_gpu_and_this_is_said(spec, recorded) -> None:
    fp32 = Bits(weight=32, activation=32, kind="float")
    layer = spec.variant("w8a8").layers[0]
    head = layer.model_copy(update={"layer": "head", "searched": fp32, "exported": fp32, "executed": {}})
    mixed = with_variant(with_layers(spec, "w8a8", INT8, {}), "w8a8", layers=(layer, head))
    choice = decide(mixed, recorded("rtx_4090"), packages=("onnxruntime", "tensorrt", "torch"))
    for name in ("tensorrt", "torch_cuda"):
        assert "executes FP32 as FP16" in reason(choice, "w8a8", name)
        assert "executes FP32 as FP16" not in reason(choice, "fp32", name)
    assert "executes FP32" not in reason(choice, "w8a8")
    recorded_bits = head.model_copy(update={"executed": {"tensorrt": fp32}})
    kept = decide(
        with_variant(mixed, "w8a8", layers=(layer, recorded_bits)), recorded("rtx_4090"), packages=("tensorrt",)
    )
    assert "executes FP32" not in reason(kept, "w8a8", "tensorrt")


def test_only_the_given_runtime_is_considered(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    choice = decide(spec, device, packages=("onnxruntime", "openvino"), runtime="onnxruntime")
    assert {c.runtime for c in choice.ranking} == {"onnxruntime"}
    missing = decide(spec, device, runtime="openvino")
    assert missing.variant is None
    assert "openvino: the Python package openvino is not installed: pip install --no-deps" in missing.reason
    with pytest.raises(EngineError, match="runtime 'tensorflow' is unknown; there are onnxruntime"):
        decide(spec, device, runtime="tensorflow")


def test_without_a_runtime_nothing_is_chosen_and_each_says_why(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    choice = choose(spec, device, budget_for(spec, device), available=real_runtimes(device, lambda _: None))
    assert choice.variant is None
    assert "onnxruntime is not installed" in choice.reason
    assert set(choice.left_out) == {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torch_cuda"}


def test_equal_latencies_are_ordered_by_what_is_known_then_size_then_default(spec, recorded) -> None:
    device = recorded("cpu_vnni")
    tie = with_variant(spec, "fp32", latency=(latency(device, 10.0),))
    tie = with_variant(tie, "w8a8", latency=(latency(device, 10.0, kind="predicted"),))
    assert order(decide(tie, device)) == ["onnxruntime/fp32", "onnxruntime/w8a8"], "measured before predicted"
    tie = with_variant(tie, "w8a8", latency=(latency(device, 10.0),))
    assert decide(tie, device).variant == "fp32", "of equal size: the bundle's default"
    assert decide(tie.model_copy(update={"default_variant": "w8a8"}), device).variant == "w8a8"
    smaller = tie.variant("w8a8").size.model_copy(update={"disk_bytes": 48})
    assert decide(with_variant(tie, "w8a8", size=smaller), device).variant == "w8a8"
    assert len({decide(tie, device).reason for _ in range(3)}) == 1


def test_budgets_derive_from_rate_chunk_and_free_memory(spec, recorded) -> None:
    budget = budget_for(spec, recorded("cpu_vnni"), control_rate=20.0)
    assert (budget.latency_ms, budget.period_ms, budget.memory_bytes) == (400.0, 50.0, int(10.5 * 2**30))
    assert budget.gpu_memory_bytes is None
    assert budget_for(spec, recorded("unknown")).memory_bytes is None
    given_budget = budget_for(spec, recorded("cpu_avx2"), latency_ms=50, memory_mb=256)
    assert (given_budget.latency_ms, given_budget.memory_bytes) == (50, 256 * MIB)
    assert budget_for(spec, recorded("rtx_4090")).gpu_memory_bytes == 12050 * MIB


@pytest.mark.parametrize(
    ("field", "value"), [("control_rate", -1.0), ("latency_ms", float("nan")), ("memory_mb", -3.0)]
)
def test_senseless_budgets_are_refused_by_name(spec, recorded, field: str, value: float) -> None:
    with pytest.raises(BudgetError, match=field):
        budget_for(spec, recorded("cpu_vnni"), **{field: value})


@pytest.mark.parametrize("options", [{"steps": 101}, {"steps": -1}, {"threads": 0}, {"quality_margin": -0.1}])
def test_senseless_conditions_are_refused(spec, recorded, options: dict) -> None:
    device = recorded("cpu_vnni")
    with pytest.raises(BudgetError, match=next(iter(options))):
        choose(spec, device, budget_for(spec, device), **options)


@pytest.mark.parametrize("device", ["orin_nx_8", "rtx_4090", "h200", "unknown"])
def test_a_choice_is_plain_json(spec, recorded, device: str) -> None:
    choice = decide(spec, recorded(device), packages=("onnxruntime", "tensorrt", "torch"))
    document = json.loads(json.dumps(choice.as_dict()))
    assert document["device"] == recorded(device).fingerprint
    assert document["ranking"][0]["variant"] == document["variant"]
    assert document["ranking"][0]["runtime"] == document["runtime"]


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
    assert not same or same[0] <= min(same) + 1e-4
