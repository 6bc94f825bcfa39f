"""Processes of a cell with an arm, real or emulated: sensors, arm, watchdog, and for the emulated one its devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dcqfa_ros.ros.description import BringupOptions, NodeDescription, node

ARM_CELLS = ("emulated", "real")
CAMERAS = ("wrist", "front")


def arm_cell(options: BringupOptions, files: Sequence[Path]) -> tuple[list[NodeDescription], list[NodeDescription]]:
    """Return what runs beside the graph, and its lifecycle nodes in the order of bring-up.

    Raises:
        BringupError: a parameter that the watchdog needs is missing.
        CalibrationError: the cameras' calibration file cannot be relied on.
    """
    nodes = [node("wrench_node", files, {})]
    nodes += [
        node(f"{camera}_camera_node", files, {"camera_name": camera}, module="camera_node", needed=False)
        for camera in CAMERAS
    ]
    nodes.append(node("arm_node", files, {}, module="cell_arm_node"))
    if options.teleop:
        nodes.append(node("teleop_node", files, {"input": "joy"}, needed=False))
    return [], nodes
