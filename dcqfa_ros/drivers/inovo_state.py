"""What the state topics of an Inovo arm say, put together: joints, pose, gripper, and whether the arm would move."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.arm_protocol import ArmReadiness, ArmState
from dcqfa_ros.drivers.kinematics import ArmKinematics

Floats = m.Floats


class InovoState:
    """The newest message of every state topic. Written by the thread that reads, read by any."""

    def __init__(self, kinematics: ArmKinematics, gripper: str) -> None:
        """Start without any message.

        Args:
            kinematics: of the build, for the Cartesian velocity.
            gripper: device name of the gripper, empty without one.
        """
        self._kinematics = kinematics
        self._gripper_topic = m.gripper_topic(gripper, "gripper_state") if gripper else ""
        self._lock = threading.Lock()
        self._joints: tuple[Floats, Floats] | None = None
        self._joints_ns = self._pose_ns = 0
        self._pose: tuple[Floats, Floats] | None = None
        self._twist: Floats | None = None
        self._values: dict[str, dict[str, Any]] = {}
        self._seen_ns: dict[str, int] = {}
        self.malformed: dict[str, int] = {}
        self.last_malformed = ""

    @property
    def required(self) -> tuple[str, ...]:
        """Topics without which the arm's state is not known."""
        topics = (
            m.JOINT_STATES, m.TCP_POSE, m.PSU_STATUS, m.ROBOT_STATE, m.ESTOP_STATE, m.SAFE_STOP_STATE,
        )  # fmt: skip
        return (*topics, self._gripper_topic) if self._gripper_topic else topics

    @property
    def optional(self) -> tuple[str, ...]:
        """Topics that are read where the controller has them."""
        return (m.ARM_STATE, m.TCP_SPEED, m.RUNTIME_STATE)

    def type_of(self, topic: str) -> str:
        """Return the ROS type of a topic."""
        return m.GRIPPER_STATE_TYPE if topic == self._gripper_topic else m.TYPES[topic]

    def callback(self, topic: str) -> Callable[[m.Message, int], None]:
        """Return what takes the messages of ``topic``; a malformed one is counted and changes nothing."""
        read = {
            m.JOINT_STATES: self._on_joints,
            m.TCP_POSE: self._on_pose,
        }.get(topic, self._on_values(topic))

        def take(message: m.Message, arrival_ns: int) -> None:
            try:
                with self._lock:
                    read(message, arrival_ns)
                    self._seen_ns[topic] = arrival_ns
            except m.MessageError as error:
                self.malformed[topic] = self.malformed.get(topic, 0) + 1
                self.last_malformed = f"{topic}: {error}"

        return take

    def forget_readiness(self) -> None:
        """Forget what allowed motion: after a loss it has to be heard anew. Joints and pose stay as last known."""
        with self._lock:
            self._values.clear()
            self._seen_ns.clear()

    def missing(self) -> list[str]:
        """Return the required topics that have not been heard on this connection."""
        with self._lock:
            return self._missing()

    def _missing(self) -> list[str]:
        return [topic for topic in self.required if topic not in self._seen_ns]

    def values(self, topic: str) -> dict[str, Any]:
        """Return the checked fields of the newest message of a topic; empty before the first."""
        with self._lock:
            return dict(self._values.get(topic, {}))

    @property
    def gripper(self) -> dict[str, Any]:
        """The newest gripper state; empty before the first or without a gripper."""
        return self.values(self._gripper_topic)

    def age_s(self, topic: str) -> float:
        """Return for how long nothing came on ``topic``, s; infinity if nothing ever did."""
        with self._lock:
            seen = self._seen_ns.get(topic)
        return float("inf") if seen is None else (time.monotonic_ns() - seen) / 1e9

    def readiness(self) -> tuple[ArmReadiness, str]:
        """Return whether a connected arm would move, and why not."""
        with self._lock:  # of one moment: a loss may forget everything in between
            missing = self._missing()
            values = {topic: dict(fields) for topic, fields in self._values.items()}
        if missing:
            return ArmReadiness.OFF, f"nothing heard yet on {', '.join(missing)}"
        for topic, name, readiness in (
            (m.ESTOP_STATE, "emergency stop", ArmReadiness.STOPPED),
            (m.SAFE_STOP_STATE, "safe stop", ArmReadiness.SAFE_STOPPED),
        ):
            if not values[topic]["active"]:
                can = "it can be reset" if values[topic]["circuit_complete"] else "release it, then reset"
                return readiness, f"{name}: {can} ({topic})"
        psu, robot, arm = values[m.PSU_STATUS], values[m.ROBOT_STATE], values.get(m.ARM_STATE, {})
        if psu["fault_code"]:
            return ArmReadiness.FAULT, f"power supply: fault code {psu['fault_code']} ({m.PSU_STATUS})"
        if arm.get("faults"):
            return ArmReadiness.FAULT, f"drive fault of {', '.join(arm['faults'])} ({m.ARM_STATE})"
        if psu["state"] != m.BUS_ON:
            return ArmReadiness.OFF, f"power supply: {psu['state']} instead of {m.BUS_ON}"
        if not robot["drives_powered"] or robot["driver_state"] != m.DRIVER_ACTIVE:
            powered = "powered" if robot["drives_powered"] else "not powered"
            return ArmReadiness.OFF, f"drives {powered}, driver {robot['driver_state']} instead of {m.DRIVER_ACTIVE}"
        if arm and arm["state"] != m.ARM_ENABLED:
            return ArmReadiness.OFF, f"arm {m.ARM_STATES[arm['state']]}"
        return ArmReadiness.READY, ""

    def snapshot(self, readiness: ArmReadiness, detail: str) -> ArmState | None:
        """Return the newest state, None before the first joints and pose."""
        with self._lock:
            if self._joints is None or self._pose is None:
                return None
            joints, velocities = self._joints
            position, orientation = self._pose
            if self._twist is None:
                # The controller publishes only the norm of the velocity: its direction follows from the joints.
                self._twist = _frozen(self._kinematics.jacobian(joints, position) @ velocities)
            gripper = self._values.get(self._gripper_topic) if self._gripper_topic else None
            return ArmState(
                stamp_ns=min(self._joints_ns, self._pose_ns),
                readiness=readiness,
                detail=detail,
                joints=joints,
                joint_velocities=velocities,
                position=position,
                orientation=orientation,
                linear=self._twist[:3],
                angular=self._twist[3:],
                gripper=None if gripper is None else gripper["position"],
                gripper_holds=None if gripper is None else gripper["stalled"],
            )

    def facts(self) -> dict[str, object]:
        """Return supply, drives and program, for diagnostics; empty texts where nothing was heard."""
        psu, arm = self.values(m.PSU_STATUS), self.values(m.ARM_STATE)
        return {
            "voltage_v": psu.get("voltage", ""),
            "current_a": psu.get("current", ""),
            "bus": psu.get("state", ""),
            "fault_code": psu.get("fault_code", ""),
            "speed_limited": self.values(m.ROBOT_STATE).get("speed_limited", ""),
            "motor_max_c": max(arm["temperatures"], default="") if arm else "",
            "torques_nm": [round(torque, 2) for torque in arm["torques"]] if arm else "",
            "sequence": self.values(m.RUNTIME_STATE).get("state", ""),
        }

    def _on_joints(self, message: m.Message, arrival_ns: int) -> None:
        positions, velocities = m.read_joint_states(message)
        self._joints = (_frozen(positions), _frozen(velocities))
        self._joints_ns, self._twist = arrival_ns, None

    def _on_pose(self, message: m.Message, arrival_ns: int) -> None:
        position, orientation = m.read_pose(message)
        self._pose = (_frozen(position), _frozen(orientation))
        self._pose_ns = arrival_ns

    def _on_values(self, topic: str) -> Callable[[m.Message, int], None]:
        read = {
            m.PSU_STATUS: _read_psu,
            m.ROBOT_STATE: _read_robot,
            m.ARM_STATE: _read_arm,
            m.ESTOP_STATE: _read_circuit,
            m.SAFE_STOP_STATE: _read_circuit,
            m.TCP_SPEED: _read_speed,
            m.RUNTIME_STATE: lambda message: {"state": m.field(message, "state", int)},
        }.get(topic, _read_gripper)

        def take(message: m.Message, _: int) -> None:
            self._values[topic] = read(message)

        return take


