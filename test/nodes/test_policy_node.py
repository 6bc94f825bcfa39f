"""policy_node takes the selector's choice, and the next of its ranking where an engine cannot be opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, KeyValue
from rclpy.context import Context
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

from dcqfa_ros.nodes.policy_node import PolicyNode
from dcqfa_ros.ros.diagnostics import Status, to_message
from dcqfa_ros.ros.isolation import isolated_environment
from dcqfa_ros.runtime import variant_loading
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.worker import EngineWorker, WorkerInfo
from test.nodes.spinning import Spinning


class WithoutTensorRt(EngineWorker):
    """A worker on a machine that cannot open TensorRT, whatever this one can."""

    def start(self, timeout: float = 60.0) -> WorkerInfo:
        if self.runtime == "tensorrt":
            raise EngineError("no CUDA device")
        return super().start(timeout)


class Graph(Spinning):
    """A policy node on an executor of its own in an isolated domain; events are kept."""

    def __init__(self, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(context)
        self.events: list[tuple[int, str]] = []
        self.node: PolicyNode | None = None
        monkeypatch.setattr(PolicyNode, "event", lambda _, level, text, **values: self.events.append((level, text)))

    def policy(self, **parameters: object) -> PolicyNode:
        overrides = [Parameter(name, value=value) for name, value in parameters.items()]
        self.node = PolicyNode(context=self.context, parameter_overrides=overrides)
        self.executor.add_node(self.node)
        assert self.node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        return self.node


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Graph]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(variant_loading, "EngineWorker", WithoutTensorRt)
    with isolated_environment() as isolation:
        monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        context = Context()
        rclpy.init(context=context, domain_id=isolation.domain)
        made = Graph(context, monkeypatch)
        try:
            yield made
        finally:
            if made.node is not None:
                made.node.teardown()
                made.node.destroy_node()
            made.executor.shutdown()
            rclpy.shutdown(context=context)


def choice(node: PolicyNode, *ranking: str) -> DiagnosticArray:
    values = {"variant": ranking[0].partition("/")[2], "ranking": ",".join(ranking)}
    status = Status(0, "selector", "as the test wants", values)
    return to_message("selector_node", "/selector_node", [status], node.get_clock().now().to_msg())


def test_a_refused_engine_is_followed_by_the_next_of_the_ranking(
    graph: Graph, policy_bundle: Callable[..., Path]
) -> None:
    node = graph.policy(bundle=str(policy_bundle()))
    host = node._variants.host
    assert host is not None
    node._variants.on_choice(choice(node, "tensorrt/w8a8", "tensorrt/fp32", "onnxruntime/fp32", "onnxruntime/w8a8"))
    assert graph.wait_for(lambda: host.engine == "onnxruntime/fp32" and not host.busy)
    assert graph.wait_for(lambda: any(level == 0 for level, _ in graph.events))
    told = [text for level, text in graph.events if level == 2]
    assert told[0] == "variant 'w8a8' refused on tensorrt: no CUDA device"
    assert told[1] == "tensorrt/w8a8 was refused: trying tensorrt/fp32, the next of the selector's ranking"
    assert told[3] == "tensorrt/fp32 was refused: trying onnxruntime/fp32, the next of the selector's ranking"
    assert host.swaps == 3
    (status,) = node.status()
    assert (int(status.level), status.message) == (
        1,
        "onnxruntime/fp32 active; refused: tensorrt/fp32, tensorrt/w8a8",
    )


def test_a_pinned_runtime_is_not_left(graph: Graph, policy_bundle: Callable[..., Path]) -> None:
    node = graph.policy(bundle=str(policy_bundle()), variant="w8a8", runtime="tensorrt")
    host = node._variants.host
    assert host is not None
    assert graph.wait_for(lambda: bool(graph.events) and not host.busy)
    node._variants.on_choice(choice(node, "onnxruntime/w8a8"))
    assert graph.wait_for(lambda: len(graph.events) >= 2 and not host.busy)
    assert host.active == ""
    assert all("refused on tensorrt" in text for _, text in graph.events)


def test_steps_of_the_choice_count_unless_they_are_set_by_hand_or_the_variant_is_pinned(
    graph: Graph, policy_bundle: Callable[..., Path]
) -> None:
    node = graph.policy(bundle=str(policy_bundle()))
    host = node._variants.host
    assert host is not None
    own = node._bundle.spec.diffusion.steps if node._bundle else 0
    assert node._steps() is None

    def take(steps: str) -> None:
        message = choice(node, "onnxruntime/fp32")
        message.status[0].values.append(KeyValue(key="steps", value=steps))
        node._variants.on_choice(message)

    take("4")
    assert graph.wait_for(lambda: host.active == "fp32" and not host.busy)
    values = node.status()[0].values
    assert (node._steps(), values["steps"], values["steps_requested"]) == (4, "4", "0")
    for wrong in ("0", "-1", "many", "101"):
        take(wrong)
        assert node._steps() == 4
    assert sum("steps is" in text for _, text in graph.events) == 4
    assert node.set_parameters([Parameter("denoising_steps", value=7)])[0].successful
    assert (node._steps(), node.status()[0].values["steps_requested"]) == (7, "7")
    assert node.set_parameters([Parameter("denoising_steps", value=0)])[0].successful
    assert node.set_parameters([Parameter("variant", value="fp32")])[0].successful
    assert node._steps() is None
    assert node.status()[0].values["steps"] == str(own)
