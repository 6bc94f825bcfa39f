"""A real graph: under load the selector has the policy go to the cheaper variant and back; a pinned one is left alone.

The load is in the diagnostics: the selector hears the policy's through a relay that replaces the measured latencies by
those of a device under load, because a device that is really under load would make the test a matter of luck.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diagnostic_msgs.msg import DiagnosticArray, KeyValue

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.bundle.write import write_bundle
from dcqfa_ros.devices.detect import detect
from dcqfa_ros.ros.diagnostics import Report, from_message
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.testing import Graph, wait_until
from test.runtime.conftest import tiny_spec

WATCHED = "watched_diagnostics"
COST_MS = {"onnxruntime/fp32": 40.0, "onnxruntime/w8a8": 15.0}
SCORES = {("fp32", 16): 0.60, ("w8a8", 16): 0.55, ("fp32", 8): 0.56}
QUICK = {"watch_period_s": 0.2, "watch_window_s": 1.2, "watch_hold_down_s": 1.0, "watch_hold_up_s": 1.0}
QUICK |= {"watch_dwell_s": 0.6}


def write_scored_bundle(folder: Path) -> Path:
    """Write the tiny policy with latencies of this device, and scores that make fp32 the first choice."""
    spec, files = tiny_spec()
    document = json.loads(spec.model_dump_json())
    for variant in document["variants"]:
        name = variant["name"]
        quality, latency = variant["quality"][0], variant["latency"][0]
        variant["quality"] = [quality | {"mean": m, "steps": s} for (of, s), m in SCORES.items() if of == name]
        cost = COST_MS[f"onnxruntime/{name}"]
        here = {"device": detect().fingerprint, "kind": "predicted", "p50_ms": cost, "p99_ms": cost}
        variant["latency"] = [latency | here]
    write_bundle(folder, BundleSpec.model_validate(document), files)
    return folder


class Cell:
    """A policy, a selector in mode ``switch``, and the relay between them."""

    def __init__(self, graph: Graph, bundle: Path, **parameters: Any) -> None:
        self.graph, self.load, self.count = graph, 1.0, 0
        self.heard: list[Report] = []  # of the selector
        self.choices: list[dict[str, str]] = []
        entry = interface("diagnostics")
        self.relay = graph.node.create_publisher(DiagnosticArray, WATCHED, qos(entry.qos))
        graph.node.create_subscription(DiagnosticArray, entry.name, self._pass_on, qos(entry.qos))
        graph.node.create_subscription(
            DiagnosticArray, WATCHED, lambda m: self.heard.extend(from_message(m)), qos(entry.qos)
        )
        graph.node.create_subscription(
            DiagnosticArray,
            interface("choice").name,
            lambda m: self.choices.append({v.key: v.value for v in m.status[0].values}),
            qos("latched"),
        )
        graph.spawn_node("dcqfa_ros.nodes.policy_node", "policy_node", bundle=bundle, selector_timeout_s=60.0)
        arguments = ["--ros-args", "-r", f"diagnostics:={WATCHED}"]
        for key, value in {"bundle": bundle, "runtime": "onnxruntime", "watch": "switch", **parameters}.items():
            arguments += ["-p", f"{key}:={value}"]
        graph.spawn(sys.executable, "-m", "dcqfa_ros.nodes.selector_node", *arguments)
        assert graph.activate("policy_node")
        assert graph.activate("selector_node")

    def _pass_on(self, message: DiagnosticArray) -> None:
        for status in message.status:
            values = {pair.key: pair.value for pair in status.values}
            if status.name != "policy_node: policy" or not values.get("engine"):
                continue
            self.count += 4
            took = COST_MS[values["engine"]] * int(values["steps"]) / 16 * self.load
            values |= {"inference_count": str(self.count), "inference_recent_ms": " ".join([f"{took:.2f}"] * 4)}
            status.values = [KeyValue(key=key, value=value) for key, value in values.items()]
        self.relay.publish(message)

    def policy(self) -> dict[str, str]:
        """Return the policy's last report."""
        reports = [r for r in list(self.graph.reports) if r.node == "policy_node" and r.status.name == "policy"]
        return dict(reports[-1].status.values) if reports else {}

    def wait_for(self, variant: str, steps: str = "16") -> None:
        def runs() -> bool:
            values = self.policy()
            return (values.get("variant"), values.get("steps")) == (variant, steps)

        wait_until(runs, f"{variant} with {steps} steps; {self.policy()}")

    def events(self, text: str) -> list[Report]:
        return [r for r in list(self.heard) if r.status.name == "event" and text in r.status.message]

    def watch(self) -> str:
        reports = [r for r in list(self.heard) if r.node == "selector_node" and r.status.name == "watch"]
        return reports[-1].status.message if reports else ""


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[Callable[..., Cell]]:
    bundle = write_scored_bundle(tmp_path / "scored")
    with Graph() as graph:
        graph.env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        yield lambda **parameters: Cell(graph, bundle, budget_latency_ms=100.0, **{**QUICK, **parameters})
        graph.stop_all()


def test_load_leads_to_what_is_cheaper_its_end_back_and_a_pin_is_left_alone(cell: Callable[..., Cell]) -> None:
    made = cell(steps_allowed="[8]")
    made.wait_for("fp32")
    made.load = 6.0
    made.wait_for("w8a8")
    (down,) = made.events("switching: go cheaper")
    assert "from onnxruntime/fp32 with 16 steps to onnxruntime/w8a8 with 16 steps" in down.status.message
    assert "a chunk takes 240.0 ms (p95), 240% of the budget of 100 ms" in down.status.message
    assert (down.status.values["cause"], down.status.values["slow_down"]) == ("latency", "6.00")
    assert made.choices[-1]["ranking"] == "onnxruntime/w8a8,onnxruntime/fp32"
    assert (made.choices[-1]["watch"], made.choices[-1]["steps"]) == ("cheaper", "16")
    made.load = 1.0
    made.wait_for("fp32")
    (back,) = made.events("switching: go back")
    assert back.status.values["cause"] == "relief"
    assert made.choices[-1]["watch"] == "back"
    swaps = made.policy()["swaps"]
    made.load = 3.0
    made.wait_for("fp32", "8")  # takes 60 ms, and its score is above that of w8a8
    assert made.policy()["swaps"] == swaps, "steps change without an exchange of engines"
    assert made.graph.set_parameter("policy_node", "variant", "fp32").successful
    made.load = 6.0
    wait_until(lambda: "pinned to 'fp32'" in made.watch(), "the pin is noticed")
    told, before = len(made.events("switching: ")), made.count
    wait_until(lambda: made.count > before + 8, "some more reports under load")
    assert len(made.events("switching: ")) == told
    assert (made.policy()["swaps"], made.policy()["variant"], made.policy()["steps"]) == (swaps, "fp32", "16")
