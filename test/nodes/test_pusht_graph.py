"""arm_node and policy_node as real processes: the same result as without ROS, and a safe stop for every fault."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcqfa_ros.bench.processes import children
from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.ros.conversions import planar_chunk_message, points_message, status_values
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.testing import Graph, Spawned, wait_until
from dcqfa_ros.runtime.engine import ROLES
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.policy import PolicyRuntime
from dcqfa_ros.sim.pusht import PushTWorld

STEPS = 40
SEED = 7


class Cell:
    """arm_node and policy_node, active, and what they published."""

    def __init__(
        self,
        graph: Graph,
        bundle: Path,
        rate: str,
        variant: str = "fp32",
        policy: dict[str, Any] | None = None,
        **arm: Any,
    ) -> None:
        self.graph = graph
        self.judgements: list[dict[str, str]] = []
        self.states: list[dict[str, str]] = []
        self.variants: list[str] = []
        self.chunks = 0
        self._listen("judgement", lambda m: self.judgements.append(status_values(m)))
        self._listen("arm_state", lambda m: self.states.append(status_values(m)))
        self._listen("active_variant", lambda m: self.variants.append(m.data))
        self._listen("chunk", lambda _: setattr(self, "chunks", self.chunks + 1))
        self.arm = graph.spawn_node(
            "dcqfa_ros.nodes.arm_node", "arm_node", rate=rate, max_steps=STEPS, seed=SEED, **arm
        )
        self.policy: Spawned = graph.spawn_node(
            "dcqfa_ros.nodes.policy_node", "policy_node", rate=rate, bundle=bundle, variant=variant, **(policy or {})
        )
        assert graph.activate("arm_node"), self.arm.output
        assert graph.activate("policy_node"), self.policy.output
        wait_until(lambda: variant in self.variants, f"variant {variant}")

    def _listen(self, key: str, callback: Any) -> None:
        entry = interface(key)
        self.graph.node.create_subscription(entry.message_class(), entry.name, callback, qos(entry.qos))

    def run(self) -> None:
        """Arm, and wait for the first steps."""
        response = self.graph.trigger("arm_node/arm")
        assert response.success, response.message
        wait_until(lambda: len(self.judgements) >= 3, "three steps")

    def stopped(self, code: str) -> dict[str, str]:
        """Wait until the arm is disarmed and return its last state, which must have ``code``."""
        state = wait_until(
            lambda: self.states and self.states[-1]["code"] not in ("", "never_armed") and self.states[-1], code
        )
        assert state["code"] == code, state
        return state

    def worker(self) -> int:
        """Process id of the engine's worker."""
        (pid,) = children(self.policy.process.pid)
        return pid


@pytest.fixture
def graph() -> Iterator[Graph]:
    with Graph() as graph:
        yield graph


def without_ros(bundle: Path, variant: str) -> list[float]:
    """Coverage per step of the same episode, computed in this process."""
    loaded = load_bundle(bundle)
    engine = OnnxRuntimeEngine({role: loaded.read(variant, role) for role in ROLES}, name=variant)
    policy, world = PolicyRuntime(loaded.spec, engine), PushTWorld(STEPS)
    world.reset(SEED)
    history, curve, chunk = [world.observation()] * 2, [], 0
    while not world.done:
        stacked = {key: np.stack([frame[key] for frame in history])[None] for key in history[0]}
        for action in policy.predict(stacked, [SEED], [chunk])[0]:
            curve.append(world.step(action).coverage)
            history = [history[1], world.observation()]
            if world.done:
                break
        chunk += 1
    return curve


@pytest.mark.parametrize("rate", ["max", "realtime"])
def test_an_episode_through_the_graph_is_the_one_computed_without_ros(graph, policy_bundle, rate):
    bundle = policy_bundle()
    cell = Cell(graph, bundle, rate)
    cell.run()
    cell.stopped("step_limit")
    wait_until(lambda: len(cell.judgements) == STEPS, "all judgements")
    assert [int(j["step"]) for j in cell.judgements] == list(range(1, STEPS + 1))
    expected = without_ros(bundle, "fp32")
    through = [float(j["coverage"]) for j in cell.judgements]
    # A loaded machine may starve a tick of real time; up to the first one both must agree. Lockstep has none.
    same = next((n for n, j in enumerate(cell.judgements) if j["starved_ticks"] != "0"), STEPS)
    assert same == STEPS if rate == "max" else same >= 8, f"starved from step {same} on"
    assert np.abs(np.array(through[:same]) - expected[:same]).max() < 1e-12


