"""Commands of clients to the emulated Inovo controller: jogs, goals, cancels, gripper."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.kinematics import JOINTS
from dcqfa_ros.sim.inovo_actions import ABORTED, PREEMPTED, SUCCEEDED, EmulatedAction
from dcqfa_ros.sim.inovo_motion import JointPath, PlanError, plan_move, plan_trajectory
from dcqfa_ros.sim.rosbridge_server import RequestError

if TYPE_CHECKING:
    from dcqfa_ros.sim.inovo import InovoEmulator

Floats = NDArray[np.float64]
Executed = tuple["tuple[float, ...] | None", bool]
"""Velocities of a jog (None for other commands), and whether the command was taken."""

VELOCITY, TRAJECTORY = "velocity", "trajectory"


class EmulatedCommands:
    """What publishing on a topic makes the emulator do; raises ``MessageError`` for what is malformed."""

    def __init__(self, emulator: InovoEmulator) -> None:
        """Serve the actions of ``emulator`` and take its commands."""
        self._emulator = emulator
        publish = emulator.server.publish
        device = m.gripper_topic(emulator.gripper_name, "")
        empty_grip = {"position": 0.0, "effort": 0.0, "stalled": False, "reached_goal": False}
        self._move = EmulatedAction(m.MOVE, publish, empty_result={"success": False, "message": "", "index": 0})
        self._follow = EmulatedAction(m.FOLLOW, publish, empty_result={"error_code": -5, "error_string": ""})
        self._grip = EmulatedAction(f"{device}grip", publish, empty_result={"success": False})
        self._command = EmulatedAction(f"{device}gripper_command", publish, empty_result=empty_grip)
        self.motion_topics: dict[str, Callable[[m.Message], Executed]] = {
            m.CARTESIAN_JOG: self._on_jog,
            m.CARTESIAN_VELOCITY: self._on_low_level_twist,
            m.JOINT_JOG: self._on_joint_jog,
            m.JOINT_VELOCITY: self._on_joint_velocity,
            f"{m.MOVE}/goal": lambda message: self._on_goal(self._move, message),
            f"{m.FOLLOW}/goal": lambda message: self._on_goal(self._follow, message),
            f"{m.MOVE}/cancel": lambda message: self._on_cancel(self._move, message),
            f"{m.FOLLOW}/cancel": lambda message: self._on_cancel(self._follow, message),
        }
        self.gripper_topics: dict[str, Callable[[m.Message], None]] = {}
        if emulator.gripper_name:
            self.gripper_topics = {
                f"{device}grip/goal": self._on_grip,
                f"{device}gripper_command/goal": self._on_command,
            }

    def abort(self, text: str, status: int = ABORTED) -> None:
        """End the goals that move the arm."""
        for action in (self._move, self._follow):
            action.end(status, text)

    def path_ended(self) -> None:
        """Report that the arm is where its goal was."""
        self._move.end(SUCCEEDED, "", {"success": True, "message": "", "index": 0})
        self._follow.end(SUCCEEDED, "", {"error_code": 0, "error_string": ""})

    def gripper_ended(self) -> None:
        """Report that the gripper has stopped."""
        gripper = self._emulator.gripper
        state = {"position": gripper.position, "effort": 0.0, "stalled": gripper.stalled}
        self._grip.end(SUCCEEDED, "", {"success": True})
        self._command.end(SUCCEEDED, "", {**state, "reached_goal": gripper.reached})

    def publish_status(self) -> None:
        """Publish status of all actions and feedback of the moves; the status comes whether or not there are goals."""
        gripper = (self._grip, self._command) if self._emulator.gripper_name else ()
        for action in (self._move, self._follow, *gripper):
            action.publish_status()
        for action in (self._move, self._follow):
            action.publish_feedback({"progress": self._emulator.motion.progress, "index": 0})

    def _on_jog(self, message: m.Message) -> Executed:
        twist = _read_twist(message)
        with self._emulator.lock:
            if not self._emulator.power.allows_motion or self._emulator.motion.path is not None:
                return tuple(twist.tolist()), False
            self._emulator.controller = VELOCITY  # the move group selects what it needs
            self._emulator.motion.jog(twist)
        return tuple(twist.tolist()), True

    def _on_low_level_twist(self, message: m.Message) -> Executed:
        twist = _read_twist(message)
        with self._emulator.lock:
            if not self._emulator.power.allows_motion or self._emulator.controller != VELOCITY:
                return tuple(twist.tolist()), False
            self._emulator.motion.jog(twist)
        return tuple(twist.tolist()), True

    def _on_joint_jog(self, message: m.Message) -> Executed:
        names = m.field(message, "joint_names", list)
        given = m.floats(message, "velocities", len(names))
        velocities = np.zeros(JOINTS)
        for name, value in zip(names, given, strict=True):
            if name not in m.JOINT_NAMES:
                raise m.MessageError(f"joint_names: there is no joint {name!r}")
            velocities[m.JOINT_NAMES.index(name)] = value
        return self._jog_joints(velocities, select=True)

    def _on_joint_velocity(self, message: m.Message) -> Executed:
        return self._jog_joints(m.floats(message, "data", JOINTS), select=False)

    def _jog_joints(self, velocities: Floats, *, select: bool) -> Executed:
        with self._emulator.lock:
            allowed = self._emulator.power.allows_motion and self._emulator.motion.path is None
            if not allowed or not (select or self._emulator.controller == VELOCITY):
                return tuple(velocities.tolist()), False
            self._emulator.controller = VELOCITY
            self._emulator.motion.jog_joints(velocities)
        return tuple(velocities.tolist()), True

    def _on_goal(self, action: EmulatedAction, message: m.Message) -> Executed:
        goal, start = m.field(message, "goal", dict), self._emulator.joints
        _check_goal_id(message)
        plan = plan_move if action is self._move else plan_trajectory
        path: JointPath | None = None
        try:
            path = plan(self._emulator.kinematics, start, goal)  # takes a while: the arm moves on meanwhile
            refusal = ""
        except PlanError as error:
            refusal = str(error)
        with self._emulator.lock:
            if action is self._follow and self._emulator.controller != TRAJECTORY:
                refusal = f"the controller {self._emulator.controller!r} is selected, not {TRAJECTORY!r}"
            if not self._emulator.power.allows_motion:
                refusal = "the arm is not enabled"
            if path is None or refusal:
                action.reject(message, refusal)
                return None, False
            self.abort("a newer goal came", PREEMPTED)
            self._emulator.controller = TRAJECTORY
            action.accept(message)
            self._emulator.motion.follow(path)
        return None, True

    def _on_cancel(self, action: EmulatedAction, message: m.Message) -> Executed:
        with self._emulator.lock:
            if not action.cancels(message):
                return None, False
            self._emulator.motion.halt()
            action.end(PREEMPTED, "cancelled")
        return None, True

    def _on_grip(self, message: m.Message) -> None:
        choice = m.field(m.field(message, "goal", dict), "action", int)
        if choice not in (m.GRIP, m.RELEASE, 2):
            raise RequestError(f"action: expected 0 grip, 1 release or 2 toggle, got {choice}")
        opening = {m.GRIP: 0.0, m.RELEASE: 1.0}.get(choice, 0.0 if self._emulator.gripper.target > 0.5 else 1.0)
        self._move_gripper(self._grip, message, opening)

    def _on_command(self, message: m.Message) -> None:
        command = m.field(m.field(message, "goal", dict), "command", dict)
        self._move_gripper(self._command, message, m.number(command, "position"))

    def _move_gripper(self, action: EmulatedAction, message: m.Message, opening: float) -> None:
        _check_goal_id(message)
        if not self._emulator.gripper.activated:
            action.reject(message, "the gripper is not activated")
            return
        for other in (self._grip, self._command):
            other.end(PREEMPTED, "a newer goal came")
        action.accept(message)
        self._emulator.gripper.go(opening)


def _check_goal_id(message: m.Message) -> None:
    m.field({"goal_id": {}, **message}, "goal_id", dict)  # a client may leave it out: the action then makes one


def _read_twist(message: m.Message) -> Floats:
    twist = m.field({"twist": {}, **message}, "twist", dict)
    parts = []
    for name in ("linear", "angular"):
        # Fields that a client leaves out are zero, as rosbridge fills them in.
        part = m.field({name: {}, **twist}, name, dict)
        parts.append(m.xyz({"x": 0.0, "y": 0.0, "z": 0.0, **part}, "xyz"))
    return np.concatenate(parts)
