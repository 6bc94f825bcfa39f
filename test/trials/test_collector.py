"""What a trial publishes becomes one record, whatever order or loss the messages suffer."""

from __future__ import annotations

import pytest

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