def test_a_killed_engine_worker_stops_the_policy_by_name_and_then_the_arm(graph, policy_bundle):
    cell = Cell(graph, policy_bundle(), "realtime", command_timeout_s=0.5)
    cell.run()
    os.kill(cell.worker(), signal.SIGKILL)
    graph.wait_for("policy_node", "lifecycle", "SIGKILL", faulted="true")
    cell.stopped("command_timeout")
    sent, moved = cell.chunks, len(cell.judgements)
    assert cell.policy.process.poll() is None and "Traceback" not in cell.policy.output
    assert graph.trigger("arm_node/reset_cell").success
    assert (cell.chunks, len(cell.judgements)) == (sent, moved), "no command and no motion after a stop"


def test_nan_in_an_observation_stops_the_commands_and_names_the_key(graph, policy_bundle):
    cell = Cell(graph, policy_bundle(), "realtime", command_timeout_s=0.5)
    cell.run()
    graph.publish("keypoints", points_message(1, "table", np.full((9, 2), np.nan), 1024.0))
    graph.wait_for("policy_node", "event", "'keypoints' holds nan")
    cell.stopped("command_timeout")


def test_nan_in_an_action_disarms_before_anything_moves(graph):
    arm = graph.spawn_node("dcqfa_ros.nodes.arm_node", "arm_node", rate="realtime", seed=SEED)
    assert graph.activate("arm_node"), arm.output
    states: list[Any] = []
    judgements: list[Any] = []
    for key, heard in (("arm_state", states), ("judgement", judgements)):
        entry = interface(key)
        graph.node.create_subscription(entry.message_class(), entry.name, heard.append, qos(entry.qos))
    assert graph.trigger("arm_node/arm").success
    wait_until(lambda: states and status_values(states[-1])["state"] == "armed", "armed")
    chunk = planar_chunk_message(0, "table", np.full((8, 2), 256.0), 100_000_000, 1024.0)
    chunk.header.stamp = states[-1].header.stamp
    chunk.points[3].transforms[0].translation.y = float("nan")
    graph.publish("chunk", chunk)
    wait_until(lambda: status_values(states[-1])["state"] == "disarmed", "disarmed")
    values = status_values(states[-1])
    assert values["code"] == "not_finite" and "'y'" in values["reason"] and "action 3" in values["reason"]
    assert judgements == []


def test_a_network_that_gives_nan_refuses_to_load_and_nothing_is_sent(graph, policy_bundle):
    bundle = policy_bundle(poison=True)
    policy = graph.spawn_node("dcqfa_ros.nodes.policy_node", "policy_node", bundle=bundle, variant="fp32")
    graph.activate("policy_node")
    graph.wait_for("policy_node", "event", "variant 'fp32' refused")
    assert "Traceback" not in policy.output


def test_a_second_command_source_on_the_same_topic_disarms_the_arm(graph, policy_bundle):
    cell = Cell(graph, policy_bundle(), "realtime")
    cell.run()
    graph.publish("chunk", planar_chunk_message(1, "table", np.zeros((8, 2)), 100_000_000, 1024.0))
    assert "second stack" in cell.stopped("two_publishers")["reason"]


def test_observations_that_stop_coming_end_the_commands_by_name(graph, policy_bundle):
    cell = Cell(graph, policy_bundle(), "realtime", command_timeout_s=0.5)
    cell.run()
    cell.arm.send(signal.SIGSTOP)
    try:
        graph.wait_for("policy_node", "event", "ms old, its limit is")
    finally:
        cell.arm.send(signal.SIGCONT)
    cell.stopped("command_timeout")


def test_a_variant_is_exchanged_while_the_arm_moves_and_the_truth_is_published(graph, policy_bundle):
    cell = Cell(graph, policy_bundle(), "realtime")
    cell.run()
    assert graph.set_parameter("policy_node", "variant", "w8a8").successful
    wait_until(lambda: cell.variants[-1] == "w8a8", "variant w8a8")
    assert cell.stopped("step_limit")
    refused = graph.set_parameter("policy_node", "variant", "w2a2")
    assert not refused.successful and "fp32, w8a8" in refused.reason


