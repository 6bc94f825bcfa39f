"""The node set of each cell, described once; ``launch/policy.launch.py`` and ``dcqfa up`` both start what is said here.

Nothing here imports ROS. Parameters live in ``config/*.yaml``; the options are deployment choices only.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.schema import ActionSpace
from dcqfa_ros.errors import ConfigNotFoundError
from dcqfa_ros.paths import find_bundle, find_config
from dcqfa_ros.ros.arm_cell import ARM_CELLS, CAMERAS, arm_cell
from dcqfa_ros.ros.description import (
    AUTO,
    BringupError,
    BringupOptions,
    NodeDescription,
    TrialOptions,
    node,
)
from dcqfa_ros.ros.interfaces import INTERFACES
from dcqfa_ros.ros.parameter_files import check_sections

MANAGER = "lifecycle_manager_node"
_NAMESPACE = re.compile(r"/?([A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*)?")
PUSHT_BUNDLE = "pusht_keypoints"
_TOPIC = re.compile(r"[/~]?[A-Za-z_][A-Za-z0-9_/]*")
_CELL_FILES = {"pusht": ["pusht_cell"], "real": ["inovo_cell"], "emulated": ["inovo_cell", "emulated_cell"]}
ARM_CELL_NODES = (
    *("wrench_node", *(f"{camera}_camera_node" for camera in CAMERAS), "arm_node", "teleop_node"),
    *("selector_node", "policy_node", "trial_node", MANAGER),
)
"""Every node that a cell with an arm may have; its parameter files may name those that are not brought up, too."""


@dataclass(frozen=True)
class Option:
    """One deployment choice, as ``name:=value`` on the command line and as launch argument."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


OPTIONS: tuple[Option, ...] = (
    Option("bundle", "", f"policy: name or folder (default: {PUSHT_BUNDLE} on pusht, none on a cell with an arm)"),
    Option("variant", AUTO, "variant of the bundle; auto lets the selector choose for this device"),
    Option("cell", "pusht", "the cell to run: simulated Push-T, emulated or real arm", ("pusht", *ARM_CELLS)),
    Option("namespace", "", "namespace of every node and topic, so that several stacks run side by side"),
    Option("autostart", "true", "configure and activate the nodes at once", ("true", "false")),
    Option("record", "false", "record the topics of the graph, without pictures, with ros2 bag", ("true", "false")),
    Option("rate", "realtime", "pace of the simulated cell: realtime, or max for lockstep", ("realtime", "max")),
    Option("restart", "false", "restart a node that dies instead of ending the run", ("true", "false")),
    Option("watchdog", "true", "start the arm's watchdog; false where it is a service of its own", ("true", "false")),
    Option("teleop", "false", "hear a gamepad on the topic joy (a cell with an arm)", ("true", "false")),
    Option("parameters_file", "", "YAML files, divided by commas, whose parameters replace those of the cell's own"),
    Option("remap", "", "topics under other names, such as output/twist=/servo_node/delta_twist_cmds,..."),
)


def options_from_text(values: Mapping[str, str]) -> BringupOptions:
    """Return the options given as text (launch arguments, ``name:=value``); missing ones take their defaults.

    Raises:
        BringupError: an unknown name or a value that is not among the choices.
    """
    known = {o.name: o for o in OPTIONS}
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise BringupError(f"{name}:= is no option; there are {', '.join(known)}")
        parsed[name] = _parse(known[name], value)
    return BringupOptions(**parsed)


def _parse(option: Option, value: str) -> str | bool:
    if option.choices == ("true", "false"):
        if value.lower() not in option.choices:
            raise BringupError(f"{option.name}:= expects true or false, got {value!r}")
        return value.lower() == "true"
    return value


def describe(options: BringupOptions) -> tuple[NodeDescription, ...]:
    """Return the processes of the graph in the order of bring-up, the lifecycle manager last.

    Raises:
        BringupError: an option has no such value, or is not available in this version or on this machine.
        BundleError: the bundle does not exist or cannot be read.
        ConfigNotFoundError: a parameter file does not exist.
        ParameterFileError: a parameter file is none, or sets parameters of a node that the cell does not have.
    """
    _check(options)
    files = [find_config(name) for name in _CELL_FILES[options.cell]]
    own = [_parameter_file(name) for name in options.parameters_file.split(",") if name]
    files += own
    remappings = _remappings(options.remap)
    if options.cell in ARM_CELLS:
        first, nodes = arm_cell(options, files)
        if options.bundle:
            nodes += _policy_nodes(options, files, options.bundle)
    else:
        first, nodes = [], _pusht_cell(options, files)
    manager = NodeDescription(
        name=MANAGER,
        module=f"dcqfa_ros.nodes.{MANAGER}",
        parameters={
            "node_names": [n.name for n in nodes],
            "optional_names": [n.name for n in nodes if not n.needed],
            "autostart": options.autostart,
        },
        parameter_files=tuple(files),
        stops_first=True,
    )
    names = ARM_CELL_NODES if options.cell in ARM_CELLS else tuple(n.name for n in (*nodes, manager))
    for file in own:
        check_sections(file, options.namespace, names)
    recorder = [_recorder(options.namespace)] if options.record else []
    graph = [replace(n, remappings=remappings) for n in (*nodes, manager)]
    return (*first, *graph[:-1], *recorder, graph[-1])


