"""``dcqfa tool-load``: from a recording, and from a running graph with an operator at the keyboard."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from geometry_msgs.msg import PoseStamped, WrenchStamped

from dcqfa_ros import cli
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.testing import Graph
from dcqfa_ros.safety.tool_load import GRAVITY, rotation_matrix
from dcqfa_ros.safety.tool_load_files import Recorded, load_readings, save_readings

S = float(np.sqrt(0.5))
POSES = (
    (1.0, 0.0, 0.0, 0.0),
    (S, 0.0, 0.0, S),
    (S, 0.0, 0.0, -S),
    (S, 0.0, S, 0.0),
    (S, 0.0, -S, 0.0),
    (0.0, 0.0, 0.0, 1.0),
)
MASS, CENTRE = 0.8, (0.0, 0.01, 0.06)


def reading(quaternion) -> list[float]:
    force = MASS * (rotation_matrix(quaternion).T @ np.array([0, 0, -GRAVITY]))
    return [*force.tolist(), *np.cross(CENTRE, force).tolist()]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "recording.jsonl"
    save_readings(path, [Recorded(q, tuple(reading(q)), str(n)) for n, q in enumerate(POSES) for _ in range(3)])
    return path


def test_a_recording_becomes_a_parameter_file(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tool_load.yaml"
    assert cli.main(["tool-load", str(recording), "--output", str(output), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["load"]["mass"] == pytest.approx(MASS)
    assert document["load"]["centre_of_mass"] == pytest.approx(CENTRE, abs=1e-9)
    assert document["torque_condition"] < 2
    parameters = yaml.safe_load(output.read_text())["/**/wrench_node"]["ros__parameters"]
    assert parameters["mass"] == pytest.approx(MASS)
    assert cli.main(["tool-load", str(recording)]) == 0
    assert "mass            0.8000 kg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--orientations", "3"], "--orientations: expected 4 or more, got 3"),
        (["--samples", "0"], "--samples: expected 1 or more, got 0"),
        (["missing.csv"], "missing.csv: cannot be read"),
        (["few.jsonl"], "poor excitation: 1 standstills, expected at least 4"),
        (["few.jsonl", "--record", "again.jsonl"], "--record: nothing is recorded now"),
        (["--record", "no/where.jsonl"], "no/where.jsonl: cannot be written (the folder no does not exist)"),
        (["--record", "."], ".: cannot be written (it is a folder)"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("DCQFA_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    save_readings(tmp_path / "few.jsonl", [Recorded(POSES[0], tuple(reading(POSES[0])), None)])
    assert cli.main(["tool-load", *arguments, "--output", "out.yaml"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.yaml").exists()


class Cell:
    """Says the pose of an arm and what its sensor reads, at 100 Hz."""

    def __init__(self, graph: Graph) -> None:
        self.pose = 0
        self._publishers = {
            key: graph.node.create_publisher(kind, interface(key).name, qos(interface(key).qos))
            for key, kind in (("wrench_raw", WrenchStamped), ("tcp_pose", PoseStamped))
        }
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._say, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._halt.set()
        self._thread.join()

    def _say(self) -> None:
        while not self._halt.wait(0.01):
            quaternion = POSES[self.pose]
            pose, wrench = PoseStamped(), WrenchStamped()
            o, f, t = pose.pose.orientation, wrench.wrench.force, wrench.wrench.torque
            o.x, o.y, o.z, o.w = quaternion
            f.x, f.y, f.z, t.x, t.y, t.z = reading(quaternion)
            self._publishers["tcp_pose"].publish(pose)
            self._publishers["wrench_raw"].publish(wrench)


@pytest.fixture
def graph() -> Iterator[Graph]:
    with Graph() as made:
        yield made


def test_the_guided_routine_listens_to_the_graph(graph: Graph, tmp_path: Path) -> None:
    cell = Cell(graph)
    kept, output = tmp_path / "kept.jsonl", tmp_path / "out.yaml"
    command = [sys.executable, "-m", "dcqfa_ros.cli", "tool-load", "--samples", "20", "--json"]
    process: Any = subprocess.Popen(
        [*command, "--record", str(kept), "--output", str(output)],
        env=graph.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        for number in range(len(POSES)):
            prompt = ""
            while "to end: " not in prompt:
                character = process.stderr.read(1)
                assert character, f"it ended: {prompt}"
                prompt += character
            cell.pose = number
            threading.Event().wait(0.3)  # the arm arrives before the operator says so
            process.stdin.write("\n")
            process.stdin.flush()
        out, err = process.communicate(timeout=30)
    finally:
        watchdog.cancel()
        process.kill()
        cell.close()
    assert process.returncode == 0, err
    assert json.loads(out)["load"]["mass"] == pytest.approx(MASS, abs=1e-6)
    assert len(load_readings(kept)) == 20 * len(POSES)
    assert output.exists()


def test_a_graph_without_the_sensor_is_said_by_topic(graph: Graph) -> None:
    code = (
        "import sys; from dcqfa_ros.ros.tool_load_client import graph_readings\n"
        "with graph_readings('cell', appear_s=0.5) as source: source.record(1)"
    )
    spawned = graph.spawn(sys.executable, "-c", code)
    assert spawned.wait() == 1
    assert "no wrench on /cell/wrench_node/raw: start and activate wrench_node" in spawned.output
