"""The base class in real processes: signals, refusals, faults, parameters, diagnostics."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from std_msgs.msg import String

from dcqfa_ros.ros.testing import Graph, Spawned, wait_until

TOY = str(Path(__file__).parent / "toy_node.py")


@pytest.fixture
def graph() -> Iterator[Graph]:
    with Graph() as graph:
        yield graph


def spawn(graph: Graph, **parameters: Any) -> Spawned:
    toy = graph.spawn_node(TOY, "toy", **parameters)
    graph.wait_for("toy", "lifecycle", state="unconfigured")
    return toy


def history(graph: Graph) -> list[str]:
    reports = [r for r in graph.reports if r.node == "toy" and r.status.name == "history"]
    return reports[-1].status.values["history"].split(",") if reports else []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_an_active_node_with_a_published_reason_and_exit_code_0(
    graph: Graph, number: signal.Signals
) -> None:
    toy = spawn(graph)
    assert graph.activate("toy")
    toy.send(number)
    assert toy.wait(5.0) == 0
    graph.wait_for("toy", "event", f"stopped: signal {number.name}", was_active="true")
    graph.wait_for("toy", "lifecycle", state="finalized", stop_reason=f"signal {number.name}")
    assert "Traceback" not in toy.output


def test_a_signal_interrupts_a_long_setup(graph: Graph) -> None:
    toy = spawn(graph, setup_s=60.0)
    client = graph.node.create_client(ChangeState, "toy/change_state")
    wait_until(client.service_is_ready, "toy/change_state")
    client.call_async(ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE)))
    time.sleep(0.5)
    toy.send(signal.SIGTERM)
    assert toy.wait(5.0) == 0
    graph.wait_for("toy", "event", "setup failed: signal SIGTERM")
    assert "Traceback" not in toy.output


def test_a_setup_that_raises_is_refused_with_a_log_line_and_cleanup(graph: Graph) -> None:
    toy = spawn(graph, fail_in="setup")
    assert not graph.configure("toy")
    assert graph.state("toy") == "unconfigured"
    graph.wait_for("toy", "event", "setup failed: RuntimeError: setup broke")
    assert "setup failed: RuntimeError: setup broke" in toy.output
    assert "Traceback" not in toy.output
    graph.wait_for("toy", "lifecycle", state="unconfigured", faulted="true")
    wait_until(lambda: history(graph) == ["setup", "teardown"], "teardown after a failed setup")
    assert graph.set_parameter("toy", "fail_in", "").successful
    assert graph.activate("toy")  # and what it had created is gone: configuring again does not collide


def test_a_start_that_raises_leaves_the_node_inactive_and_stopped(graph: Graph) -> None:
    spawn(graph, fail_in="start")
    assert not graph.activate("toy")
    assert graph.state("toy") == "inactive"
    wait_until(lambda: history(graph)[:3] == ["setup", "start", "stop"], "stop after a failed start")


@pytest.mark.parametrize("hook", ["stop", "teardown"])
def test_a_stop_or_teardown_that_raises_does_not_keep_the_node_from_going_down(graph: Graph, hook: str) -> None:
    toy = spawn(graph, fail_in=hook)
    assert graph.activate("toy")
    assert graph.change("toy", Transition.TRANSITION_DEACTIVATE)
    assert graph.change("toy", Transition.TRANSITION_CLEANUP)
    graph.wait_for("toy", "event", f"{hook} failed: RuntimeError: {hook} broke")
    toy.send(signal.SIGINT)
    assert toy.wait(5.0) == 0


def test_a_callback_that_raises_is_a_fault_and_the_process_lives_on(graph: Graph) -> None:
    toy = spawn(graph)
    assert graph.activate("toy")
    graph.publish("active_variant", String(data="x"))
    report = graph.wait_for("toy", "event", "stopped: RuntimeError: callback broke on x")
    assert report.status.level == 2
    wait_until(lambda: graph.state("toy") == "inactive", "deactivation after the fault")
    graph.wait_for("toy", "lifecycle", state="inactive", faulted="true", errors="1")
    assert toy.process.poll() is None
    assert graph.change("toy", Transition.TRANSITION_ACTIVATE)
    assert "Traceback" not in toy.output


def test_a_fault_from_another_thread_stops_the_node(graph: Graph) -> None:
    spawn(graph)
    assert graph.activate("toy")
    graph.publish("active_variant", String(data="thread"))
    graph.wait_for("toy", "event", "stopped: a thread gave up")
    wait_until(lambda: graph.state("toy") == "inactive", "deactivation after the fault")


def test_a_node_can_end_itself_with_an_exit_code(graph: Graph) -> None:
    toy = spawn(graph)
    assert graph.activate("toy")
    graph.publish("active_variant", String(data="finish"))
    assert toy.wait() == 5
    graph.wait_for("toy", "event", "stopped: told to finish")


def test_a_refused_request_answers_why_and_is_no_fault(graph: Graph) -> None:
    spawn(graph)
    assert graph.configure("toy")
    answer = graph.trigger("trial_node/start")
    assert (answer.success, answer.message) == (False, "not active")
    assert graph.change("toy", Transition.TRANSITION_ACTIVATE)
    assert graph.trigger("trial_node/start").success


def test_a_transition_that_is_not_allowed_is_answered_and_ends_nothing(graph: Graph) -> None:
    toy = spawn(graph)
    assert not graph.change("toy", Transition.TRANSITION_DEACTIVATE)
    assert graph.state("toy") == "unconfigured"
    assert toy.process.poll() is None


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("word", "no", "the word is no"),
        ("word", "raise", "validator broke"),
        ("word", "late", "apply broke"),
        ("fail_in", "nowhere", "expected one of"),
        ("number", 11, "out of range"),
        ("number", "text", "type"),
    ],
)
def test_a_bad_parameter_value_is_refused_with_a_reason_and_the_old_one_stays(
    graph: Graph, name: str, value: Any, reason: str
) -> None:
    toy = spawn(graph)
    result = graph.set_parameter("toy", name, value)
    assert not result.successful
    assert reason in result.reason
    assert graph.set_parameter("toy", "word", "fine").successful
    assert toy.process.poll() is None


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("number:=11", "toy_node: parameter number: expected int >= 0 and <= 10"),
        ("setup_s:=1", "toy_node: parameter setup_s: expected float (write 10.0, not 10)"),
        ("fail_in:=nowhere", "toy_node: parameter fail_in: expected one of"),
    ],
)
def test_a_bad_parameter_at_start_is_one_line_and_exit_code_1(graph: Graph, parameter: str, message: str) -> None:
    toy = graph.spawn(sys.executable, TOY, "--ros-args", "-p", parameter)
    assert toy.wait() == 1
    assert message in toy.output
    assert len(toy.output.strip().splitlines()) == 1
    assert "Traceback" not in toy.output


def test_a_report_carries_the_full_path_and_stays_in_its_namespace_and_domain() -> None:
    with Graph("a") as graph, Graph("a") as other_domain, Graph() as root:
        graph.spawn_node(TOY, "toy", namespace="a")
        report = graph.wait_for("toy", "lifecycle", state="unconfigured")
        assert report.path == "/a/toy"
        assert report.status.values["instance"]
        assert not other_domain.reports
        assert not root.reports
