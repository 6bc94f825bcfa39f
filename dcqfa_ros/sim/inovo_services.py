"""Services of the emulated Inovo controller."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.kinematics import JOINTS, KinematicsError
from dcqfa_ros.rotations import quaternion_of
from dcqfa_ros.sim.rosbridge_server import RequestError

if TYPE_CHECKING:
    from dcqfa_ros.sim.inovo import InovoEmulator

CONTROLLERS = ("trajectory", "velocity", "zerog")
_NO_SOLUTION = -31  # of MoveIt


class EmulatedServices:
    """What ``call_service`` reaches; a refusal of a Trigger is a response with ``success`` false."""

    def __init__(self, emulator: InovoEmulator) -> None:
        """Serve for ``emulator``; nobody controls the arm yet."""
        self._emulator = emulator
        self.controlled_by = ""

    def serve(self, service: str, arguments: m.Message) -> m.Message:
        """Return the response of a service.

        Raises:
            RequestError: there is no such service, or its arguments are not what it expects.
        """
        try:
            with self._emulator.lock:
                return self._serve(service, arguments)
        except m.MessageError as error:
            raise RequestError(f"Service {service}: {error}") from None

    def _serve(self, service: str, arguments: m.Message) -> m.Message:
        emulator = self._emulator
        try:
            if emulator.power.serve(service):
                return {"success": True, "message": ""}
        except RequestError as error:
            return {"success": False, "message": str(error)}
        if emulator.gripper_name and service == m.gripper_topic(emulator.gripper_name, "activate"):
            if emulator.power.bus != m.BUS_ON:
                return {"success": False, "message": "the bus is off"}
            emulator.gripper.activate()
            return {"success": True, "message": ""}
        if service == m.SWITCH_CONTROLLER:
            return self._switch(m.field(arguments, "name", str))
        if service == m.CLAIM_CONTROL:
            return self._claim(m.field(arguments, "id", str), bool(arguments.get("force", False)))
        if service == m.FORWARD:
            position, rotation = emulator.kinematics.forward(m.floats(arguments, "joint_angles", JOINTS))
            pose = {"position": m.vector(position), "orientation": m.quaternion(quaternion_of(rotation))}
            return {"tcp_pose": pose, "success": True, "message": ""}
        if service == m.INVERSE:
            return self._inverse(arguments)
        if service in (m.SEQUENCE_START, m.SEQUENCE_STOP):
            emulator.sequence_state = m.SEQUENCE_RUNNING if service == m.SEQUENCE_START else 0
            return {"success": True, "message": ""}
        raise RequestError(f"Service {service} does not exist")

    def _switch(self, name: str) -> m.Message:
        if name not in CONTROLLERS:
            return {"success": False, "message": f"there is no controller {name!r}: {', '.join(CONTROLLERS)}"}
        if not self._emulator.power.allows_motion:
            return {"success": False, "message": "the arm is not enabled"}
        self._emulator.switch(name)
        return {"success": True, "message": ""}

    def _claim(self, identity: str, force: bool) -> m.Message:
        if force or self.controlled_by in ("", identity):
            self.controlled_by = identity
        return {"in_control": self.controlled_by == identity, "id_of_controller": self.controlled_by}

    def _inverse(self, arguments: m.Message) -> m.Message:
        position, orientation = m.read_pose({"pose": m.field(arguments, "tcp_pose", dict)})
        start = self._emulator.motion.joints
        if arguments.get("initial_joint_angles"):
            start = m.floats(arguments, "initial_joint_angles", JOINTS)
        try:
            joints = self._emulator.kinematics.inverse(position, orientation, start)
        except KinematicsError:
            return {"error_code": _NO_SOLUTION, "joint_angles": []}
        return {"error_code": 1, "joint_angles": joints.tolist()}