def _read_psu(message: m.Message) -> dict[str, Any]:
    return {
        "voltage": m.number(message, "voltage"),
        "current": m.number(message, "current"),
        "state": m.field(message, "state", str),
        "fault_code": m.field(message, "fault_code", int),
    }


def _read_robot(message: m.Message) -> dict[str, Any]:
    return {
        "driver_state": m.field(message, "driver_state", str),
        **{name: m.field(message, name, bool) for name in ("drives_powered", "can_enable", "speed_limited")},
    }


def _read_circuit(message: m.Message) -> dict[str, Any]:
    return {name: m.field(message, name, bool) for name in ("active", "circuit_complete")}


def _read_speed(message: m.Message) -> dict[str, Any]:
    speed = m.field(message, "speed", dict)
    return {name: m.number(speed, name) for name in ("linear", "angular")}


def _read_arm(message: m.Message) -> dict[str, Any]:
    state = m.field(message, "state", int)
    if not 0 <= state < len(m.ARM_STATES):
        raise m.MessageError(f"state: expected 0..{len(m.ARM_STATES) - 1}, got {state}")
    joints = m.field(message, "joint_states", list)
    return {
        "state": state,
        "faults": [f"joint {i + 1}" for i, joint in enumerate(joints) if m.field(joint, "state", int) == m.JOINT_FAULT],
        "torques": [m.number(joint, "torque") for joint in joints],
        "temperatures": [m.number(joint, "motor_temp") for joint in joints],
    }


def _read_gripper(message: m.Message) -> dict[str, Any]:
    return {
        **{name: m.number(message, name) for name in ("position", "target_position", "current")},
        **{
            name: m.field(message, name, bool)
            for name in ("stalled", "reached_goal", "activated", "safety_switch_triggered")
        },
    }


def _frozen(array: Floats) -> Floats:
    result = np.array(array, dtype=np.float64)
    result.flags.writeable = False
    return result
