"""The supervisor with real nodes: deaths by name, restarts, signals, no orphans, stacks side by side."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcqfa_ros.ros.testing import Graph, Spawned, wait_until

SUPERVISE = str(Path(__file__).parent / "supervise.py")


@pytest.fixture
def graph() -> Iterator[Graph]:
    with Graph() as graph:
        yield graph


def supervise(graph: Graph, *specs: str, namespace: str = "", restart: bool = False) -> Spawned:
    return graph.spawn(sys.executable, SUPERVISE, namespace, "restart" if restart else "", *specs)


def children(pid: int) -> list[int]:
    """Return every descendant of ``pid``."""
    found, queue = [], [pid]
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    while queue:
        for child in parents.get(queue.pop(), []):
            found.append(child)
            queue.append(child)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_active(spawned: Spawned) -> None:
    wait_until(lambda: "graph active" in spawned.output, f"an active graph in {spawned.output!r}")


def pid_of(graph: Graph, node: str) -> int:
    return int(graph.wait_for(node, "lifecycle").status.values["pid"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_brings_the_whole_graph_down_without_orphans(graph: Graph, number: signal.Signals) -> None:
    run = supervise(graph, "first", "second")
    wait_active(run)
    family = children(run.process.pid)
    assert len(family) == 3
    began = time.monotonic()
    run.send(number)
    assert run.wait(6.0) == 0
    print(f"down after {time.monotonic() - began:.2f} s")
    assert not [pid for pid in family if alive(pid)]
    out = run.output
    assert "Traceback" not in out
    assert f"outcome 0  signal {number.name}" in out
    stops = re.findall(r"\[(first|second)\] .*stopped: ", out)
    assert sorted(set(stops)) == ["first", "second"], "each node says why it stopped"


def test_a_killed_node_is_reported_by_name_and_ends_the_run_with_its_code(graph: Graph) -> None:
    run = supervise(graph, "first", "second")
    wait_active(run)
    family = children(run.process.pid)
    os.kill(pid_of(graph, "second"), signal.SIGKILL)
    assert run.wait(6.0) == 128 + 9
    assert "second was killed by SIGKILL: bringing the graph down" in run.output
    assert not [pid for pid in family if alive(pid)]


def test_a_node_that_cannot_start_ends_the_run_with_its_code(graph: Graph) -> None:
    run = supervise(graph, "first", 'second={"number": 99}')
    assert run.wait() == 1
    assert "second died with exit code 1" in run.output
    assert "parameter number: expected int >= 0 and <= 10" in run.output


def test_a_node_that_refuses_to_configure_ends_the_run_and_says_why(graph: Graph) -> None:
    run = supervise(graph, "first", 'second={"fail_in": "setup"}')
    assert run.wait() == 1
    assert "bring-up failed: second refused to configure: setup failed: RuntimeError: setup broke" in run.output
    assert "lifecycle_manager_node died with exit code 1" in run.output
    assert "Traceback" not in run.output


def test_a_killed_node_is_restarted_when_asked_and_the_graph_becomes_active_again(graph: Graph) -> None:
    run = supervise(graph, "first", "second", restart=True)
    wait_active(run)
    os.kill(pid_of(graph, "second"), signal.SIGKILL)
    wait_until(lambda: "restarting second" in run.output, "a restart")
    wait_until(lambda: run.output.count("graph active") == 2, "an active graph after the restart")
    assert re.search(r"safe stop: second (is lost|was restarted)", run.output)
    run.send(signal.SIGINT)
    assert run.wait(6.0) == 0


def test_a_killed_manager_is_restarted_and_takes_the_running_graph_over(graph: Graph) -> None:
    run = supervise(graph, "first", restart=True)
    wait_active(run)
    graph.wait_graph("active")
    os.kill(pid_of(graph, "lifecycle_manager_node"), signal.SIGKILL)
    wait_until(lambda: run.output.count("graph active") == 2, "the graph in the hands of the new manager")
    assert "safe stop" not in run.output
    os.kill(pid_of(graph, "first"), signal.SIGKILL)
    wait_until(lambda: "safe stop: first" in run.output, "the new manager's watch")
    run.send(signal.SIGINT)
    assert run.wait(6.0) == 0


def test_a_node_that_keeps_dying_is_not_restarted_for_ever(graph: Graph) -> None:
    run = supervise(graph, 'hopeless={"number": 99}', restart=True)
    assert run.wait(30.0) == 1
    assert run.output.count("restarting hopeless") == 3


def test_killing_the_supervisor_leaves_no_orphan(graph: Graph) -> None:
    run = supervise(graph, "first", "second")
    wait_active(run)
    graph.wait_for("first", "lifecycle", state="active")  # the probe hears it: its last words will not be missed
    family = children(run.process.pid)
    run.process.kill()
    run.wait()
    wait_until(lambda: not [pid for pid in family if alive(pid)], "the end of every child")
    graph.wait_for("first", "lifecycle", state="finalized", stop_reason="signal SIGTERM")


def test_what_ignores_every_signal_is_killed_with_its_own_children(graph: Graph) -> None:
    run = supervise(graph, "stubborn")
    match = wait_until(lambda: re.search(r"child (\d+)", run.output), "the grandchild")
    run.send(signal.SIGINT)
    assert run.wait(6.0) == 0
    assert "stubborn still runs: SIGKILL" in run.output
    wait_until(lambda: not alive(int(match.group(1))), "the end of the grandchild")


def test_two_stacks_run_side_by_side_in_two_namespaces(graph: Graph) -> None:
    runs = [supervise(graph, "first", "second", namespace=n) for n in ("a", "b")]
    for run in runs:
        wait_active(run)
    for namespace in ("a", "b"):  # on a busy computer a node may just be brought back
        wait_until(lambda n=namespace: graph.state(f"/{n}/first") == "active", f"an active node in /{namespace}")
    runs[0].send(signal.SIGINT)
    assert runs[0].wait(6.0) == 0
    assert graph.state("/b/first") == "active"
    assert "safe stop" not in runs[1].output


def test_a_second_stack_on_the_same_names_is_refused_and_the_first_goes_on(graph: Graph) -> None:
    one = supervise(graph, "first", "second")
    wait_active(one)
    two = supervise(graph, "first", "second")
    assert two.wait() == 1
    assert "another stack runs under the same names: " in two.output
    assert "choose another namespace:= or ROS_DOMAIN_ID" in two.output
    assert "Traceback" not in two.output
    time.sleep(1.0)
    assert one.process.poll() is None
    assert "safe stop" not in one.output
    # On a busy computer the start of the second stack may have silenced a node so long that it is just brought back.
    wait_until(lambda: graph.state("first") == "active", "an active node of the first stack")