def test_a_variant_that_fails_to_load_leaves_the_old_one_and_restores_the_parameter(graph, policy_bundle):
    bundle = policy_bundle()
    cell = Cell(graph, bundle, "max")
    file = bundle / "variants/w8a8/denoiser.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert graph.set_parameter("policy_node", "variant", "w8a8").successful
    report = graph.wait_for("policy_node", "event", "variant 'w8a8' refused", requested="w8a8", active="fp32")
    assert "denoiser.onnx" in report.status.values["reason"]
    graph.wait_for("policy_node", "policy", requested="fp32", variant="fp32")
    cell.run()
    assert cell.stopped("step_limit")


def test_the_arm_refuses_what_its_state_does_not_allow(graph, policy_bundle):
    cell = Cell(graph, policy_bundle(), "realtime")
    cell.run()
    for service, text in (("arm_node/arm", "already armed"), ("arm_node/reset_cell", "disarm")):
        response = graph.trigger(service)
        assert not response.success and text in response.message
    assert "disarm" in graph.set_parameter("arm_node", "rate", "max").reason
    assert graph.trigger("arm_node/disarm").success
    assert cell.stopped("operator")["reason"] == "disarmed by ~/disarm"
    assert graph.set_parameter("arm_node", "rate", "max").successful


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_disarms_with_its_name_before_the_node_goes(graph, policy_bundle, number):
    cell = Cell(graph, policy_bundle(), "realtime")
    cell.run()
    cell.arm.send(number)
    assert number.name in cell.stopped("shutdown")["reason"]
    assert cell.arm.wait() == 0 and "Traceback" not in cell.arm.output


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"bundle": "no_such_bundle"}, "no_such_bundle"),
        ({"variant": "w2a2"}, "the bundle has fp32, w8a8"),
        ({"runtime": "tensorflow"}, "runtime 'tensorflow' is unknown; there are onnxruntime, openvino"),
        ({"control_rate": 25.0}, "trained at 10 Hz"),
        ({"observation_sources": "[keypoints=keypoints]"}, "'agent_position'"),
        ({"observation_sources": "[keypoints=nowhere,agent_position=tcp_pose]"}, "'nowhere'"),
    ],
)
def test_a_wrong_parameter_is_refused_at_configure_by_name(graph, policy_bundle, parameters, text):
    node = graph.spawn_node("dcqfa_ros.nodes.policy_node", "policy_node", **{"bundle": policy_bundle(), **parameters})
    assert not graph.configure("policy_node")
    wait_until(lambda: text in node.output, f"{text} in the log")
    assert "Traceback" not in node.output


def test_auto_follows_the_selector_and_runs_nothing_when_nothing_fits(graph, policy_bundle):
    bundle = policy_bundle()
    node = graph.spawn_node("dcqfa_ros.nodes.policy_node", "policy_node", bundle=bundle, selector_timeout_s=0.2)
    selector = graph.spawn_node(
        "dcqfa_ros.nodes.selector_node",
        "selector_node",
        bundle=bundle,
        runtime="onnxruntime",
        budget_latency_ms=1e-6,
        budget_memory_mb=1.0,
    )
    assert graph.activate("selector_node"), selector.output
    assert graph.activate("policy_node"), node.output
    graph.wait_for("policy_node", "event", "found no variant")
    graph.wait_for("policy_node", "policy", "no variant loaded yet")
    assert graph.set_parameter("selector_node", "budget_memory_mb", 0.0).successful
    assert graph.set_parameter("selector_node", "budget_latency_ms", 0.0).successful
    graph.wait_for("policy_node", "event", "is active on onnxruntime")


def test_without_a_selector_the_default_variant_is_used_and_that_is_said(graph, policy_bundle):
    graph.spawn_node("dcqfa_ros.nodes.policy_node", "policy_node", bundle=policy_bundle(), selector_timeout_s=0.2)
    assert graph.activate("policy_node")
    graph.wait_for("policy_node", "event", "no choice from the selector")
    graph.wait_for("policy_node", "event", "is active")
    graph.wait_for("policy_node", "policy", "onnxruntime/fp32 active", variant="fp32", engine="onnxruntime/fp32")
