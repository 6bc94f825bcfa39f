"""The one table of the graph's topics and services: names, types, QoS, frames, units, rates.

Nodes create publishers, subscriptions and services from this table only, and ``docs/interfaces.md`` is generated from
it (``python -m dcqfa_ros.ros.interfaces > docs/interfaces.md``). All names are relative, so a namespace moves the whole
graph. This module needs no ROS 2 installation; message classes are imported when asked for.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from dcqfa_ros.ros.qos import PROFILES

Kind = Literal["topic", "service"]


@dataclass(frozen=True)
class Interface:
    """One topic or service of the graph.

    Attributes:
        key: the name by which code refers to it.
        kind: "topic" or "service".
        name: relative ROS name; ``{camera}`` and the like are filled by :meth:`resolve`.
        type: ROS type, ``package/msg/Type`` or ``package/srv/Type``.
        qos: name of a profile in :data:`dcqfa_ros.ros.qos.PROFILES`.
        frame: ``header.frame_id``, or "-" where there is none.
        units: of the payload.
        rate: how often it is sent.
        publisher: node that publishes it or serves it.
        subscribers: nodes that read or call it.
        description: one sentence.
    """

    key: str
    kind: Kind
    name: str
    type: str
    qos: str
    frame: str
    units: str
    rate: str
    publisher: str
    subscribers: tuple[str, ...]
    description: str

    def resolve(self, **fields: str) -> str:
        """Return the relative name with its placeholders filled.

        Raises:
            KeyError: a placeholder of the name is missing from ``fields``.
        """
        return self.name.format(**fields)

    def message_class(self) -> Any:
        """Import and return the message or service class (needs the ROS 2 package of ``type``)."""
        package, group, cls = self.type.split("/")
        return getattr(importlib.import_module(f"{package}.{group}"), cls)


def _topic(
    key: str,
    name: str,
    type_: str,
    qos: str,
    frame: str,
    units: str,
    rate: str,
    publisher: str,
    subscribers: tuple[str, ...],
    description: str,
) -> Interface:
    return Interface(key, "topic", name, type_, qos, frame, units, rate, publisher, subscribers, description)


def _trigger(key: str, name: str, server: str, callers: tuple[str, ...], description: str) -> Interface:
    return Interface(
        key, "service", name, "std_srvs/srv/Trigger", "service", "-", "-", "on call", server, callers, description
    )


_CELL_RATE = "control rate (10 Hz on Push-T)"

INTERFACES: tuple[Interface, ...] = (
    _topic(
        "tcp_pose", "tcp_pose", "geometry_msgs/msg/PoseStamped", "stream", "table", "m, quaternion", _CELL_RATE,
        "arm_node", ("policy_node",), "Measured pose of the tool centre point.",
    ),
    _topic(
        "joint_states", "joint_states", "sensor_msgs/msg/JointState", "stream", "-", "m, rad", _CELL_RATE,
        "arm_node", (), "Measured joint positions and velocities.",
    ),
    _topic(
        "keypoints", "keypoints", "geometry_msgs/msg/PoseArray", "stream", "table", "m", _CELL_RATE,
        "arm_node", ("policy_node",), "Key points of the object, published by the simulated cell.",
    ),
    _topic(
        "chunk", "command/policy/chunk", "trajectory_msgs/msg/MultiDOFJointTrajectory", "stream", "table", "m, s",
        "once per chunk", "policy_node", ("arm_node",),
        "Action chunk in Cartesian space; its stamp is that of the observation it was computed from.",
    ),
    _topic(
        "judgement", "cell/judgement", "diagnostic_msgs/msg/DiagnosticArray", "events", "table", "-", _CELL_RATE,
        "arm_node", ("trial_node",), "Score, coverage and step count by which the simulated cell judges a trial.",
    ),
    _topic(
        "arm_state", "arm_node/arm_state", "diagnostic_msgs/msg/DiagnosticArray", "latched", "-", "-", "on change",
        "arm_node", ("policy_node", "trial_node"),
        "Armed or disarmed, episode, stop code and reason; its stamp is that of the episode's first observation.",
    ),
    _topic(
        "diagnostics", "diagnostics", "diagnostic_msgs/msg/DiagnosticArray", "events", "-", "-",
        "1 Hz per node and at every event", "all", ("lifecycle_manager_node", "trial_node"),
        "State, stop reason, rates, ages, latency percentiles, drops and events of every node.",
    ),
    _topic(
        "clock", "clock", "rosgraph_msgs/msg/Clock", "stream", "-", "s", "per step, lockstep only",
        "arm_node", (), "Simulated time, which advances only with the cell.",
    ),
    _topic(
        "color", "{camera}/color/image_raw", "sensor_msgs/msg/Image", "image", "{camera}_color_optical_frame",
        "rgb8", "parameter fps", "camera_node", (), "Color picture.",
    ),
    _topic(
        "camera_info", "{camera}/color/camera_info", "sensor_msgs/msg/CameraInfo", "sensor",
        "{camera}_color_optical_frame", "px", "parameter fps", "camera_node", (),
        "Intrinsics that belong to the color picture with the same stamp.",
    ),
    _topic(
        "active_variant", "policy_node/active_variant", "std_msgs/msg/String", "latched", "-", "-", "on change",
        "policy_node", ("trial_node",), "Name of the variant that computes the chunks now; empty when there is none.",
    ),
    _topic(
        "choice", "selector_node/choice", "diagnostic_msgs/msg/DiagnosticArray", "latched", "-", "ms, bytes",
        "on change", "selector_node", ("policy_node",), "The variant chosen for this device, the ranking and why.",
    ),
    _topic(
        "graph_state", "lifecycle_manager_node/graph_state", "std_msgs/msg/String", "latched", "-", "-", "on change",
        "lifecycle_manager_node", ("operator",),
        "State of the whole graph: starting, active, stopping, inactive, safe_stop or refused.",
    ),
    _trigger("arm", "arm_node/arm", "arm_node", ("trial_node", "operator"), "Allow motion."),
    _trigger("disarm", "arm_node/disarm", "arm_node", ("trial_node", "operator"), "Stop and forbid motion."),
    _trigger("reset_cell", "arm_node/reset_cell", "arm_node", ("trial_node",), "Set the simulated cell to its seed."),
    _trigger("policy_reset", "policy_node/reset", "policy_node", ("operator",), "Forget observations and chunks."),
    _trigger("trial_start", "trial_node/start", "trial_node", ("operator",), "Start the trials."),
    _trigger(
        "graph_activate", "lifecycle_manager_node/activate", "lifecycle_manager_node", ("operator",),
        "Configure and activate every node in order, also after a safe stop.",
    ),
    _trigger(
        "graph_deactivate", "lifecycle_manager_node/deactivate", "lifecycle_manager_node", ("operator",),
        "Deactivate every node in reverse order.",
    ),
)  # fmt: skip

_BY_KEY = {entry.key: entry for entry in INTERFACES}


def interface(key: str) -> Interface:
    """Return the table's entry for ``key``.

    Raises:
        KeyError: there is none; the message lists the keys.
    """
    try:
        return _BY_KEY[key]
    except KeyError:
        raise KeyError(f"unknown interface {key!r}; known: {', '.join(sorted(_BY_KEY))}") from None


def markdown() -> str:
    """Return ``docs/interfaces.md``: the table as Markdown, ending with one newline."""
    lines = [
        "# Interfaces",
        "",
        "Generated by `python -m dcqfa_ros.ros.interfaces > docs/interfaces.md`; do not edit.",
        "All names are relative to the namespace (`namespace:=`), all types are standard.",
        "",
        "## Topics",
        "",
        "| topic | type | QoS | frame | units | rate | from | to | what |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for e in (e for e in INTERFACES if e.kind == "topic"):
        readers = ", ".join(e.subscribers) or "-"
        lines.append(
            f"| `{e.name}` | {e.type} | {e.qos} | {e.frame} | {e.units} | {e.rate} | {e.publisher} | {readers} "
            f"| {e.description} |"
        )
    lines += ["", "## Services", "", "| service | type | node | called by | what |", "|---|---|---|---|---|"]
    for e in (e for e in INTERFACES if e.kind == "service"):
        lines.append(f"| `{e.name}` | {e.type} | {e.publisher} | {', '.join(e.subscribers)} | {e.description} |")
    lines += [
        "",
        "## Quality of service",
        "",
        "A node's parameter `qos.<key>.reliability` (`reliable` or `best_effort`) replaces a topic's reliability, for",
        "example `qos.keypoints.reliability`. Best-effort publishers do not match reliable subscriptions.",
        "",
        "| profile | reliability | durability | depth | for | topics (keys) |",
        "|---|---|---|---|---|---|",
    ]
    for name, p in PROFILES.items():
        keys = ", ".join(f"`{e.key}`" for e in INTERFACES if e.qos == name and e.kind == "topic") or "-"
        durability = "transient local" if p.transient_local else "volatile"
        reliability = p.reliability.replace("_", " ")
        lines.append(f"| {name} | {reliability} | {durability} | {p.depth} | {p.purpose} | {keys} |")
    lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
