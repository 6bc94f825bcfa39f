"""Ways of chunk execution through the graph: real processes, real time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dcqfa_ros.ros.testing import Graph, wait_until
from test.nodes.test_pusht_graph import STEPS, Cell


@pytest.fixture
def graph() -> Iterator[Graph]:
    with Graph() as graph:
        yield graph


def test_asynchronous_chunks_never_leave_the_arm_without_an_action(graph, policy_bundle):
    cell = Cell(graph, policy_bundle(), "realtime", policy={"chunking": "asynchronous", "execution_horizon": 4})
    cell.run()
    graph.wait_for("policy_node", "policy", chunking="asynchronous", consumption="told by the arm")
    state = cell.stopped("step_limit")
    assert state["starved_ticks"] == "0"
    assert [int(j["step"]) for j in cell.judgements] == list(range(1, STEPS + 1))
    ended = graph.wait_for("policy_node", "event", "episode 1 ended").status.values
    assert ended["execution_horizon"] == "4" and int(ended["delay"]) >= 1 and ended["starved_actions"] == "0"
    assert float(ended["latency_p95_ms"]) > 0.0 and float(ended["discontinuity_max"]) > 0.0
    assert STEPS / 4 - 1 <= int(ended["chunks"]) <= STEPS / 4 + 1  # one per 4 actions, on the newest observation


def test_methods_are_chosen_while_the_policy_runs_and_refused_by_name(graph, policy_bundle):
    cell = Cell(graph, policy_bundle(), "realtime")
    cell.run()

    def refusal(name: str, value: object) -> str:
        result = graph.set_parameter("policy_node", name, value)
        assert not result.successful, (name, value)
        return str(result.reason)

    assert "has 0: use soft, ensemble or asynchronous" in refusal("chunking", "trained")
    assert "expected one of synchronous, asynchronous" in refusal("chunking", "fast")
    assert "expected 0 (the bundle's own) to 15 actions, got 16" in refusal("execution_horizon", 16)
    assert refusal("delay", -2)
    assert graph.set_parameter("policy_node", "chunking", "guided").successful
    assert "'w8a8' rounds activations to int8" in refusal("variant", "w8a8")
    assert "guided needs rate realtime" in refusal("rate", "max")
    for method in ("soft", "ensemble"):
        assert graph.set_parameter("policy_node", "chunking", method).successful
    assert graph.set_parameter("policy_node", "variant", "w8a8").successful
    wait_until(lambda: cell.variants[-1] == "w8a8", "variant w8a8")
    assert "'w8a8' rounds activations to int8" in refusal("chunking", "guided")
    assert cell.stopped("step_limit")["starved_ticks"] == "0"
    ended = graph.wait_for("policy_node", "event", "episode 1 ended").status.values
    assert ended["chunking"] == "ensemble"


def test_guided_chunks_reach_the_arm(graph, policy_bundle):
    cell = Cell(graph, policy_bundle(), "realtime", policy={"chunking": "guided", "execution_horizon": 5, "delay": 2})
    cell.run()
    assert cell.stopped("step_limit")["starved_ticks"] == "0"
    ended = graph.wait_for("policy_node", "event", "episode 1 ended").status.values
    assert (ended["chunking"], ended["delay"], ended["execution_horizon"]) == ("guided", "2", "5")


def test_an_integer_variant_is_not_configured_for_guided_chunks(graph, policy_bundle):
    parameters = {"bundle": policy_bundle(), "variant": "w8a8", "chunking": "guided"}
    policy = graph.spawn_node("dcqfa_ros.nodes.policy_node", "policy_node", **parameters)
    assert not graph.activate("policy_node")
    wait_until(lambda: "'w8a8' rounds activations to int8" in policy.output, "reason")
