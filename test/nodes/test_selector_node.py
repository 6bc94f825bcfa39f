"""selector_node publishes a latched choice with reasons, decides again when asked, refuses what it cannot rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.context import Context
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

from dcqfa_ros.nodes.selector_node import SelectorNode
from dcqfa_ros.ros.diagnostics import Status, to_message
from dcqfa_ros.ros.isolation import isolated_environment
from dcqfa_ros.ros.qos import qos
from test.conftest import make_files, make_spec
from test.nodes.spinning import Spinning


class Graph(Spinning):
    """A selector node and a late observer on one executor in an isolated domain."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
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

    def listen_to_proposals(self) -> list[DiagnosticArray]:
        heard: list[DiagnosticArray] = []
        self.observer.create_subscription(DiagnosticArray, "selector_node/proposal", heard.append, qos("latched"))
        return heard

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


# the watch

QUICK = {"watch_period_s": 0.1, "watch_window_s": 0.5, "watch_hold_down_s": 0.3, "watch_dwell_s": 0.3}


def values_of(message: DiagnosticArray) -> dict[str, str]:
    return {pair.key: pair.value for pair in message.status[0].values}


class Policy:
    """What a policy that runs an engine under load reports."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.count = graph, 0
        self.publisher = graph.observer.create_publisher(DiagnosticArray, "diagnostics", qos("events"))
        graph.wait_for(lambda: self.publisher.get_subscription_count() > 0)

    def report(self, took_ms: float, **changes: str) -> None:
        self.count += 4
        values = {"engine": "onnxruntime/fp32", "requested": "auto", "steps": "16", "steps_requested": "0"}
        values |= {"chunks": str(self.count), "inference_p50_ms": "1", "inference_count": str(self.count)}
        values |= {"inference_recent_ms": " ".join([str(took_ms)] * 4)}
        status = Status(0, "policy", "", values | changes)
        stamp = self.graph.observer.get_clock().now().to_msg()
        self.publisher.publish(to_message("policy_node", "/policy_node", [status], stamp))

    def run_until(self, condition: Callable[[], bool], took_ms: float, **changes: str) -> bool:
        """Report again and again; returns whether the condition came true."""

        def tell() -> bool:
            self.report(took_ms, **changes)
            return condition()

        return self.graph.wait_for(tell)


def scored_bundle(tiny_bundle: Callable[..., Path]) -> Path:
    """Return a bundle of which fp32 is the first choice and w8a8 the cheaper one."""
    variants = make_spec(make_files()).model_dump(mode="json")["variants"]
    for variant in variants:
        variant["quality"][0]["mean"] = {"fp32": 0.55, "w8a8": 0.5}[variant["name"]]
    return tiny_bundle(variants=variants)


def test_what_is_proposed_is_published_with_its_reason_and_changes_no_choice(graph: Graph, tiny_bundle) -> None:
    node = graph.selector(bundle=str(scored_bundle(tiny_bundle)), runtime="onnxruntime", **QUICK)
    node.trigger_configure()
    node.trigger_activate()
    graph.listen()
    heard = graph.listen_to_proposals()
    policy = Policy(graph)
    assert graph.wait_for(lambda: bool(heard) and bool(graph.choices))
    assert (values_of(heard[0])["action"], graph.values()["variant"]) == ("stay", "fp32")
    assert policy.run_until(lambda: values_of(heard[-1])["action"] == "cheaper", 2000.0)
    values, status = values_of(heard[-1]), heard[-1].status[0]
    assert (values["variant"], values["runtime"], values["steps"]) == ("w8a8", "onnxruntime", "16")
    assert (values["cause"], values["watch"]) == ("latency", "propose")
    assert "2000.0 ms (p95), 250% of the budget of 800 ms" in status.message
    assert len(graph.choices) == 1
    _, watch = node.status()
    assert watch.values["asked"] == "onnxruntime/w8a8 with 16 steps"
    assert "proposed: go cheaper" in watch.values["decision.0"]
    assert watch.values["limit.share_down"] == "0.9"
    assert watch.values["load_1min"] or watch.values["absent"]
    before = len(heard)
    assert policy.run_until(lambda: values_of(heard[-1])["action"] == "stay", 50.0)
    assert len(heard) == before + 1
    assert "takes 50.0 ms" in heard[-1].status[0].message


def test_what_is_decided_is_the_choice_where_the_watch_may_switch(graph: Graph, tiny_bundle) -> None:
    node = graph.selector(bundle=str(scored_bundle(tiny_bundle)), runtime="onnxruntime", watch="switch", **QUICK)
    node.trigger_configure()
    node.trigger_activate()
    graph.listen()
    policy = Policy(graph)
    assert policy.run_until(lambda: len(graph.choices) > 1, 2000.0)
    values = graph.values()
    assert (values["variant"], values["steps"], values["watch"]) == ("w8a8", "16", "cheaper")
    assert values["ranking"] == "onnxruntime/w8a8,onnxruntime/fp32"
    assert values["runtime_version"]


@pytest.mark.parametrize(
    ("parameters", "changes", "words"),
    [
        ({"watch": "off"}, {}, "the watch is off"),
        ({}, {"requested": "fp32"}, "pinned to 'fp32'"),
        ({}, {"engine": "tensorrt/fp32"}, "does not hold"),
        ({}, {"chunks": "many"}, "nothing is heard"),
    ],
)
def test_nothing_is_proposed_where_nothing_is_to_be_decided(
    graph: Graph, tiny_bundle, parameters: dict[str, str], changes: dict[str, str], words: str
) -> None:
    node = graph.selector(bundle=str(scored_bundle(tiny_bundle)), runtime="onnxruntime", **QUICK, **parameters)
    node.trigger_configure()
    node.trigger_activate()
    heard = graph.listen_to_proposals()
    policy = Policy(graph)
    assert policy.run_until(lambda: policy.count > 100 and words in node.status()[1].message, 2000.0, **changes)
    assert graph.wait_for(lambda: bool(heard))
    assert len(heard) == 1


def test_thresholds_that_make_no_sense_leave_the_watch_as_it_was(graph: Graph, tiny_bundle) -> None:
    node = graph.selector(bundle=str(tiny_bundle()), **QUICK)
    node.trigger_configure()
    node.trigger_activate()
    assert graph.wait_for(lambda: len(node.status()) == 2)
    assert node.set_parameters([Parameter("watch_share_up", value=2.0)])[0].successful
    assert node.set_parameters([Parameter("watch_hold_up_s", value=3.0)])[0].successful
    for _ in range(5):
        graph.executor.spin_once(timeout_sec=0.05)
    assert node.status()[1].values["limit.share_up"] == "0.6"
    assert node.set_parameters([Parameter("watch_share_up", value=0.5)])[0].successful
    assert graph.wait_for(lambda: node.status()[1].values["limit.share_up"] == "0.5")
    assert node.status()[1].values["limit.hold_up_s"] == "3"
    assert not node.set_parameters([Parameter("watch", value="sometimes")])[0].successful