def _pusht_cell(options: BringupOptions, files: Sequence[Path]) -> list[NodeDescription]:
    policy = _policy_nodes(options, files, options.bundle or PUSHT_BUNDLE)
    arm = node("arm_node", files, {"rate": options.rate})
    return [arm, node("camera_node", files, {}, needed=False), *policy]


def _parameter_file(name: str) -> Path:
    try:
        return find_config(name)
    except ConfigNotFoundError as error:
        raise ConfigNotFoundError(f"parameters_file:={error}") from error


def _policy_nodes(options: BringupOptions, files: Sequence[Path], bundle: str) -> list[NodeDescription]:
    folder = find_bundle(bundle).resolve()
    spec = load_bundle(folder, verify=False).spec
    is_planar = spec.action.space is ActionSpace.PLANAR_POSITION
    if is_planar and options.cell in ARM_CELLS:
        raise BringupError(
            f"bundle:={bundle}: its actions are {spec.action.space.value} in frame {spec.action.frame}, which the "
            f"arm of cell:={options.cell} does not execute; run it with cell:=pusht, or give none"
        )
    variants = [v.name for v in spec.variants]
    if options.variant not in (AUTO, *variants):
        raise BringupError(
            f"variant:={options.variant}: bundle {spec.name} has no such variant; there are {', '.join(variants)}, "
            f"and {AUTO}"
        )
    nodes = [
        node("selector_node", files, {"bundle": str(folder)}, needed=False),
        node("policy_node", files, {"bundle": str(folder), "variant": options.variant, "rate": options.rate}),
    ]
    if options.trials is None:
        parameters: dict[str, Any] = {"bundle": spec.name, "cell": options.cell}
    else:
        parameters = _trial_parameters(options, options.trials, spec.name)
    return [*nodes, node("trial_node", files, parameters, needed=options.trials is not None)]


def _check(options: BringupOptions) -> None:
    for option in OPTIONS:
        value = getattr(options, option.name)
        if option.choices and not isinstance(value, bool) and value not in option.choices:
            raise BringupError(f"{option.name}:= expects {' or '.join(option.choices)}, got {value!r}")
    check_namespace(options.namespace)
    if options.cell in ARM_CELLS:
        if options.rate != "realtime":
            raise BringupError(f"rate:={options.rate} is for pusht; cell:={options.cell} runs in real time")
        if not options.bundle and options.variant != AUTO:
            raise BringupError(f"variant:={options.variant} needs bundle:=, of which cell:={options.cell} has none")
        if not options.bundle and options.trials is not None:
            raise BringupError(f"trials need bundle:=, of which cell:={options.cell} has none")
    elif options.teleop or not options.watchdog:
        given = "teleop:=true" if options.teleop else "watchdog:=false"
        raise BringupError(f"{given} needs an arm: cell:={' or '.join(ARM_CELLS)}")


def _remappings(text: str) -> dict[str, str]:
    """Read ``from=to,from=to``."""
    remappings: dict[str, str] = {}
    for pair in filter(None, text.split(",")):
        source, separator, target = pair.partition("=")
        if not separator or not _TOPIC.fullmatch(source) or not _TOPIC.fullmatch(target):
            raise BringupError(f"remap:= expects FROM=TO with names of topics, divided by commas, got {pair!r}")
        remappings[source] = target
    return remappings


def check_namespace(namespace: str) -> None:
    """Refuse what is no ROS namespace.

    Raises:
        BringupError: it is none.
    """
    if not _NAMESPACE.fullmatch(namespace):
        raise BringupError(
            f"namespace:= expects letters, digits and underscores, parts divided by /, got {namespace!r}"
        )


def _trial_parameters(options: BringupOptions, trials: TrialOptions, bundle: str) -> dict[str, Any]:
    return {
        "trials": list(trials.trials),
        "output": str(trials.output.resolve()),
        "overwrite": trials.overwrite,
        "bundle": bundle,
        "cell": options.cell,
        "autostart": True,
        "exit_when_done": True,
        **trials.parameters,
    }


def _recorder(namespace: str) -> NodeDescription:
    program = shutil.which("ros2")
    if program is None:
        raise BringupError(
            "record:=true needs ros2 bag, which is not on this machine: install ros-<distro>-rosbag2 and source ROS 2, "
            "or leave record:=false"
        )
    prefix = f"/{namespace.strip('/')}" if namespace.strip("/") else ""
    topics = [f"{prefix}/{e.name}" for e in INTERFACES if e.kind == "topic" and "{" not in e.name]
    return NodeDescription("recorder", command=(program, "bag", "record", *topics), needed=False)


def _assert_options_match() -> None:
    names = {f.name for f in fields(BringupOptions)} - {"trials"}
    if names != {o.name for o in OPTIONS}:
        raise AssertionError(f"OPTIONS and BringupOptions differ: {names ^ {o.name for o in OPTIONS}}")


_assert_options_match()
