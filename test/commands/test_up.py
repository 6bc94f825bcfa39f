"""`dcqfa up` from the command line: what it refuses, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dcqfa_ros.cli import main
from dcqfa_ros.ros.isolation import claim_namespace
from dcqfa_ros.ros.testing import Graph

EXECUTABLE = (sys.executable, "-m", "dcqfa_ros.cli", "up")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "expected name:=value, got 'nonsense'"),
        (["cell:=emulated", "bundle:=pusht_keypoints"], "bundle:=pusht_keypoints: its actions are planar_position"),
        (["bundle:=nowhere"], "nowhere: no such bundle"),
    ],
)
def test_what_cannot_be_brought_up_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dcqfa: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_second_stack_in_the_namespace_is_refused_at_once(
    tiny_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "103")
    with claim_namespace(103, "cell_a"):
        assert main(["up", f"bundle:={tiny_bundle()}", "namespace:=cell_a"]) == 2
    assert f"a stack runs already in namespace /cell_a of ROS domain 103 (process {os.getpid()})" in (
        capsys.readouterr().err
    )


def test_a_graph_left_unconfigured_comes_up_and_ends_with_ctrl_c(tiny_bundle: Callable[..., Path]) -> None:
    with Graph("cell_b") as graph:
        run = graph.spawn(*EXECUTABLE, f"bundle:={tiny_bundle()}", "namespace:=cell_b", "autostart:=false")
        for node in ("arm_node", "camera_node", "selector_node", "policy_node"):
            graph.wait_for(node, "lifecycle", state="unconfigured")
        graph.wait_graph("inactive")
        run.send(signal.SIGINT)
        assert run.wait(6.0) == 0
        assert "dcqfa up: down: signal SIGINT" in run.output
        assert "Traceback" not in run.output


def test_a_damaged_bundle_ends_the_run_and_says_why(tiny_bundle: Callable[..., Path]) -> None:
    folder = tiny_bundle()
    next(folder.rglob("*.onnx")).write_bytes(b"other")
    with Graph() as graph:
        run = graph.spawn(*EXECUTABLE, f"bundle:={folder}", "variant:=fp32")
        assert run.wait() == 1
        assert "policy_node refused to configure" in run.output
        assert "Traceback" not in run.output


def test_the_emulated_cell_comes_up_with_every_node_active_and_ends_with_ctrl_c() -> None:
    nodes = ("wrench_node", "wrist_camera_node", "front_camera_node", "arm_node")
    with Graph("cell_c") as graph:
        run = graph.spawn(*EXECUTABLE, "cell:=emulated", "namespace:=cell_c")
        graph.wait_graph("active", timeout=90.0)
        for node in nodes:
            graph.wait_for(node, "lifecycle", state="active")
        graph.wait_for("arm_node", "driver", "ready")
        graph.wait_for("arm_node", "arm", "disarmed: not armed since start")
        run.send(signal.SIGINT)
        assert run.wait(10.0) == 0
        assert "dcqfa up: down: signal SIGINT" in run.output
        assert "Traceback" not in run.output
        assert "still runs" not in run.output
