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
Cell = Literal["any", "pusht", "arm"]


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
        cell: where it exists: on the simulated Push-T cell, on a cell with an arm (real or emulated), or on any.
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
    cell: Cell = "any"

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
    cell: Cell = "any",
) -> Interface:
    return Interface(key, "topic", name, type_, qos, frame, units, rate, publisher, subscribers, description, cell)


def _trigger(
    key: str, name: str, server: str, callers: tuple[str, ...], description: str, cell: Cell = "any"
) -> Interface:
    type_ = "std_srvs/srv/Trigger"
    return Interface(key, "service", name, type_, "service", "-", "-", "on call", server, callers, description, cell)


OPTIONAL_PACKAGES = ("tf2_msgs",)
"""Message packages that a machine may lack; what needs them says so."""

_CELL_RATE = "control rate (10 Hz on Push-T)"

INTERFACES: tuple[Interface, ...] = (
    _topic(
        "tcp_pose", "tcp_pose", "geometry_msgs/msg/PoseStamped", "stream", "table", "m, quaternion", _CELL_RATE,
        "arm_node", ("policy_node", "wrench_node"), "Measured pose of the tool centre point.",
    ),
    _topic(
        "joint_states", "joint_states", "sensor_msgs/msg/JointState", "stream", "-", "m, rad", _CELL_RATE,
        "arm_node", (), "Measured joint positions and velocities; also for a policy whose bundle reads them.",
    ),
    _topic(
        "keypoints", "keypoints", "geometry_msgs/msg/PoseArray", "stream", "table", "m", _CELL_RATE,
        "arm_node", ("policy_node",), "Key points of the object, published by the simulated cell.", "pusht",
    ),
    _topic(
        "chunk", "command/policy/chunk", "trajectory_msgs/msg/MultiDOFJointTrajectory", "stream", "table", "m, s",
        "once per chunk", "policy_node", ("arm_node",),
        "Action chunk in Cartesian space; its stamp is that of the observation it was computed from.",
    ),
    _topic(
        "judgement", "cell/judgement", "diagnostic_msgs/msg/DiagnosticArray", "events", "table", "-", _CELL_RATE,
        "arm_node", ("trial_node",),
        "Score, coverage and step count by which the simulated cell judges a trial.", "pusht",
    ),
    _topic(
        "consumption", "arm_node/consumption", "diagnostic_msgs/msg/DiagnosticArray", "stream", "-", "-",
        "control rate on Push-T, state rate on a cell with an arm; while armed", "arm_node", ("policy_node",),
        "Actions of the episode consumed by the stamp, when the last of them was begun, how many are buffered, and "
        "control periods without one; optionally when the next one begins (`next`), every further one a period later; "
        "by it the policy numbers its chunks.",
    ),
    _topic(
        "arm_state", "arm_node/arm_state", "diagnostic_msgs/msg/DiagnosticArray", "latched", "-", "-", "on change",
        "arm_node", ("policy_node", "teleop_node", "trial_node"),
        "Armed or disarmed, episode, stop code and reason; its stamp is that of the episode's first observation.",
    ),
    _topic(
        "diagnostics", "diagnostics", "diagnostic_msgs/msg/DiagnosticArray", "events", "-", "-",
        "1 Hz per node and at every event", "all", ("lifecycle_manager_node", "selector_node", "trial_node"),
        "State, stop reason, rates, ages, latency percentiles, drops and events of every node.",
    ),
    _topic(
        "clock", "clock", "rosgraph_msgs/msg/Clock", "stream", "-", "s", "per step, lockstep only",
        "arm_node", (), "Simulated time, which advances only with the cell.", "pusht",
    ),
    _topic(
        "clock_probe", "arm_node/clock_probe", "sensor_msgs/msg/TimeReference", "sensor", "-", "s", "5 Hz",
        "arm_node", ("policy_node",), "Question for the time of the policy's host; its stamp is the arm's time.", "arm",
    ),
    _topic(
        "clock_echo", "policy_node/clock_echo", "sensor_msgs/msg/TimeReference", "sensor", "-", "s", "per question",
        "policy_node", ("arm_node",),
        "Answer: its stamp is the policy's time, `time_ref` that of the question; their distance is the skew.", "arm",
    ),
    _topic(
        "color", "{camera}/color/image_raw", "sensor_msgs/msg/Image", "image", "{camera}_color_optical_frame",
        "rgb8", "parameter fps", "camera_node", (), "Color picture; also for a policy whose bundle reads it.",
    ),
    _topic(
        "camera_info", "{camera}/color/camera_info", "sensor_msgs/msg/CameraInfo", "sensor",
        "{camera}_color_optical_frame", "px", "parameter fps", "camera_node", (),
        "Intrinsics that belong to the color picture with the same stamp.",
    ),
    _topic(
        "compressed", "{camera}/color/image_raw/compressed", "sensor_msgs/msg/CompressedImage", "image",
        "{camera}_color_optical_frame", "jpeg", "parameter fps, on request", "camera_node", (),
        "Color picture as JPEG, encoded only while somebody listens.",
    ),
    _topic(
        "depth", "{camera}/aligned_depth_to_color/image_raw", "sensor_msgs/msg/Image", "image",
        "{camera}_color_optical_frame", "16UC1, mm", "parameter fps", "camera_node", ("policy_node",),
        "Depth aligned to the color picture with the same stamp.", "arm",
    ),
    _topic(
        "depth_info", "{camera}/aligned_depth_to_color/camera_info", "sensor_msgs/msg/CameraInfo", "sensor",
        "{camera}_color_optical_frame", "px", "parameter fps", "camera_node", (),
        "Intrinsics of the aligned depth: those of the color picture.", "arm",
    ),
    _topic(
        "tf_static", "tf_static", "tf2_msgs/msg/TFMessage", "latched", "-", "m, quaternion", "once",
        "camera_node", (),
        "Where the camera is; only where tf2_msgs is installed, otherwise the same poses are in `diagnostics`.", "arm",
    ),
    _topic(
        "wrench", "wrench", "geometry_msgs/msg/WrenchStamped", "sensor", "ft_sensor", "N, N m", "100 Hz",
        "wrench_node", ("arm_node", "policy_node"),
        "Contact wrench at the sensor: bias and tool gravity taken off, low-pass filtered where asked for.", "arm",
    ),
    _topic(
        "wrench_raw", "wrench_node/raw", "geometry_msgs/msg/WrenchStamped", "sensor", "ft_sensor", "N, N m", "100 Hz",
        "wrench_node", ("operator",), "Wrench as the sensor sent it; `dcqfa tool-load` listens.", "arm",
    ),
    _topic(
        "tool_wrench", "tool_wrench", "geometry_msgs/msg/WrenchStamped", "sensor", "tool", "N, N m", "100 Hz",
        "arm_node", ("policy_node",), "Contact wrench turned into the tool frame at the tool centre point.", "arm",
    ),
    _topic(
        "tcp_speed", "tcp_speed", "geometry_msgs/msg/TwistStamped", "stream", "world", "m/s, rad/s", "state rate",
        "arm_node", ("policy_node",), "Measured twist of the tool centre point.", "arm",
    ),
    _topic(
        "gripper_state", "gripper_state", "sensor_msgs/msg/JointState", "stream", "-", "0 closed .. 1 open",
        "state rate", "arm_node", ("policy_node",), "Measured opening of the gripper, joint `gripper`.", "arm",
    ),
    _topic(
        "gripper_chunk", "command/policy/gripper", "trajectory_msgs/msg/JointTrajectory", "stream", "-",
        "0 closed .. 1 open, s", "once per chunk", "policy_node", ("arm_node",),
        "Gripper part of the action chunk with the same stamp.", "arm",
    ),
    _topic(
        "twist_command", "command/{source}/twist", "geometry_msgs/msg/TwistStamped", "stream", "world", "m/s, rad/s",
        "10 to 100 Hz", "teleop_node", ("arm_node",),
        "Wanted twist of the tool centre point, in `world` or `tool`; zero again when it stops coming.", "arm",
    ),
    _topic(
        "pose_command", "command/{source}/pose", "geometry_msgs/msg/PoseStamped", "stream", "world", "m, quaternion",
        "on demand", "operator", ("arm_node",), "Pose to go to, under the limits of every command.", "arm",
    ),
    _topic(
        "joint_command", "command/{source}/joint_trajectory", "trajectory_msgs/msg/JointTrajectory", "stream", "-",
        "rad, s", "on demand", "operator", ("arm_node",), "Joint trajectory to follow, under the limits.", "arm",
    ),
    _topic(
        "gripper_command", "command/{source}/gripper", "std_msgs/msg/Float64", "stream", "-", "0 closed .. 1 open",
        "on demand", "teleop_node", ("arm_node",), "Wanted opening of the gripper.", "arm",
    ),
    _topic(
        "motion_result", "arm_node/motion_result", "diagnostic_msgs/msg/DiagnosticArray", "events", "-", "-",
        "per pose or joint command", "arm_node", (), "How a move to a pose or along joints ended, and why.", "arm",
    ),
    _topic(
        "operator_stop", "operator_stop", "std_msgs/msg/Bool", "stream", "-", "-", "on demand", "operator",
        ("arm_node",), "True stops the arm at once; the stop latches until `arm_node/reset_stop`.", "arm",
    ),
    _topic(
        "joy", "joy", "sensor_msgs/msg/Joy", "sensor", "-", "-1 .. 1", "of the driver", "joy_node", ("teleop_node",),
        "Gamepad or SpaceMouse.", "arm",
    ),
    _topic(
        "output_twist", "output/twist", "geometry_msgs/msg/TwistStamped", "stream", "world", "m/s, rad/s",
        "command rate, generic arm", "arm_node", (),
        "Bounded twist for another arm's controller, such as MoveIt Servo (`servo_node/delta_twist_cmds`).", "arm",
    ),
    _topic(
        "output_joint_velocity", "output/joint_velocity", "std_msgs/msg/Float64MultiArray", "stream", "-", "rad/s",
        "command rate, generic arm", "arm_node", (),
        "Bounded joint velocities for ros2_control's `forward_command_controller`.", "arm",
    ),
    _topic(
        "output_trajectory", "output/joint_trajectory", "trajectory_msgs/msg/JointTrajectory", "stream", "-",
        "rad, rad/s, s", "on demand, generic arm", "arm_node", (),
        "Bounded trajectory for ros2_control's `joint_trajectory_controller`.", "arm",
    ),
    _topic(
        "input_joint_states", "input/joint_states", "sensor_msgs/msg/JointState", "stream", "-", "rad, rad/s",
        "of the arm, generic arm", "joint_state_broadcaster", ("arm_node",), "Joint states of another arm.", "arm",
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
        "proposal", "selector_node/proposal", "diagnostic_msgs/msg/DiagnosticArray", "latched", "-",
        "ms, MiB, degrees Celsius", "on change", "selector_node", ("operator",),
        "What to change under load or after it, why, and the figures behind it; action `stay` where nothing.",
    ),
    _topic(
        "graph_state", "lifecycle_manager_node/graph_state", "std_msgs/msg/String", "latched", "-", "-", "on change",
        "lifecycle_manager_node", ("operator",),
        "State of the whole graph: starting, active, stopping, inactive, safe_stop or refused.",
    ),
    _trigger("arm", "arm_node/arm", "arm_node", ("trial_node", "operator"), "Allow motion."),
    _trigger("disarm", "arm_node/disarm", "arm_node", ("trial_node", "operator"), "Stop and forbid motion."),
    _trigger(
        "reset_stop", "arm_node/reset_stop", "arm_node", ("operator",),
        "Take back a latched stop once its cause is gone; the arm stays disarmed.", "arm",
    ),
    _trigger(
        "stop_service", "arm_node/stop", "arm_node", ("operator",),
        "Stop at once, armed or not; the stop latches until `arm_node/reset_stop`.", "arm",
    ),
    _trigger("wrench_zero", "wrench_node/zero", "wrench_node", ("operator",), "Take the present load as zero.", "arm"),
    _trigger(
        "reset_cell", "arm_node/reset_cell", "arm_node", ("trial_node",),
        "Set the simulated cell to its seed.", "pusht",
    ),
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
        "| topic | type | QoS | frame | units | rate | from | to | cell | what |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in (e for e in INTERFACES if e.kind == "topic"):
        readers = ", ".join(e.subscribers) or "-"
        lines.append(
            f"| `{e.name}` | {e.type} | {e.qos} | {e.frame} | {e.units} | {e.rate} | {e.publisher} | {readers} "
            f"| {e.cell} | {e.description} |"
        )
    lines += ["", "## Services", "", "| service | type | node | called by | cell | what |", "|---|---|---|---|---|---|"]
    for e in (e for e in INTERFACES if e.kind == "service"):
        lines.append(
            f"| `{e.name}` | {e.type} | {e.publisher} | {', '.join(e.subscribers)} | {e.cell} | {e.description} |"
        )
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
