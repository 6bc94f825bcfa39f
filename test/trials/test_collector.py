"""What a trial publishes becomes one record, whatever order or loss the messages suffer."""

from __future__ import annotations

import pytest

from dcqfa_ros.runtime.swaps import ComputedBy, SwapResult
from dcqfa_ros.trials.collector import PlannedTrial, TrialCollector
from dcqfa_ros.trials.records import TrialMode


def judgement(step: int, coverage: float = 0.5, episode: int = 1, **more: str) -> dict[str, str]:
    return {
        "episode": str(episode),
        "step": str(step),
        "coverage": repr(coverage),
        "score": repr(min(1.0, coverage / 0.95)),
        "starved_ticks": "1",
        "missed_ticks": "2",
        "state": "1 2 3 4 5",
        "target": "6 7",
        **more,
    }


def collector() -> TrialCollector:
    return TrialCollector(PlannedTrial(TrialMode.REALTIME, 7), 1)


STOPPED = {
    "episode": "1", "state": "disarmed", "code": "success", "reason": "the goal", "step": "2", "missed_ticks": "2",
}  # fmt: skip
FIGURES = {"episode": "1", "chunks": "3", "inference_p50_ms": "4.5", "inference_p99_ms": "6.0"}


def test_a_trial_is_complete_only_when_everything_has_arrived():
    c = collector()
    c.variant("w8a8")
    c.arm_state(STOPPED)
    assert c.stopped and not c.complete
    c.judgement(judgement(1))
    c.policy_report(FIGURES)
    assert not c.complete
    c.judgement(judgement(2, 0.96))
    assert c.complete
    record = c.record("cpu", "pusht")
    assert (record.score, record.steps, record.stop_reason, record.variant) == (1.0, 2, "success", "w8a8")
    assert (record.missed_ticks, record.starved_ticks, record.chunks, record.inference_ms_p99) == (2, 1, 3, 6.0)
    assert record.curve == (0.5, 0.96)


def test_messages_of_other_episodes_and_repeated_ones_are_ignored():
    c = collector()
    c.judgement(judgement(1, episode=9))
    c.arm_state({**STOPPED, "episode": "0"})
    c.policy_report({**FIGURES, "episode": "0"})
    c.judgement(judgement(1))
    c.judgement(judgement(1, 0.9))
    assert c.curve == [0.5] and not c.stopped and c.chunks == 0


def test_a_lost_judgement_is_counted_and_the_curve_keeps_one_entry_per_step():
    c = collector()
    c.judgement(judgement(1, 0.1))
    c.judgement(judgement(4, 0.4))
    assert c.lost == 2 and c.curve == [0.1, 0.4, 0.4, 0.4]


def test_variants_are_listed_in_order_of_use():
    c = collector()
    for name in ("w8a8", "w8a8", "", "fp32", "w8a8"):
        c.variant(name)
    assert c.record("cpu", "pusht").variant == "w8a8, fp32"


@pytest.mark.parametrize("text", ["", "7", "max:7", "realtime:", "realtime:-1", "lockstep:1.5"])
def test_a_plan_of_another_form_is_refused_with_the_form_expected(text):
    with pytest.raises(ValueError, match="realtime:SEED or lockstep:SEED"):
        PlannedTrial.parse(text)


def test_a_plan_is_read_back_as_written():
    for text in ("realtime:0", "lockstep:200004"):
        assert str(PlannedTrial.parse(text)) == text


def exchange(**changes: str) -> dict[str, str]:
    host = SwapResult(3, "w8a8", "w8a8", True, "", 812.25, engine="onnxruntime/w8a8", previous="onnxruntime/fp32")
    return host.values() | changes


def test_exchanges_are_kept_with_the_step_at_which_they_came_and_parts_with_their_engines():
    c = collector()
    c.judgement(judgement(1))
    c.swap(exchange())
    c.swap(exchange(outcome="failed", engine="onnxruntime/w8a8", requested="w4a4", reason="x" * 5000))
    computed = ComputedBy()
    for chunk, engine in enumerate(("onnxruntime/fp32", "onnxruntime/w8a8", "onnxruntime/w8a8", "never sent")):
        computed.note(chunk, engine)
    c.policy_report({**FIGURES, "computed_by": computed.text()})
    c.arm_state({**STOPPED, "step": "1"})
    record = c.record("cpu", "pusht")
    assert [(p.first_chunk, p.engine) for p in record.parts] == [(0, "onnxruntime/fp32"), (1, "onnxruntime/w8a8")]
    first, second = record.swaps
    assert (first.swap_id, first.step, first.previous, first.engine) == (3, 1, "onnxruntime/fp32", "onnxruntime/w8a8")
    assert (first.outcome, first.load_ms, first.reason) == ("switched", 812.2, "")
    assert (second.outcome, len(second.reason)) == ("failed", 2000)


@pytest.mark.parametrize("bad", [{"swap_id": "no"}, {"outcome": "perhaps"}, {"load_ms": "-1"}])
def test_a_malformed_exchange_is_refused_and_changes_nothing(bad):
    c = collector()
    with pytest.raises(ValueError):
        c.swap(exchange(**bad))
    assert c.swaps == []


@pytest.mark.parametrize("text", ["", "{", "3", "[3]", '[["x", "y"]]', "[[1]]"])
def test_parts_that_are_none_are_refused(text):
    with pytest.raises(ValueError):
        ComputedBy.parse(text)
