"""Parameters of the node of a six-axis arm: declared here, turned into limits, settings and drivers here.

Every limit has a hard maximum in ``dcqfa_ros.safety``, and the workspace box has no default: an arm without one is
refused. No parameter switches a limit off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcqfa_ros.drivers.inovo import InovoArm
from dcqfa_ros.drivers.kinematics import ArmKinematics, inovo_kinematics, load_kinematics
from dcqfa_ros.errors import UserError
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.runtime.arm_activity import StreamSettings
from dcqfa_ros.safety.cartesian_limits import MotionLimits, TwistLimiter, Workspace
from dcqfa_ros.safety.force_guard import ForceGuard, ForceLimits
from dcqfa_ros.safety.joint_limits import INOVO_JOINT_SPEEDS, JointLimits
from dcqfa_ros.safety.stops import StopLatch
from dcqfa_ros.safety.supervision import Ages, SafetyStage
from dcqfa_ros.safety.wrench_frames import SensorMount
from dcqfa_ros.watchdog.address import default_address
from dcqfa_ros.watchdog.client import WatchdogClient

DRIVERS = ("inovo", "ros")
SOURCES = ("policy", "teleop", "operator")
OUTPUTS = ("twist", "joint_velocity")
_ABSENT = [float("nan")] * 3
_FORCE = {
    "slow_force": (12.0, "contact force from which the arm is slow, N"),
    "slow_force_below": (8.0, "force below which it is no longer, N"),
    "stop_force": (25.0, "contact force that stops, N"),
    "stop_force_below": (6.0, "force below which a contact stop can be reset, N"),
    "slow_torque": (1.2, "contact torque from which the arm is slow, N m"),
    "slow_torque_below": (0.8, "torque below which it is no longer, N m"),
    "stop_torque": (2.5, "contact torque that stops, N m"),
    "stop_torque_below": (0.6, "torque below which a contact stop can be reset, N m"),
    "slow_factor": (0.3, "share of the commanded speed while slow, 0..1"),
    "retreat_distance": (0.01, "how far to back away after a stop by force, m; 0: stay"),
    "retreat_speed": (0.01, "how fast, m/s"),
}
_LIMITS = {
    "linear_speed": (0.10, "largest speed, m/s"),
    "linear_acceleration": (0.8, "largest acceleration, m/s^2"),
    "linear_jerk": (15.0, "largest jerk, m/s^3"),
    "angular_speed": (0.5, "largest turning speed, rad/s"),
    "angular_acceleration": (4.0, "largest angular acceleration, rad/s^2"),
    "angular_jerk": (75.0, "largest angular jerk, rad/s^3"),
}
_AGES = {
    "state": (0.15, "of the arm's joint positions, s"),
    "wrench": (0.1, "of the newest wrench, s"),
    "camera": (0.5, "of the newest picture of each watched camera, s"),
    "command": (0.5, "of a command, s"),
    "observation": (1.0, "of the observation a policy's action rests on, s"),
}
_SETTINGS = {
    "rate": (100.0, "commands per second, 60 to 100 for Inovo"),
    "hold_after_s": (0.15, "without a command, the arm is braked to rest"),
    "stop_after_s": (0.5, "without a command, zero twist is sent, publishing ends, and the stop latches"),
    "future_s": (0.05, "how far a stamp may lie ahead of this host's clock, s"),
    "pose_speed": (0.05, "of moves to a pose, m/s"),
    "pose_angular_speed": (0.3, "of moves to a pose, rad/s"),
    "move_timeout_s": (30.0, "after which a move is stopped, s"),
}


def declare(node: ManagedNode) -> None:
    """Declare every parameter of the node."""
    add = node.add_parameter
    add("driver", "inovo", "arm driver; ros: another arm's controllers behind topics", choices=DRIVERS, read_only=True)
    add("command_source", "teleop", "holder of the command lease", choices=SOURCES)
    add("bring_up", True, "switch the arm on when the node is activated", read_only=True)
    add("appear_timeout_s", 0.0, "how long the controller may take to answer, s", minimum=0.0, maximum=600.0,
        read_only=True)  # fmt: skip
    add("state_rate", 50.0, "joint states, pose, speed and gripper per second", minimum=1.0, maximum=500.0,
        read_only=True)  # fmt: skip
    add("inovo.host", "192.168.1.7", "controller", read_only=True)
    add("inovo.port", 9090, "its rosbridge port", minimum=1, maximum=65535, read_only=True)
    add("inovo.variant", "short", "build of the arm: short, medium or long", read_only=True)
    add("inovo.gripper", "robotiqd", "device name of the gripper; empty: none", read_only=True)
    add("inovo.tcp", "", "tool centre point of the controller; empty: its default", read_only=True)
    add("inovo.force_claim", False, "take control from another user of the controller", read_only=True)
    add("ros.output", "twist", "what the other arm's controller takes", choices=OUTPUTS, read_only=True)
    add("ros.joint_names", [f"j{i + 1}" for i in range(6)], "joints in the order of the chain", read_only=True)
    add("ros.kinematics", "", "YAML file of the arm's chain, as config/inovo_arm.yaml", read_only=True)
    add("ros.build", "short", "build in that file", read_only=True)
    add("ros.tool_position", [0.0, 0.0, 0.0], "tool centre point in the flange's frame, m", read_only=True)
    for name, (default, text) in _SETTINGS.items():
        add(name, default, text, read_only=True)
    for corner in ("minimum", "maximum"):
        add(f"workspace.{corner}", _ABSENT, f"{corner} x, y, z of the tool centre point in world, m; no default",
            read_only=True)  # fmt: skip
    add("workspace.margin", 0.002, "distance kept from the walls, m", read_only=True)
    add("workspace.latency_s", 0.06, "longest time from a command to its motion, s", read_only=True)
    for group, table in (("limits", _LIMITS), ("force", _FORCE), ("maximum_age", _AGES)):
        for name, (default, text) in table.items():
            add(f"{group}.{name}", default, text, read_only=True)
    add("limits.joint_speeds", list(INOVO_JOINT_SPEEDS), "rad/s per joint", read_only=True)
    add("limits.joint_lower", [-6.2] * 6, "smallest angle per joint, rad", read_only=True)
    add("limits.joint_upper", [6.2] * 6, "largest angle per joint, rad", read_only=True)
    add("sensor_rotation", [0.0, 0.0, 0.0, 1.0], "of the force/torque sensor in the tool frame, quaternion x y z w",
        read_only=True)  # fmt: skip
    add("sensor_position", [0.0, 0.0, 0.0], "of the force/torque sensor in the tool frame, m", read_only=True)
    add("sensor_sign", 1.0, "-1 where the sensor reports what the tool exerts on the environment", read_only=True)
    add("has_wrench", True, "whether there is a force/torque sensor; driver ros only", read_only=True)
    add("cameras", ["wrist", "front"], "cameras whose pictures a policy needs; [''] for none", read_only=True)
    add("watchdog.use", "auto", "watchdog process; auto: required for inovo", choices=("auto", "required", "none"),
        read_only=True)  # fmt: skip
    add("watchdog.address", "", "where it listens; empty: the socket of this ROS domain and namespace", read_only=True)


def make_inovo(node: ManagedNode) -> InovoArm:
    """Return the driver of the Inovo arm, not connected."""
    value = node.parameter
    return InovoArm(
        value("inovo.host"),
        value("inovo.port"),
        variant=value("inovo.variant"),
        gripper=value("inovo.gripper"),
        tcp=value("inovo.tcp"),
        force_claim=value("inovo.force_claim"),
    )


def make_kinematics(node: ManagedNode) -> ArmKinematics:
    """Return the geometry of the arm.

    Raises:
        UserError: another arm has no file, or the file does not describe it.
    """
    if node.parameter("driver") == "inovo":
        return inovo_kinematics(node.parameter("inovo.variant"))
    path = Path(node.parameter("ros.kinematics")).expanduser()
    if not path.is_file():
        raise UserError(f"parameter ros.kinematics: {str(path)!r} is no file; expected the arm's chain as YAML")
    arm = load_kinematics(path, node.parameter("ros.build"), f"arm of {path.name}")
    return arm.with_tool(node.parameter("ros.tool_position"))


def make_settings(node: ManagedNode) -> StreamSettings:
    """Return timing and speeds."""
    return StreamSettings(**{name: float(node.parameter(name)) for name in _SETTINGS})


def make_mount(node: ManagedNode) -> SensorMount:
    """Return where the force/torque sensor sits."""
    value = node.parameter
    return SensorMount(tuple(value("sensor_position")), tuple(value("sensor_rotation")), float(value("sensor_sign")))


def make_stage(node: ManagedNode, kinematics: ArmKinematics, latch: StopLatch) -> SafetyStage:
    """Return the safety stage, behind ``latch``.

    Raises:
        LimitError: a limit is absent or beyond its hard maximum.
        UserError: a force/torque sensor cannot be done without here.
    """
    value = node.parameter
    inovo = value("driver") == "inovo"
    if inovo and not value("has_wrench"):
        raise UserError("parameter has_wrench is false: the force guard of an Inovo cell cannot be left out")

    def table(group: str, names: Any) -> dict[str, float]:
        return {name: float(value(f"{group}.{name}")) for name in names}

    limiter = TwistLimiter(
        MotionLimits(**table("limits", _LIMITS)),
        Workspace.of(value("workspace.minimum"), value("workspace.maximum")),
        1.0 / float(value("rate")),
        float(value("workspace.latency_s")),
        float(value("workspace.margin")),
    )
    joints = JointLimits(
        kinematics, value("limits.joint_speeds"), value("limits.joint_lower"), value("limits.joint_upper")
    )
    guard = ForceGuard(ForceLimits(**table("force", _FORCE))) if value("has_wrench") else None
    return SafetyStage(limiter, joints, guard, Ages(**table("maximum_age", _AGES)), cameras(node), latch)


def cameras(node: ManagedNode) -> list[str]:
    """Return the names of the cameras that a policy needs."""
    return [name for name in node.parameter("cameras") if name]


def make_watchdog(node: ManagedNode) -> WatchdogClient | None:
    """Return the client of the watchdog, None where there is to be none."""
    use = node.parameter("watchdog.use")
    if use == "none" or (use == "auto" and node.parameter("driver") != "inovo"):
        return None
    address = node.parameter("watchdog.address")
    return WatchdogClient(address or default_address(node.context.get_domain_id(), node.get_namespace()))
