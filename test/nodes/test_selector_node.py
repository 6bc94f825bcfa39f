"""selector_node publishes a latched choice with reasons, decides again when asked, refuses what it cannot rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

from dcqfa_ros.nodes.selector_node import SelectorNode
from dcqfa_ros.ros.isolation import isolated_environment
from dcqfa_ros.ros.qos import qos

TIMEOUT_S = 10.0


class Graph:
    """A selector node and a late observer on one executor in an isolated domain."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.executor = SingleThreadedExecutor(context=context)
        self.observer = rclpy.create_node("observer", context=context)
        self.executor.add_node(self.observer)
        self.choices: list[DiagnosticArray] = []
        self.node: SelectorNode | None = None

    def selector(self, **parameters) -> SelectorNode:
        overrides = [Parameter(name, value=value) for name, value in parameters.items()]
        self.node = SelectorNode(context=self.context, parameter_overrides=overrides)
        self.executor.add_node(self.node)
        return self.node

    def listen(self) -> None:
        self.observer.create_subscription(DiagnosticArray, "selector_node/choice", self.choices.append, qos("latched"))

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        for _ in range(int(TIMEOUT_S / 0.05)):
            if condition():
                return True
            self.executor.spin_once(timeout_sec=0.05)
        return condition()

    def values(self) -> dict[str, str]:
        return {pair.key: pair.value for pair in self.choices[-1].status[0].values}


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Graph]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with isolated_environment() as isolation:
        monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        context = Context()
        rclpy.init(context=context, domain_id=isolation.domain)
        made = Graph(context)
        try:
            yield made
        finally:
            if made.node is not None:
                made.node.destroy_node()
            made.observer.destroy_node()
            made.executor.shutdown()
            rclpy.shutdown(context=context)


def test_a_late_subscriber_gets_the_choice_and_every_reason(graph: Graph, tiny_bundle) -> None:
    node = graph.selector(bundle=str(tiny_bundle()), runtime="onnxruntime")
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    graph.listen()
    assert graph.wait_for(lambda: bool(graph.choices))
    status, values = graph.choices[0].status[0], graph.values()
    assert status.name == "selector_node: selector"
    assert values["variant"] in ("fp32", "w8a8")
    assert values["variant"] in status.message
    assert values["basis"] == "modelled"
    assert "profile it" in status.message
    assert values["budget_ms"] == "800.0"
    assert (values["runtime"], values["quality_margin"]) == ("onnxruntime", "0.03")
    assert values["runtime_version"]
    names = {"onnxruntime/fp32", "onnxruntime/w8a8"}
    assert set(f"{values['ranking']},{values['rejected']}".strip(",").split(",")) == names
    assert all(values[f"candidate.{name}"] for name in names)
    assert values[f"runtime.{values['variant']}"] == "onnxruntime"


def test_setting_a_budget_decides_again(graph: Graph, tiny_bundle) -> None:
    node = graph.selector(bundle=str(tiny_bundle()))
    node.trigger_configure()
    node.trigger_activate()
    graph.listen()
    assert graph.wait_for(lambda: bool(graph.choices))
    assert node.set_parameters([Parameter("budget_memory_mb", value=10.0)])[0].successful
    assert graph.wait_for(lambda: len(graph.choices) > 1)
    status = graph.choices[-1].status[0]
    assert status.level == b"\x02"
    assert "no variant fits this device" in status.message
    assert graph.values()["variant"] == ""
    assert graph.values()["budget_mb"] == "10"


def test_steps_beyond_the_schedule_leave_the_last_choice_standing(graph: Graph, tiny_bundle) -> None:
    node = graph.selector(bundle=str(tiny_bundle()), denoising_steps=500)
    node.trigger_configure()
    assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    assert list(node.status()) == []
    assert node.set_parameters([Parameter("denoising_steps", value=8)])[0].successful
    assert graph.wait_for(lambda: bool(node.status()))
    assert node.status()[0].values["steps"] == "8"


def test_an_unknown_runtime_is_refused_while_configuring(graph: Graph, tiny_bundle) -> None:
    node = graph.selector(bundle=str(tiny_bundle()), runtime="tensorflow")
    assert node.trigger_configure() == TransitionCallbackReturn.FAILURE


def test_setting_the_margin_decides_again(graph: Graph, tiny_bundle) -> None:
    node = graph.selector(bundle=str(tiny_bundle()))
    node.trigger_configure()
    node.trigger_activate()
    assert node.set_parameters([Parameter("quality_margin", value=0.5)])[0].successful
    assert graph.wait_for(lambda: node.status()[0].values["quality_margin"] == "0.5")


@pytest.mark.parametrize("bundle", ["", "no_such_bundle"])
def test_without_a_bundle_configuring_is_refused(graph: Graph, bundle: str) -> None:
    assert graph.selector(bundle=bundle).trigger_configure() == TransitionCallbackReturn.FAILURE


def test_a_damaged_cache_is_noted_and_not_used(graph: Graph, tiny_bundle, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "dcqfa_ros" / "latency.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    node = graph.selector(bundle=str(tiny_bundle()))
    node.trigger_configure()
    assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    status, _ = node.status()
    assert status.values["variant"]
    assert "latency.json" in status.values["notes"]
