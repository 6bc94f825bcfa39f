"""The lifecycle manager over real toy nodes: order, refusals, losses, recoveries, services."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lifecycle_msgs.msg import Transition
from std_msgs.msg import String

from dcqfa_ros.ros.testing import Graph, Spawned, wait_until

TOY = str(Path(__file__).parents[1] / "ros" / "toy_node.py")
MODULE = "dcqfa_ros.nodes.lifecycle_manager_node"
MANAGER = "lifecycle_manager_node"


@pytest.fixture
def graph() -> Iterator[Graph]:
    with Graph() as graph:
        yield graph


def toys(graph: Graph, *names: str, **parameters: Any) -> dict[str, Spawned]:
    return {name: graph.spawn_node(TOY, name, **parameters) for name in names}


def manage(graph: Graph, *names: str, **parameters: Any) -> Spawned:
    return graph.spawn_node(MODULE, MANAGER, node_names=f"[{','.join(names)}]", **parameters)


def transitions(graph: Graph) -> list[tuple[str, str]]:
    """Return (node, state) in the order heard, without repetitions."""
    seen: list[tuple[str, str]] = []
    last: dict[str, str] = {}
    for report in list(graph.reports):
        if report.status.name == "lifecycle" and report.node != MANAGER:
            state = report.status.values["state"]
            if last.get(report.node) != state:
                last[report.node] = state
                seen.append((report.node, state))
    return [entry for entry in seen if entry[1] != "unconfigured"]


def test_nodes_come_up_in_order_go_down_in_reverse_on_request_and_all_at_once_on_a_signal(graph: Graph) -> None:
    toys(graph, "c", "a", "b")
    for name in ("a", "b", "c"):
        graph.wait_for(name, "lifecycle", state="unconfigured")
    manager = manage(graph, "a", "b", "c")
    graph.wait_graph("active")
    assert graph.trigger(f"{MANAGER}/deactivate").success
    wait_until(lambda: len(transitions(graph)) >= 9, "down")
    assert graph.trigger(f"{MANAGER}/activate").success
    wait_until(lambda: len(transitions(graph)) >= 12, "up again")
    graph.wait_graph("active")
    manager.send(signal.SIGINT)
    assert manager.wait(5.0) == 0
    wait_until(lambda: len(transitions(graph)) >= 15, "all transitions")
    seen = transitions(graph)
    assert seen[:6] == [(n, s) for s in ("inactive", "active") for n in "abc"]
    assert seen[6:9] == [(n, "inactive") for n in "cba"]
    assert seen[9:12] == [(n, "active") for n in "abc"]
    assert sorted(seen[12:]) == [(n, "inactive") for n in "abc"]
    assert "Traceback" not in manager.output


def test_a_signal_to_every_process_at_once_ends_all_of_them_well(graph: Graph) -> None:
    nodes = toys(graph, "a", "b")
    manager = manage(graph, "a", "b")
    graph.wait_graph("active")
    for process in (*nodes.values(), manager):  # as Ctrl-C in a terminal does
        process.send(signal.SIGINT)
    for process in (*nodes.values(), manager):
        wait_until(lambda p=process: "stopped: " in p.output, "the node's end")
        process.send(signal.SIGINT)  # and ros2 launch once more
    assert [p.wait(5.0) for p in (*nodes.values(), manager)] == [0, 0, 0]
    assert "did not deactivate" not in manager.output


def test_without_autostart_an_operator_brings_the_graph_up_and_down(graph: Graph) -> None:
    toys(graph, "a")
    manage(graph, "a", autostart=False)
    graph.wait_graph("inactive")
    assert graph.state("a") == "unconfigured"
    assert graph.trigger(f"{MANAGER}/activate").success
    wait_until(lambda: graph.state("a") == "active", "activation")
    assert graph.trigger(f"{MANAGER}/deactivate").success
    wait_until(lambda: graph.state("a") == "inactive", "deactivation")


def test_a_node_that_does_not_appear_is_named(graph: Graph) -> None:
    toys(graph, "a")
    manager = manage(graph, "a", "ghost", appear_timeout_s=2.0)
    assert manager.wait() == 1
    assert "bring-up failed: not there after 2 s: ghost" in manager.output
    assert "Traceback" not in manager.output


def test_a_refused_configure_takes_the_others_down_again(graph: Graph) -> None:
    toys(graph, "a")
    toys(graph, "b", fail_in="start")
    manager = manage(graph, "a", "b")
    assert manager.wait() == 1
    assert "bring-up failed: b refused to activate: start failed: RuntimeError: start broke" in manager.output
    assert graph.state("a") == "inactive"


LATE = """
import sys
from dcqfa_ros.nodes import lifecycle_manager_node as module

