"""A policy of random weights reads two RGB-D cameras, wrench, joints and pose, and moves an emulated arm."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dcqfa_ros.bench.arm import wrenches
from dcqfa_ros.bench.arm_policy import CAMERAS, SOURCES, VARIANT, ArmPolicy, write_arm_policy
from dcqfa_ros.ros.conversions import status_values
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.testing import Graph, Report, wait_until
from dcqfa_ros.sim.inovo import InovoEmulator
from test.commands.test_up import EXECUTABLE

SIZE = ArmPolicy(width=96, height=64, side=48, camera_rate=15.0, hidden=16, layers=1, steps=2, max_age_ms=10_000.0)
CAMERA = {"source": "synthetic", "width": SIZE.width, "height": SIZE.height, "fps": SIZE.camera_rate}
ARM = {  # generous: the machine that runs this may be busy
    "command_source": "policy", "rate": 50.0, "watchdog.use": "none",
    "workspace.minimum": [-0.4, 0.2, 0.1], "workspace.maximum": [0.4, 0.6, 0.8],
    "maximum_age.wrench": 0.5, "maximum_age.state": 0.5, "maximum_age.command": 2.0, "maximum_age.observation": 5.0,
    "maximum_age.camera": 2.0, "hold_after_s": 0.9, "stop_after_s": 2.0, "clock.silence_s": 10.0,
    "clock.maximum_skew_ms": 200.0,
}  # fmt: skip
POLICY = {"variant": VARIANT, "runtime": "onnxruntime", "observation_sources": list(SOURCES)}
TOLERANCES = [f"{key}=400.0" for key in ("wrist", "wrist_depth", "wrench", "joints", "tcp_pose")]


def flow(parameters: dict[str, Any]) -> dict[str, str]:
    return {key: yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n...")[0].strip()
            for key, value in parameters.items()}  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_arm_policy(tmp_path / "random_arm", SIZE)


@pytest.fixture
def graph() -> Iterator[Graph]:
    with Graph() as graph:
        yield graph


class Watched:
    """What the arm says."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.states: list[dict[str, str]] = []
        self.places: list[np.ndarray] = []
        self._hear("arm_state", lambda m: self.states.append(status_values(m)))
        self._hear("tcp_pose", self._pose)

    def _hear(self, key: str, callback: Callable[[Any], None]) -> None:
        entry = interface(key)
        self.graph.node.create_subscription(entry.message_class(), entry.name, callback, qos(entry.qos))

    def _pose(self, message: Any) -> None:
        p = message.pose.position
        self.places.append(np.array([p.x, p.y, p.z]))

    def moves(self) -> None:
        """Arm until the policy has moved the arm; what a busy machine stops is begun again."""
        wait_until(lambda: self.places, "a pose")
        start = self.places[-1]
        refused = [""]

        def moved() -> bool:
            if not self.states or self.states[-1]["state"] == "disarmed":
                self.graph.trigger("arm_node/reset_stop")
                refused[0] = self.graph.trigger("arm_node/arm").message
            return bool(np.linalg.norm(self.places[-1] - start) > 0.003)

        try:
            wait_until(moved, "motion by the policy", 90.0)
        except AssertionError:
            raise AssertionError(f"no motion: {refused[0]}; {self.states[-1:]}; {self.policy()}") from None

    def policy(self) -> dict[str, str]:
        found: list[Report] = [r for r in self.graph.reports if r.node == "policy_node" and r.status.name == "policy"]
        return dict(found[-1].status.values, message=found[-1].status.message) if found else {}


def test_pictures_wrench_and_joints_move_the_arm_which_stops_when_its_policy_dies(graph: Graph, bundle: Path) -> None:
    with InovoEmulator(ready=True, time_scale=0.05) as emulator, wrenches(graph):
        watched = Watched(graph)
        for camera in CAMERAS:
            graph.spawn_node(
                "dcqfa_ros.nodes.camera_node", f"{camera}_camera_node", **flow({**CAMERA, "camera_name": camera})
            )
        address = {"inovo.host": "127.0.0.1", "inovo.port": emulator.port}
        arm = graph.spawn_node("dcqfa_ros.nodes.cell_arm_node", "arm_node", **flow({**ARM, **address}))
        given = {**POLICY, "bundle": str(bundle), "sync_tolerance_ms": TOLERANCES}
        policy = graph.spawn_node("dcqfa_ros.nodes.policy_node", "policy_node", **flow(given))
        for name in (*(f"{camera}_camera_node" for camera in CAMERAS), "arm_node", "policy_node"):
            assert graph.activate(name), (name, arm.output, policy.output)
        watched.moves()
        wait_until(lambda: emulator.frames and any(f.moves for f in emulator.frames), "motion")
        reported = wait_until(lambda: (v := watched.policy()).get("overhead_p50_ms") and v, "figures")
        assert reported["reference"] == "front"
        assert all(int(reported[f"pictures.{key}"]) for key in (*CAMERAS, *(f"{c}_depth" for c in CAMERAS)))
        policy.send(signal.SIGKILL)
        state = wait_until(lambda: (s := watched.states[-1])["state"] == "disarmed" and s, "stop")
        assert state["code"] in ("command_timeout", "observation_age"), state
        wait_until(lambda: not emulator.is_moving, "rest")
        last = emulator.frames[-1].number
        assert not graph.trigger("arm_node/arm").success, "it stays inactive until an operator has reset the stop"
        assert not [f for f in emulator.frames if f.number > last and f.moves]
        graph.stop_all()


def test_the_emulated_cell_comes_up_with_a_bundle_for_its_arm(graph: Graph, bundle: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {f"{camera}_camera_node": dict(CAMERA) for camera in CAMERAS}  # rcl reads no aliases
    sections |= {"arm_node": ARM, "policy_node": {"sync_tolerance_ms": TOLERANCES}}
    sections["wrench_node"] = {"maximum_age_ms": 500, "silence_ms": 1000}
    file = tmp_path / "cell.yaml"
    file.write_text(yaml.safe_dump({f"/**/{name}": {"ros__parameters": values} for name, values in sections.items()}))
    watched = Watched(graph)
    options = ("cell:=emulated", f"bundle:={bundle}", f"variant:={VARIANT}", "watchdog:=false")
    run = graph.spawn(*EXECUTABLE, *options, f"parameters_file:={file}")
    try:
        graph.wait_graph("active", timeout=90.0)
        watched.moves()
    except AssertionError as error:
        raise AssertionError(f"{error}; {run.output[:2500]}") from None
    run.send(signal.SIGINT)
    assert run.wait(10.0) == 0
    assert "Traceback" not in run.output
