"""Samples hold what policy and arm report, each latency once; malformed reports are ignored with one warning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.devices.health import Health, Temperature
from dcqfa_ros.ros.diagnostics import Report, Status
from dcqfa_ros.ros.watch_samples import FRESH_S, Refusal, SampleCollector

HEALTH = Health((Temperature("cpu", 60.0, 99.0),), False, (), None, 2**30, (), 0.5, 2, 0.0, 0.0, ())


def report(node: str, name: str, **values: object) -> Report:
    return Report(node, f"/{node}", Status(0, name, "", {key: str(value) for key, value in values.items()}))


def policy(count: int, recent: str, **values: object) -> Report:
    told = {"engine": "onnxruntime/fp32", "requested": "auto", "steps": 16, "steps_requested": 0, "chunks": count}
    told |= {"inference_p50_ms": "20.0", "inference_count": count, "inference_recent_ms": recent}
    return report("policy_node", "policy", **(told | values))


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def collector(warnings: list[str]) -> SampleCollector:
    return SampleCollector(warnings.append)


def test_each_latency_is_told_once(collector: SampleCollector) -> None:
    collector.take(policy(2, "9 9"), 0.0)
    collector.take(policy(4, "9 9 10 11"), 1.0)
    sample = collector.sample(1.1, HEALTH)
    assert (sample.engine, sample.steps, sample.latencies_ms) == ("onnxruntime/fp32", 16, (10.0, 11.0))
    assert (sample.pinned, sample.steps_pinned) == ("", False)
    assert (sample.temperature_c, sample.temperature_limit_c, sample.memory_free_bytes) == (60.0, 99.0, 2**30)
    assert collector.sample(1.2, HEALTH).latencies_ms == ()


def test_latencies_around_an_exchange_belong_to_nobody(collector: SampleCollector) -> None:
    collector.take(policy(0, ""), 0.0)
    collector.take(policy(1, "50"), 1.0)
    collector.take(policy(3, "50 50 9", engine="onnxruntime/w8a8"), 2.0)
    assert collector.sample(2.1, HEALTH).latencies_ms == ()
    collector.take(policy(4, "50 50 9 8", engine="onnxruntime/w8a8"), 3.0)
    assert collector.sample(3.1, HEALTH).latencies_ms == (8.0,)
    collector.take(policy(5, "50 50 9 8 4", engine="onnxruntime/w8a8", steps=8), 4.0)
    assert collector.sample(4.1, HEALTH).latencies_ms == ()


def test_a_policy_that_tells_percentiles_only_is_heard_by_its_median(collector: SampleCollector) -> None:
    values = {"engine": "onnxruntime/fp32", "requested": "auto", "inference_p50_ms": "20.0"}
    collector.take(report("policy_node", "policy", chunks=7, **values), 0.0)
    collector.take(report("policy_node", "policy", chunks=9, **values), 1.0)
    sample = collector.sample(1.1, HEALTH)
    assert (sample.latencies_ms, sample.steps, collector.per_chunk) == ((20.0, 20.0), None, False)
    collector.take(report("policy_node", "policy", chunks=1, **values), 2.0)  # another episode
    assert collector.sample(2.1, HEALTH).latencies_ms == (20.0,)


def test_pins_are_told(collector: SampleCollector) -> None:
    collector.take(policy(0, "", requested="fp32", steps_requested=16), 0.0)
    sample = collector.sample(0.1, HEALTH)
    assert "pinned to 'fp32'" in sample.pinned
    assert sample.steps_pinned


@pytest.mark.parametrize(("key", "starved"), [("starved_ticks", 5), ("starved", 5), ("other", None)])
def test_the_arm_of_any_cell_is_understood(collector: SampleCollector, key: str, starved: int | None) -> None:
    collector.take(report("arm_node", "arm", ticks=100, missed_ticks=3, **{key: 5}), 0.0)
    sample = collector.sample(0.1, HEALTH)
    assert (sample.ticks, sample.missed, sample.starved) == (100, 3, starved)


def test_who_is_silent_is_not_heard(collector: SampleCollector) -> None:
    collector.take(policy(0, ""), 0.0)
    collector.take(report("arm_node", "arm", ticks=1, missed_ticks=0), 0.0)
    assert collector.sample(FRESH_S - 0.1, HEALTH).engine
    sample = collector.sample(FRESH_S + 0.1, HEALTH)
    assert (sample.engine, sample.steps, sample.ticks) == ("", None, None)


def test_a_node_that_is_not_configured_is_not_heard(collector: SampleCollector) -> None:
    collector.take(policy(0, ""), 0.0)
    collector.take(report("policy_node", "policy"), 0.5)
    collector.take(report("arm_node", "arm"), 0.5)
    sample = collector.sample(0.6, HEALTH)
    assert (sample.engine, sample.ticks) == ("", None)


def test_a_failed_exchange_is_a_refusal_and_one_that_was_overtaken_is_not(collector: SampleCollector) -> None:
    values = {"swap_id": 3, "requested": "w8a8", "runtime": "onnxruntime", "reason": "out of memory"}
    assert collector.take(report("policy_node", "event", outcome="failed", **values), 0.0) == Refusal(
        "onnxruntime/w8a8", "out of memory"
    )
    for outcome in ("switched", "superseded"):
        assert collector.take(report("policy_node", "event", outcome=outcome, **values), 0.0) is None
    assert collector.take(report("arm_node", "event", outcome="failed", **values), 0.0) is None


def test_malformed_reports_are_warned_of_once_and_change_nothing(
    collector: SampleCollector, warnings: list[str]
) -> None:
    collector.take(policy(0, ""), 0.0)
    for _ in range(3):
        collector.take(policy(1, "9 9 9"), 0.5)
        collector.take(policy(1, "9", chunks="many"), 0.5)
        collector.take(policy(1, "9", steps=-4), 0.5)
        collector.take(report("arm_node", "arm", ticks=-1, missed_ticks=0), 0.5)
        collector.take(report("policy_node", "event", swap_id=1, outcome="failed"), 0.5)
    assert [text.split(" ignored")[0] for text in warnings] == [
        f"malformed report of {kind}" for kind in ("policy_node: policy", "arm_node: arm", "policy_node: event")
    ]
    sample = collector.sample(0.6, HEALTH)
    assert (sample.engine, sample.latencies_ms, sample.ticks) == ("onnxruntime/fp32", (), None)


KEYS = ("engine", "requested", "steps", "steps_requested", "chunks", "inference_p50_ms", "inference_count")
KEYS += ("inference_recent_ms", "ticks", "missed_ticks", "starved_ticks", "swap_id", "outcome", "runtime", "reason")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["policy_node", "arm_node", "other"]),
            st.sampled_from(["policy", "arm", "event"]),
            st.dictionaries(st.sampled_from(KEYS), st.one_of(st.text(max_size=6), st.integers(-5, 50).map(str))),
        ),
        max_size=10,
    )
)
def test_no_report_raises(reports: list[tuple[str, str, dict[str, str]]]) -> None:
    collector = SampleCollector(lambda _: None)
    for i, (node, name, values) in enumerate(reports):
        collector.take(report(node, name, **values), float(i))
        sample = collector.sample(float(i), HEALTH)
        assert all(latency >= 0.0 for latency in sample.latencies_ms)
        assert sample.steps is None or sample.steps >= 1
