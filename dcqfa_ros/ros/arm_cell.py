"""Processes of a cell with an arm, real or emulated: sensors, arm, watchdog, and for the emulated one its devices."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dcqfa_ros.drivers.extrinsics import load_extrinsics
from dcqfa_ros.paths import find_config
from dcqfa_ros.ros.description import PYTHON, BringupError, BringupOptions, NodeDescription, node
from dcqfa_ros.ros.parameter_files import full_namespace, node_parameters

ARM_CELLS = ("emulated", "real")
CAMERAS = ("wrist", "front")
TOOL_Z, TOOL_MASS, TOOL_COM_Z = 0.15, 0.9, 0.06
"""The emulated tool: m before the flange, kg, m; ``config/emulated_cell.yaml`` tells the nodes of it."""


def arm_cell(options: BringupOptions, files: Sequence[Path]) -> tuple[list[NodeDescription], list[NodeDescription]]:
    """Return what runs beside the graph, and its lifecycle nodes in the order of bring-up.

    Raises:
        BringupError: a parameter that the watchdog needs is missing or wrong.
        ParameterFileError: a file is no parameter file.
        CalibrationError: the cameras' calibration file cannot be relied on.
    """
    arm = file_parameters(files, options.namespace, "arm_node")
    own: dict[str, Any] = {}
    wrench: dict[str, Any] = {}
    beside: list[NodeDescription] = []
    if options.cell == "emulated":
        own |= {"inovo.host": "127.0.0.1", "inovo.port": _free_port()}
        wrench = {"port": str(_temporary(f"ft300s_{own['inovo.port']}"))}
        beside.append(_emulator(own["inovo.port"], wrench["port"], {**arm, **own}))
    if options.watchdog and watchdog_is_used(arm):
        address = arm.get("watchdog.address") or f"unix:{_temporary(f'watchdog_{_token(options.namespace)}.sock')}"
        own["watchdog.address"] = address
        beside.append(_watchdog({**arm, **own}))
    for camera in CAMERAS:
        file = file_parameters(files, options.namespace, f"{camera}_camera_node").get("extrinsics.calibration_file")
        if file:
            load_extrinsics(find_config(str(file)), [camera])
    nodes = [
        node("wrench_node", files, wrench),
        *(
            node(f"{camera}_camera_node", files, {"camera_name": camera}, module="camera_node", needed=False)
            for camera in CAMERAS
        ),
        node("arm_node", files, own, module="cell_arm_node"),
    ]
    if options.teleop:
        nodes.append(node("teleop_node", files, {"input": "joy"}, needed=False))
    return beside, nodes


def watchdog_is_used(arm: Mapping[str, Any]) -> bool:
    """Whether ``arm_node`` with these parameters relies on a watchdog process (see its parameter ``watchdog.use``)."""
    use = arm.get("watchdog.use", "auto")
    return use == "required" or (use == "auto" and arm.get("driver", "inovo") == "inovo")


def file_parameters(files: Sequence[Path], namespace: str, name: str) -> dict[str, Any]:
    """Return what parameter files set for node ``name`` in ``namespace``, with dotted names; later files win.

    Raises:
        ParameterFileError: a file is no parameter file; ROS 2 would refuse it later, in every node.
    """
    found: dict[str, Any] = {}
    path = f"{full_namespace(namespace)}/{name}"
    for file in files:
        found |= node_parameters(file, path)
    return found


def _emulator(port: int, link: str, arm: Mapping[str, Any]) -> NodeDescription:
    command = (
        *(PYTHON, "-m", "dcqfa_ros.cli", "emulate", "cell", "--port", str(port), "--ft300s-link", link),
        *("--variant", str(arm.get("inovo.variant", "short")), "--gripper", str(arm.get("inovo.gripper", ""))),
        *("--tool-z", str(TOOL_Z), "--tool-mass", str(TOOL_MASS), "--tool-com-z", str(TOOL_COM_Z)),
    )
    return NodeDescription("emulator", command=command)


def _watchdog(arm: Mapping[str, Any]) -> NodeDescription:
    try:
        host, port = str(arm["inovo.host"]), int(arm["inovo.port"])
    except (KeyError, ValueError) as error:
        raise BringupError(f"arm_node: the watchdog needs the parameters inovo.host and inovo.port: {error}") from error
    url = f"ws://{host}:{port}"
    listen = str(arm["watchdog.address"])
    return NodeDescription("watchdog", command=(PYTHON, "-m", "dcqfa_ros.watchdog", "--url", url, "--listen", listen))


def _temporary(name: str) -> Path:
    """Return a path of this user for a socket or link that lives as long as the cell."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(folder, f"dcqfa_{os.getuid()}_{name}")


def _token(namespace: str) -> str:
    return f"{os.getpid()}_{re.sub('[^A-Za-z0-9]+', '_', namespace.strip('/'))}".rstrip("_")


def _free_port() -> int:
    """Return a TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
