"""Bring up the graph described in ``dcqfa_ros.ros.bringup``: ``ros2 launch dcqfa_ros policy.launch.py cell:=pusht``.

Nodes are run as ``python -m module``, which works after colcon, pip and editable installs alike; a plain pip install
has no libexec folder for ``Node(package=...)``. ``python:=`` chooses the nodes' interpreter where ``ros2`` itself runs
under another one than the environment with this package's dependencies.
"""

from __future__ import annotations

import os
import sys
from functools import partial

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, Shutdown
from launch.events.process import ProcessExited
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from dcqfa_ros.ros.bringup import OPTIONS, BringupOptions, NodeDescription, describe, options_from_text
from dcqfa_ros.ros.isolation import child_environment


class NodeDiedError(RuntimeError):
    """Raised into the launch service: its only way to end with an exit code other than 0."""


def _ended(name: str, event: ProcessExited, context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """End the launch with the first node that ends, and with an error when it died."""
    if context.is_shutdown:
        return []
    if event.returncode != 0:
        how = (
            f"died with exit code {event.returncode}"
            if event.returncode > 0
            else f"was killed by signal {-event.returncode}"
        )
        raise NodeDiedError(f"{name} {how}; bringing the graph down")
    return [Shutdown(reason=f"{name} ended")]


def _action(node: NodeDescription, options: BringupOptions, python: str) -> ExecuteProcess:
    common = {
        "output": "screen",
        "emulate_tty": False,
        "env": child_environment(os.environ, python),
        "additional_env": dict(node.env),
        "respawn": options.restart,
        "respawn_delay": 0.5,
        "on_exit": None if options.restart else partial(_ended, node.name),
    }
    if node.command:
        return ExecuteProcess(cmd=node.command_line(python), name=node.name, **common)
    return Node(
        executable=python,
        arguments=["-m", node.module],
        name=node.name,
        exec_name=node.name,
        namespace=options.namespace,
        parameters=[*map(str, node.parameter_files), *([dict(node.parameters)] if node.parameters else [])],
        remappings=list(node.remappings.items()),
        **common,
    )


def _nodes(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    values = {o.name: LaunchConfiguration(o.name).perform(context) for o in OPTIONS}
    options = options_from_text(values)
    python = LaunchConfiguration("python").perform(context)
    return [_action(node, options, python) for node in describe(options)]


def generate_launch_description() -> LaunchDescription:
    """Return the launch description; its arguments are :data:`dcqfa_ros.ros.bringup.OPTIONS` and ``python``."""
    arguments = [
        DeclareLaunchArgument(o.name, default_value=o.default, description=o.description, choices=o.choices or None)
        for o in OPTIONS
    ]
    python = DeclareLaunchArgument(
        "python", default_value=sys.executable, description="Python interpreter that runs the nodes"
    )
    return LaunchDescription([*arguments, python, OpaqueFunction(function=_nodes)])
