"""``dcqfa demo`` and ``dcqfa up`` with every node as its own process, from bring-up to report, and their faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros.bench.processes import children
from dcqfa_ros.ros.isolation import child_environment
from dcqfa_ros.ros.testing import Graph, wait_until
from dcqfa_ros.trials.records import read_records


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dcqfa_ros.cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=child_environment(os.environ), capture_output=True, text=True, timeout=100
    )


class Running:
    """A command whose output is read while it runs."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dcqfa_ros.cli", *arguments],
            cwd=cwd,
            env=child_environment(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.output, f"{text!r} in\n{self.output[-3000:]}", 40.0)

    def end(self) -> int:
        code = self.process.wait(20)
        self._reader.join(5)
        return code


def one_called(name: bytes, supervisor: Running) -> int:
    """Process id of a child whose command line holds ``name``."""
    return next(p for p in children(supervisor.process.pid) if name in Path(f"/proc/{p}/cmdline").read_bytes())


def test_the_demo_runs_its_trials_and_leaves_records_summary_and_report(policy_bundle, tmp_path):
    done = run(
        "demo", "--bundle", str(policy_bundle()), "--realtime", "0", "--lockstep", "2", "--seed", "5", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    summary: dict[str, Any] = json.loads(done.stdout)
    assert [(t["seed"], t["mode"], t["stop_reason"]) for t in summary["trials"]] == [
        (5, "lockstep", "step_limit"),
        (6, "lockstep", "step_limit"),
    ]
    assert summary["missed_ticks"] == 0 and summary["variant"] in ("fp32", "w8a8") and summary["device"]
    folder = tmp_path / "out/demo"
    records = read_records(folder / "trials.jsonl")
    assert [len(r.curve) for r in records] == [300, 300] and all(r.chunks == 38 for r in records)
    assert (folder / "trials.csv").read_text().count("\n") == 3
    report = Path(summary["report"]).read_text()
    assert report.startswith("<!doctype html>") and "data:video/webm;base64," in report
    assert json.loads((folder / "summary.json").read_text())["mean_score"] == summary["mean_score"]
    assert "Traceback" not in done.stderr


def test_an_operator_runs_series_of_trials_on_a_graph_that_stays_up(policy_bundle, tmp_path):
    with Graph() as graph:
        nodes = {
            name: graph.spawn_node(f"dcqfa_ros.nodes.{name}", name, **parameters)
            for name, parameters in {
                "arm_node": {"max_steps": 16, "command_timeout_s": 20.0},  # a busy machine is not what this is about
                "policy_node": {"bundle": policy_bundle(), "variant": "fp32"},
                "trial_node": {"output": tmp_path / "series", "overwrite": True, "videos": 0},
            }.items()
        }
        for name, node in nodes.items():
            assert graph.activate(name), node.output
        assert "set parameter trials" in graph.trigger("trial_node/start").message
        assert "realtime:SEED" in graph.set_parameter("trial_node", "trials", ["soon:1"]).reason
        for number, plan in enumerate((["lockstep:3"], ["realtime:4", "lockstep:4"]), start=1):
            assert graph.set_parameter("trial_node", "trials", plan).successful
            assert graph.trigger("trial_node/start").success
            graph.wait_for("trial_node", "event", f"over {number} trials")
            records = read_records(tmp_path / "series/trials.jsonl")
            assert [f"{r.mode.value}:{r.seed}" for r in records] == plan
            assert [(r.stop_reason, r.steps, r.variant) for r in records] == [("step_limit", 16, "fp32")] * len(plan)
        assert nodes["trial_node"].process.poll() is None and "Traceback" not in nodes["trial_node"].output


def test_ctrl_c_brings_the_whole_graph_down_without_orphan_or_traceback(policy_bundle, tmp_path):
    up = Running("up", "--isolated", f"bundle:={policy_bundle()}", cwd=tmp_path)
    up.wait_for("graph active")
    up.wait_for("is active")
    nodes = children(up.process.pid)
    assert len(nodes) == 6, up.output
    up.process.send_signal(signal.SIGINT)
    assert up.end() == 0, up.output
    assert not [pid for pid in nodes if Path(f"/proc/{pid}").exists()]
    assert "Traceback" not in up.output


def test_a_killed_node_is_reported_by_name_and_ends_the_run_with_its_code(policy_bundle, tmp_path):
    up = Running("up", "--isolated", f"bundle:={policy_bundle()}", cwd=tmp_path)
    up.wait_for("graph active")
    victim = one_called(b"policy_node", up)
    os.kill(victim, signal.SIGKILL)
    assert up.end() == 128 + signal.SIGKILL
    assert "policy_node" in up.output.splitlines()[-1] and "Traceback" not in up.output


def test_a_misspelt_parameter_in_a_file_is_named_and_nothing_stays_up(policy_bundle, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("/**/arm_node:\n  ros__parameters:\n    comand_timeout_s: 1.0\n")
    done = run("up", "--isolated", f"bundle:={policy_bundle()}", f"parameters_file:={file}", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "arm_node has no parameter 'comand_timeout_s'; did you mean command_timeout_s?" in done.stdout


def test_trials_abandoned_half_way_end_the_demo_with_an_error(policy_bundle, tmp_path):
    demo = Running("demo", "--bundle", str(policy_bundle()), "--realtime", "1", "--lockstep", "0", cwd=tmp_path)
    demo.wait_for("is active")
    victim = one_called(b"arm_node", demo)
    os.kill(victim, signal.SIGKILL)
    assert demo.end() == 128 + signal.SIGKILL
    assert "did not finish: arm_node" in demo.output and "Traceback" not in demo.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["demo", "--bundle", "nothing"], "nothing"),
        (["demo", "--variant", "w2a2"], "w2a2"),
        (["demo", "--realtime", "0", "--lockstep", "0"], "at least one trial"),
        (["demo", "--seed", "-3"], "--seed"),
        (["up", "cell:=real"], "planar_position"),
        (["up", "speed:=3"], "speed"),
    ],
)
def test_wrong_arguments_are_one_line_and_start_nothing(policy_bundle, tmp_path, arguments, text):
    if "nothing" not in arguments:
        place = f"bundle:={policy_bundle()}" if arguments[0] == "up" else f"--bundle={policy_bundle()}"
        arguments = [*arguments, place]
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
