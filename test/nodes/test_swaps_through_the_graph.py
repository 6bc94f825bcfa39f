"""Variants exchanged by ``ros2 param set`` while trials run: the same scores, the truth at every moment, and faults."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lifecycle_msgs.msg import Transition
from rcl_interfaces.srv import GetParameters

from dcqfa_ros.bench.processes import children
from dcqfa_ros.bundle.write import write_bundle
from dcqfa_ros.ros.diagnostics import Report
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.testing import Graph, wait_until
from dcqfa_ros.trials.records import TrialRecord, read_records
from test.conftest import make_spec
from test.runtime.conftest import denoiser_model, tiny_spec

PLAN = ["lockstep:3", "lockstep:4", "lockstep:5"]


class Cell:
    """Arm, policy and trials on a bundle whose two variants hold the same weights."""

    def __init__(self, graph: Graph, bundle: Path, output: Path, nodes: tuple[str, ...], **policy: Any) -> None:
        self.graph, self.output = graph, output
        self.active: list[str] = []
        entry = interface("active_variant")
        graph.node.create_subscription(
            entry.message_class(), entry.name, lambda message: self.active.append(message.data), qos(entry.qos)
        )
        parameters: dict[str, dict[str, Any]] = {
            "arm_node": {"max_steps": 200},
            "policy_node": {"bundle": bundle, "variant": "fp32", **policy},
            "trial_node": {"output": output, "overwrite": True, "videos": 0},
        }
        self.nodes = {n: graph.spawn_node(f"dcqfa_ros.nodes.{n}", n, **parameters[n]) for n in nodes}
        for name, node in self.nodes.items():
            assert graph.activate(name), node.output
        self.runs("fp32")
        wait_until(self.swaps, "the outcome of the first exchange")

    def runs(self, variant: str) -> None:
        wait_until(lambda: self.active[-1:] == [variant], f"{variant} active; {self.active}")

    def parameter(self) -> str:
        request = GetParameters.Request(names=["variant"])
        value: str = self.graph.call(GetParameters, "policy_node/get_parameters", request).values[0].string_value
        return value

    def swaps(self) -> list[Report]:
        return [r for r in list(self.graph.reports) if r.status.name == "event" and "swap_id" in r.status.values]

    def request(self, variant: str) -> Report:
        """Set the parameter and return what is told of the exchange."""
        known = len(self.swaps())
        assert self.graph.set_parameter("policy_node", "variant", variant).successful
        told: list[Report] = wait_until(lambda: self.swaps()[known:], f"the outcome of {variant}")
        return told[0]

    def trials(self, number: int) -> list[TrialRecord]:
        assert self.graph.set_parameter("trial_node", "trials", PLAN).successful
        assert self.graph.trigger("trial_node/start").success

        def done() -> bool:
            reports = [r for r in list(self.graph.reports) if r.node == "trial_node"]
            told = [r.status.message for r in reports if r.status.name == "event"]  # diagnostics repeat it at 1 Hz
            return sum(text.startswith("done: ") for text in told) >= number

        wait_until(done, "the end of the trials", 100.0)
        return read_records(self.output / "trials.jsonl")


@pytest.fixture
def cell(policy_bundle: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Cell]]:
    with Graph() as graph:
        yield lambda *nodes, **policy: Cell(graph, policy_bundle(alike=True), tmp_path / "series", nodes, **policy)


@pytest.mark.timeout(300)
def test_swaps_during_trials_leave_their_scores_exactly_as_they_are(cell, policy_bundle):
    graph_cell = cell("arm_node", "policy_node", "trial_node")
    other = f"{policy_bundle(folder='other', alike=True)}:fp32"
    fixed = graph_cell.trials(1)
    assert all(r.swaps == () and [p.engine for p in r.parts] == ["onnxruntime/fp32"] for r in fixed)
    halt, wanted = threading.Event(), itertools.cycle(("w8a8", other, "fp32"))

    def swap() -> None:
        while not halt.is_set():
            graph_cell.request(next(wanted))

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        swapped, number = [], 2
        while sum(len(r.parts) > 1 for r in swapped) < 2:  # a trial may be over before a worker is loaded
            assert number < 40, "no exchange came while a trial ran"
            swapped += graph_cell.trials(number)
            number += 1
    finally:
        halt.set()
        swapper.join(60)
    expected = {r.seed: (r.score, r.curve, r.chunks) for r in fixed}
    assert all((r.score, r.curve, r.chunks) == expected[r.seed] for r in swapped)
    assert all(r.stop_reason == "step_limit" and r.steps == 200 for r in swapped)
    exchanges = [s for r in swapped for s in r.swaps]
    assert exchanges and all(s.outcome == "switched" and s.reason == "" and s.load_ms > s.gap_ms for s in exchanges)
    for record in swapped:
        firsts = [part.first_chunk for part in record.parts]
        assert firsts[0] == 0 and firsts == sorted(set(firsts)) and firsts[-1] < record.chunks
        known = {f"onnxruntime/{name}" for name in ("fp32", "w8a8", other)}
        assert {part.engine for part in record.parts} <= known
    told = [r.status.values["active"] for r in graph_cell.swaps()]
    wait_until(lambda: graph_cell.active[-1:] == told[-1:], "the last word on what is active")
    assert [name for name, _ in itertools.groupby(graph_cell.active) if name] == told


@pytest.mark.timeout(300)
def test_an_exchange_that_fails_later_is_told_with_its_number_and_sets_the_parameter_back(cell, policy_bundle):
    graph_cell = cell("policy_node")
    graph = graph_cell.graph
    refused = graph.set_parameter("policy_node", "variant", "w2a2")
    assert not refused.successful and "w2a2" in refused.reason
    contract = policy_bundle(folder="contract", action=_faster())
    refused = graph.set_parameter("policy_node", "variant", f"{contract}:fp32")
    assert not refused.successful and "action.rate_hz: 20.0, expected 10.0" in refused.reason

    damaged = policy_bundle(folder="damaged", alike=True)
    (damaged / "variants/fp32/denoiser.onnx").write_bytes(b"")
    _, files = tiny_spec(alike=True)
    files["variants/w8a8/denoiser.onnx"] = denoiser_model(False, sign=-1.0)
    wrong = policy_bundle(folder="wrong")
    write_bundle(wrong, make_spec(files, alike=True), files)
    before = {"variant": "fp32"}

    def fails(variant: str, told: str) -> None:
        outcome = graph_cell.request(variant).status
        assert outcome.level == 2 and outcome.values["outcome"] == "failed" and told in outcome.values["reason"]
        assert outcome.values["active"] == before["variant"] and int(outcome.values["swap_id"]) > 1
        wait_until(lambda: graph_cell.parameter() == before["variant"], "the parameter set back")
        assert graph_cell.active[-1] == before["variant"]

    fails(f"{damaged}:fp32", "denoiser.onnx")
    assert graph.set_parameter("policy_node", "engine_memory_limit_mb", 24).successful
    fails("w8a8", "engine_memory_limit_mb is 24")
    assert graph.set_parameter("policy_node", "engine_memory_limit_mb", 0).successful
    assert graph.set_parameter("policy_node", "engine_start_timeout_s", 0.001).successful
    fails("w8a8", "was killed")
    assert graph.set_parameter("policy_node", "engine_start_timeout_s", 0.0).successful
    assert graph_cell.request(f"{wrong}:fp32").status.level == 0
    before["variant"] = f"{wrong}:fp32"
    fails(f"{wrong}:w8a8", "computes other actions than")
    assert graph_cell.request("auto").status.values["active"] == "fp32", "auto: nobody chose, so the default"
    assert graph_cell.parameter() == "auto"


@pytest.mark.timeout(300)
def test_where_memory_is_short_the_policy_holds_or_refuses_as_configured(cell):
    graph_cell = cell("policy_node", memory_reserve_mb=2**40 // 2**20)
    graph = graph_cell.graph
    refused = graph_cell.request("w8a8").status
    assert refused.level == 2 and "swap_when_memory_is_short is refuse" in refused.values["reason"]
    wait_until(lambda: graph_cell.parameter() == "fp32", "the parameter set back")
    assert not graph.set_parameter("policy_node", "swap_when_memory_is_short", "hope").successful
    assert graph.set_parameter("policy_node", "swap_when_memory_is_short", "stop").successful
    swapped = graph_cell.request("w8a8").status
    assert swapped.level == 0 and swapped.values["held"] == "true" and float(swapped.values["gap_ms"]) > 50.0
    graph.wait_for("policy_node", "event", "the policy holds until the exchange of variants is done")
    wait_until(lambda: graph_cell.active[-3:] == ["fp32", "", "w8a8"], "nothing active in between")


@pytest.mark.timeout(300)
def test_a_variant_whose_worker_was_killed_runs_again_after_the_next_activation(cell):
    graph_cell = cell("policy_node")
    graph, policy = graph_cell.graph, graph_cell.nodes["policy_node"]
    (worker,) = children(policy.process.pid)
    os.kill(worker, signal.SIGKILL)
    graph.wait_for("policy_node", "event", "SIGKILL")
    graph_cell.runs("")
    wait_until(lambda: graph.state("policy_node") == "inactive", "the safe stop")
    assert not Path(f"/proc/{worker}").exists()
    assert graph.change("policy_node", Transition.TRANSITION_ACTIVATE)
    graph_cell.runs("fp32")


def _faster() -> dict[str, Any]:
    action: dict[str, Any] = tiny_spec()[0].action.model_dump(mode="json")
    return action | {"rate_hz": 20.0}