look, looked = module.LifecycleManagerNode._look_for_rivals, []

def late(self):
    looked.append(1)
    if len(looked) > 1:
        yield from look(self)

module.LifecycleManagerNode._look_for_rivals = late
sys.exit(module.main())
"""


def test_another_stack_that_is_discovered_late_is_named_and_left_alone(graph: Graph, tmp_path: Path) -> None:
    toys(graph, "a")
    manage(graph, "a")
    graph.wait_graph("active")
    toys(graph, "a", fail_in="start")
    program = tmp_path / "late.py"
    program.write_text(LATE)
    second = graph.spawn_node(str(program), MANAGER, node_names="[a]")
    assert second.wait() == 1
    assert "another stack runs under the same names: " in second.output
    assert "Traceback" not in second.output


def test_an_optional_node_that_refuses_does_not_keep_the_graph_down(graph: Graph) -> None:
    toys(graph, "a")
    toys(graph, "extra", fail_in="setup")
    manager = manage(graph, "extra", "a", optional_names="[extra]")
    # In its output: what it publishes that early, the probe may not have found it yet to hear.
    wait_until(lambda: "extra refused to configure" in manager.output, "word of the refusal")
    graph.wait_graph("active")
    assert graph.state("a") == "active"


def test_a_lost_node_means_a_safe_stop_and_its_successor_brings_the_graph_back(graph: Graph) -> None:
    nodes = toys(graph, "a", "b")
    manage(graph, "a", "b")
    graph.wait_graph("active")
    nodes["b"].process.kill()
    graph.wait_for(MANAGER, "event", "safe stop: b is lost: no sign of life")
    wait_until(lambda: graph.state("a") == "inactive", "deactivation of the other node")
    graph.reports.clear()
    toys(graph, "b")
    graph.wait_for(MANAGER, "event", "b is back")
    graph.wait_graph("active")
    assert graph.state("a") == "active"


def test_a_frozen_node_counts_as_lost_and_comes_back_when_it_thaws(graph: Graph) -> None:
    nodes = toys(graph, "a", "b")
    manage(graph, "a", "b")
    graph.wait_graph("active")
    nodes["a"].send(signal.SIGSTOP)
    graph.wait_for(MANAGER, "event", "safe stop: a is lost")
    graph.reports.clear()
    nodes["a"].send(signal.SIGCONT)
    graph.wait_graph("active")


def test_a_node_that_stops_itself_means_a_safe_stop_until_an_operator_activates(graph: Graph) -> None:
    toys(graph, "a", "b")
    manage(graph, "a", "b")
    graph.wait_graph("active")
    graph.publish("active_variant", String(data="x"))  # both toys' callbacks raise on it
    graph.wait_for(MANAGER, "event", " stopped itself: RuntimeError: callback broke on x")
    time.sleep(1.0)
    assert graph.state("a") == graph.state("b") == "inactive"
    graph.reports.clear()
    assert graph.trigger(f"{MANAGER}/activate").success
    graph.wait_graph("active")


def test_a_node_deactivated_by_hand_is_left_alone(graph: Graph) -> None:
    toys(graph, "a", "b")
    manage(graph, "a", "b")
    graph.wait_graph("active")
    assert graph.change("b", Transition.TRANSITION_DEACTIVATE)
    graph.wait_for(MANAGER, "event", "b was deactivated from outside")
    time.sleep(1.0)
    assert (graph.state("a"), graph.state("b")) == ("active", "inactive")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([], "node_names is empty"),
        (["-p", "node_names:=[a, a]"], "node_names holds a name twice"),
        (["-p", "node_names:=[a]", "-p", "optional_names:=[b]"], "not in node_names: b"),
    ],
)
def test_nonsense_in_its_parameters_is_refused(graph: Graph, parameters: list[str], message: str) -> None:
    manager = graph.spawn(sys.executable, "-m", MODULE, *(["--ros-args", *parameters] if parameters else []))
    assert manager.wait() == 1
    assert message in manager.output
    assert "Traceback" not in manager.output
