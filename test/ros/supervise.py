"""Runs toy nodes and a lifecycle manager under the supervisor: supervise.py NAMESPACE RESTART NAME=PARAMETERS...

PARAMETERS are a JSON object, or empty. The name ``stubborn`` is a program that ignores every signal it can.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dcqfa_ros.ros.bringup import NodeDescription
from dcqfa_ros.ros.supervisor import Supervisor

STUBBORN = (
    "import signal, time, subprocess, sys\n"
    "for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(n, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('child', child.pid, flush=True)\n"
    "time.sleep(600)\n"
)


def main(namespace: str, restart: str, *specs: str) -> int:
    here = str(Path(__file__).parent)
    nodes = []
    for spec in specs:
        name, _, parameters = spec.partition("=")
        if name == "stubborn":
            nodes.append(NodeDescription(name, command=(sys.executable, "-c", STUBBORN)))
            continue
        values = json.loads(parameters or "{}")
        nodes.append(NodeDescription(name, "toy_node", values, env={"PYTHONPATH": here + ":" + _path()}))
    names = [n.name for n in nodes if n.module]
    if names:
        manager = "lifecycle_manager_node"
        parameters = {"node_names": names, "optional_names": [n for n in names if n.startswith("optional")]}
        nodes.append(NodeDescription(manager, f"dcqfa_ros.nodes.{manager}", parameters, stops_first=True))
    outcome = Supervisor(nodes, namespace=namespace, restart=restart == "restart").run()
    print("outcome", outcome.exit_code, outcome.node, outcome.reason, flush=True)
    return outcome.exit_code


def _path() -> str:
    return str(Path(__file__).parents[2])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
