"""Topics, services and messages of an Inovo arm controller, as rosbridge carries them (ROS 1, JSON).

Names and fields are those of the maker's public interface. Readers take a decoded message and return plain values;
whatever is missing, of the wrong kind or not finite is a ``MessageError``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcqfa_ros.drivers.rosbridge_messages import ros_now, seconds_to_ros

Message = dict[str, Any]
Floats = NDArray[np.float64]

JOINT_NAMES = ("j1", "j2", "j3", "j4", "j5", "j6")

JOINT_STATES = "/robot/joint_states"
ROBOT_STATE = "/robot/robot_state"
ARM_STATE = "/robot/arm_state"
TCP_POSE = "/default_move_group/tcp_pose"
TCP_SPEED = "/default_move_group/tcp_speed"
PSU_STATUS = "/psu/status"
ESTOP_STATE = "/psu/estop/state"
SAFE_STOP_STATE = "/psu/safe_stop/state"
RUNTIME_STATE = "/sequence/runtime_state"

CARTESIAN_JOG = "/default_move_group/cartesian_jog"
JOINT_JOG = "/default_move_group/joint_jog"
CARTESIAN_VELOCITY = "/robot/cartesian_velocity_controller/cmd"
JOINT_VELOCITY = "/robot/joint_velocity/cmd"
MOVE = "/default_move_group/move"
FOLLOW = "/robot/joint_trajectory_controller/follow_joint_trajectory"

SAFE_STOP_TRIP = "/psu/safe_stop/trip"
SAFE_STOP_RESET = "/psu/safe_stop/reset"
ESTOP_RESET = "/psu/estop/reset"
PSU_ENABLE = "/psu/enable"
PSU_DISABLE = "/psu/disable"
RESET_FAULT = "/psu/reset_fault"
ROBOT_ENABLE = "/robot/enable"
ROBOT_DISABLE = "/robot/disable"
ROBOT_RESET = "/robot/reset"
SWITCH_CONTROLLER = "/robot/switch_controller"
FORWARD = "/default_move_group/fk"
INVERSE = "/default_move_group/ik"
SEQUENCE_START = "/sequence/start"
SEQUENCE_STOP = "/sequence/stop"
CLAIM_CONTROL = "/ui/claim_control"

TYPES = {
    JOINT_STATES: "sensor_msgs/JointState",
    ROBOT_STATE: "arm_msgs/RobotState",
    ARM_STATE: "arm_msgs/ArmState",
    TCP_POSE: "geometry_msgs/PoseStamped",
    TCP_SPEED: "commander_msgs/SpeedStamped",
    PSU_STATUS: "psu_msgs/Status",
    ESTOP_STATE: "psu_msgs/SafetyCircuitState",
    SAFE_STOP_STATE: "psu_msgs/SafetyCircuitState",
    RUNTIME_STATE: "commander_msgs/RuntimeState",
    CARTESIAN_JOG: "commander_msgs/CartesianJogDemand",
    JOINT_JOG: "control_msgs/JointJog",
    CARTESIAN_VELOCITY: "geometry_msgs/TwistStamped",
    JOINT_VELOCITY: "std_msgs/Float64MultiArray",
}
MOVE_GOAL_TYPE = "commander_msgs/MotionActionGoal"
FOLLOW_GOAL_TYPE = "control_msgs/FollowJointTrajectoryActionGoal"
GRIP_GOAL_TYPE = "gripper_msgs/GripperBasicCommandActionGoal"
GRIPPER_GOAL_TYPE = "control_msgs/GripperCommandActionGoal"
GRIPPER_STATE_TYPE = "gripper_msgs/GripperState"
STATUS_TYPE = "actionlib_msgs/GoalStatusArray"
CANCEL_TYPE = "actionlib_msgs/GoalID"

BUS_ON = "BUS_ON"
DRIVER_ACTIVE = "Active"
ARM_STATES = ("initializing", "disabled", "enabling", "enabled", "disabling", "terminating")
ARM_ENABLED = 3
JOINT_FAULT = 3
SEQUENCE_RUNNING = 1
GRIP, RELEASE = 0, 1

_LARGEST = sys.float_info.max  # JSON's whole numbers may be larger, and then are no float


class MessageError(ValueError):
    """A message of the controller lacks a field, or the field is not what it should be."""


def gripper_topic(device: str, name: str) -> str:
    """Return a topic or service of the gripper, such as ``/devices/robotiqd/gripper_state``."""
    return f"/devices/{device}/{name}"


def vector(values: ArrayLike) -> Message:
    """Return three numbers as a message with x, y, z."""
    x, y, z = np.asarray(values, dtype=np.float64).tolist()
    return {"x": x, "y": y, "z": z}


def quaternion(values: ArrayLike) -> Message:
    """Return four numbers as a message with x, y, z, w."""
    x, y, z, w = np.asarray(values, dtype=np.float64).tolist()
    return {"x": x, "y": y, "z": z, "w": w}


def jog(linear: ArrayLike, angular: ArrayLike, frame: str, tcp: str) -> Message:
    """Return a ``CartesianJogDemand``: m/s and rad/s."""
    return {
        "header": {"stamp": ros_now(), "frame_id": frame},
        "twist": {"linear": vector(linear), "angular": vector(angular)},
        "tcp_id": tcp,
    }


def action_goal(identity: str, goal: Message) -> Message:
    """Return the message that starts an action."""
    stamp = ros_now()
    return {"header": {"stamp": stamp, "frame_id": ""}, "goal_id": {"stamp": stamp, "id": identity}, "goal": goal}


def action_cancel(identity: str) -> Message:
    """Return the message that cancels a goal, or all goals of an action for an empty identity."""
    return {"stamp": {"secs": 0, "nsecs": 0}, "id": identity}


def straight_move(position: ArrayLike, orientation: ArrayLike, speed: float, angular_speed: float, tcp: str) -> Message:
    """Return the goal of ``/default_move_group/move`` for one straight move."""
    return {
        "motion_sequence": [
            {
                "pose": {"position": vector(position), "orientation": quaternion(orientation)},
                "frame_id": "world",
                "tcp_id": tcp,
                "max_velocity": {"linear": speed, "angular": angular_speed},
                "max_joint_velocity": 1.0,
                "max_joint_acceleration": 1.0,
                "blend": {"linear": 0.0, "angular": 0.0},
                "cartesian": True,
            }
        ]
    }


def joint_trajectory(times_s: Sequence[float], positions: Floats, velocities: Floats) -> Message:
    """Return the goal of ``follow_joint_trajectory``."""
    points = [
        {"positions": p.tolist(), "velocities": v.tolist(), "time_from_start": seconds_to_ros(float(t))}
        for t, p, v in zip(times_s, positions, velocities, strict=True)
    ]
    return {
        "trajectory": {"header": {"stamp": seconds_to_ros(0.0)}, "joint_names": list(JOINT_NAMES), "points": points}
    }


def read_joint_states(message: Message) -> tuple[Floats, Floats]:
    """Return positions (6,) rad and velocities (6,) rad/s, in the order j1..j6."""
    names = field(message, "name", list)
    try:
        order = [names.index(name) for name in JOINT_NAMES]
    except ValueError:
        raise MessageError(f"name: expected {', '.join(JOINT_NAMES)}, got {names}") from None
    positions, velocities = floats(message, "position", len(names)), floats(message, "velocity", len(names))
    return positions[order], velocities[order]


def read_pose(message: Message) -> tuple[Floats, Floats]:
    """Return position (3,) m and unit quaternion (4,) of a ``PoseStamped``."""
    pose = field(message, "pose", dict)
    position = xyz(field(pose, "position", dict), "xyz")
    orientation = xyz(field(pose, "orientation", dict), "xyzw")
    norm = math.sqrt(float(orientation @ orientation))
    if not 0.9 < norm < 1.1:
        raise MessageError(f"pose.orientation: expected a unit quaternion, got {orientation.tolist()}")
    return position, orientation / norm


def field(message: Message, name: str, kind: type) -> Any:
    """Return ``message[name]`` if it is of ``kind``."""
    value = message.get(name) if isinstance(message, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise MessageError(f"{name}: expected {kind.__name__}, got {value!r:.80}")
    return value


def number(message: Message, name: str) -> float:
    """Return a finite number."""
    value = message.get(name) if isinstance(message, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise MessageError(f"{name}: expected a finite number, got {value!r:.80}")
    return float(value)


def floats(message: Message, name: str, length: int) -> Floats:
    """Return ``length`` finite numbers."""
    values = field(message, name, list)
    if len(values) != length or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise MessageError(f"{name}: expected {length} numbers, got {values!r:.80}")
    if not all(abs(v) <= _LARGEST for v in values):
        raise MessageError(f"{name}: expected finite numbers, got {values!r:.80}")
    return np.array(values, dtype=np.float64)


def xyz(message: Message, letters: str) -> Floats:
    """Return the numbers of the fields named by ``letters``."""
    return np.array([number(message, letter) for letter in letters])
