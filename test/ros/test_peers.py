"""What the manager concludes from what it hears."""

from __future__ import annotations

import pytest

from dcqfa_ros.ros.peers import Finding, Peer, crowded

LOST = 2.5


def heard(
    instance: str = "one", state: str = "active", now: float = 0.0, peer: Peer | None = None, **more: str
) -> Peer:
    peer = peer or Peer("arm", "/arm", wanted=True)
    peer.hear({"instance": instance, "pid": instance, "state": state, **more}, now, LOST)
    return peer


def test_a_node_that_reports_active_is_fine() -> None:
    assert heard().finding(1.0, LOST) is None


def test_a_node_nobody_wants_active_is_never_missed() -> None:
    peer = heard(state="inactive", faulted="true")
    peer.wanted = False
    assert peer.finding(100.0, LOST) is None


@pytest.mark.parametrize(
    ("state", "more", "now", "finding", "text"),
    [
        ("active", {}, 3.0, Finding.SILENT, "arm is lost: no sign of life for 3.0 s"),
        ("inactive", {"faulted": "true", "stop_reason": "hot"}, 1.0, Finding.FAULTED, "arm stopped itself: hot"),
        ("finalized", {"stop_reason": "signal"}, 9.0, Finding.ENDED, "arm ended: signal"),
        ("finalized", {"stop_reason": "done", "finished": "true"}, 9.0, Finding.FINISHED, "arm has finished: done"),
        ("inactive", {}, 1.0, Finding.DEACTIVATED, "arm was deactivated from outside"),
    ],
)
def test_what_is_wrong_is_told_apart(state: str, more: dict[str, str], now: float, finding: Finding, text: str) -> None:
    peer = heard(state=state, **more)
    assert peer.finding(now, LOST) is finding
    assert peer.describe(finding, now) == text


def test_a_late_report_of_the_state_before_a_transition_is_no_deactivation() -> None:
    peer = heard(state="inactive", now=0.0)
    peer.arrive("active", 1.0)
    heard(state="inactive", now=1.1, peer=peer)
    assert peer.finding(1.2, LOST) is None
    assert peer.finding(2.0, LOST) is Finding.DEACTIVATED


def test_an_answer_is_a_sign_of_life_of_a_node_whose_reports_have_not_been_heard_yet() -> None:
    peer = Peer("arm", "/arm", wanted=True)
    assert peer.silent_for(1.0) == float("inf")
    peer.arrive("active", 1.0)
    assert peer.finding(3.0, LOST) is None
    assert peer.finding(4.0, LOST) is Finding.SILENT
    assert peer.describe(Finding.SILENT, 4.0) == "arm is lost: no sign of life for 3.0 s"


def test_a_successor_of_a_node_that_died_before_it_was_heard_is_a_restart() -> None:
    peer = Peer("arm", "/arm", wanted=True)
    peer.arrive("active", 1.0)
    heard("two", "unconfigured", 1.2, peer)
    assert peer.finding(1.3, LOST) is None, "it may be a late report"
    assert peer.finding(2.2, LOST) is Finding.RESTARTED


def test_a_node_in_a_transition_may_be_silent() -> None:
    peer = heard()
    peer.busy = True
    assert peer.finding(100.0, LOST) is None


def test_a_manager_that_did_not_run_blames_nobody() -> None:
    peer = heard()
    peer.excuse(5.0)
    assert peer.finding(6.0, LOST) is None


def test_a_second_process_is_a_rival_while_both_live_and_a_successor_afterwards() -> None:
    peer = heard("one", now=0.0)
    heard("two", "unconfigured", 1.0, peer)
    assert peer.state == "active"
    assert [p.pid for p in peer.rivals(1.5, LOST)] == ["one", "two"]
    heard("two", "unconfigured", 3.0, peer)
    assert peer.rivals(3.0, LOST) == []
    assert peer.finding(3.0, LOST) is Finding.RESTARTED
    assert peer.describe(Finding.RESTARTED, 3.0) == "arm was restarted"


def test_only_names_seen_twice_are_crowded() -> None:
    assert crowded({"/a": 2, "/b": 1}, ["/a", "/b", "/c"]) == ["/a"]
