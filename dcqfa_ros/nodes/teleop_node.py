"""teleop_node: keyboard, gamepad or SpaceMouse -> twist and gripper commands, under the arm's lease and limits.

The mapping is ``dcqfa_ros.runtime.teleop``; this node reads the terminal, hears ``joy`` and publishes at a steady rate.
While it is active it always publishes: zero unless a key repeats or the dead-man button is held, so ``arm_node`` can
tell an operator who waits from one who is gone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from geometry_msgs.msg import TwistStamped
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from std_msgs.msg import Float64
from std_srvs.srv import Trigger

from dcqfa_ros.ros.conversions import to_time
from dcqfa_ros.ros.diagnostics import Level, Status
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.node import ManagedNode, run_node
from dcqfa_ros.runtime.teleop import (
    CLOSED,
    KEYBOARD_HELP,
    OPEN,
    SCALE_RANGE,
    SCALE_STEP,
    Gamepad,
    JoyMapping,
    KeyAction,
    Keyboard,
    TeleopError,
    bounded_scale,
    twist,
)
from dcqfa_ros.runtime.terminal import KeyTerminal, TerminalError, has_terminal

SOURCE = "teleop"
INPUTS = ("auto", "keyboard", "joy")
FRAMES = ("world", "tool")


class TeleopNode(ManagedNode):
    """Publishes what the operator asks for; the gamepad goes before the keyboard while its dead-man button is held."""

    NODE_NAME: ClassVar[str] = "teleop_node"

    def declare(self) -> None:
        """Declare the parameters."""
        add = self.add_parameter
        add("input", "auto", "auto: joy, and the keyboard where there is a terminal", choices=INPUTS, read_only=True)
        add("rate", 50.0, "commands per second", minimum=10.0, maximum=200.0, read_only=True)
        add("frame", "world", "frame of the twists", choices=FRAMES)
        add("linear_speed", 0.05, "full speed, m/s", minimum=0.0, maximum=1.0)
        add("angular_speed", 0.2, "full turning speed, rad/s", minimum=0.0, maximum=3.0)
        add("scale", 1.0, "share of full speed", minimum=SCALE_RANGE[0], maximum=SCALE_RANGE[1])
        add("key_timeout_s", 0.2, "motion after the last repeat of a key, s", minimum=0.05, maximum=1.0, read_only=True)
        add("joy.timeout_s", 0.25, "silence after which a gamepad counts as let go, s", minimum=0.05, maximum=2.0,
            read_only=True)  # fmt: skip
        add("joy.axes", [1, 0, 4, -1, -1, 3], "axis of joy for vx vy vz wx wy wz, -1: none", read_only=True)
        add("joy.signs", [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "factor per axis, -1 .. 1", read_only=True)
        add("joy.deadzone", 0.1, "deflection that counts as none", minimum=0.0, maximum=0.9, read_only=True)
        add("joy.dead_man_button", 4, "button to hold while the arm moves", minimum=0, read_only=True)
        add("joy.open_button", 1, "button that opens the gripper, -1: none", minimum=-1, read_only=True)
        add("joy.close_button", 0, "button that closes the gripper, -1: none", minimum=-1, read_only=True)
        add("arm_node", "arm_node", "node that keys arm and disarm", read_only=True)
        add("autostart", False, "activate without a lifecycle manager", read_only=True)
        self._terminal: KeyTerminal | None = None
        self._keyboard: Keyboard | None = None
        self._gamepad: Gamepad | None = None
        self._gripper = OPEN
        self._published = 0
        self._joy_problem = ""
        self._arm_text = ""
        if self.parameter("autostart"):
            self.post(self._begin)

    def _begin(self) -> None:
        self.trigger_configure()
        if self.lifecycle_label == "inactive":
            self.trigger_activate()
        if self.lifecycle_label != "active":
            self.finish(self.stop_reason, exit_code=1)

    def setup(self) -> None:
        """Check the mapping, find the inputs and create publishers and clients.

        Raises:
            TeleopError: the gamepad's mapping cannot work.
            TerminalError: the keyboard is asked for, and there is no terminal.
        """
        chosen = self.parameter("input")
        with_keyboard = chosen == "keyboard" or (chosen == "auto" and has_terminal())
        if chosen in ("auto", "joy"):
            self._gamepad = Gamepad(self._mapping(), float(self.parameter("joy.timeout_s")))
            self.create_guarded_subscription("joy", self._on_joy)
        if with_keyboard:
            if not has_terminal():
                raise TerminalError("input is keyboard, but there is no terminal: run `dcqfa teleop` in one")
            self._keyboard = Keyboard(float(self.parameter("key_timeout_s")))
        self._twists = self.create_interface_publisher("twist_command", source=SOURCE)
        self._grippers = self.create_interface_publisher("gripper_command", source=SOURCE)
        self.create_guarded_subscription("arm_state", self._on_arm_state)
        if with_keyboard:
            target = self.parameter("arm_node")
            self._arm = self.create_client(Trigger, self._of_arm("arm"))
            self._reset = self.create_client(Trigger, self._of_arm("reset_stop"))
            self._disarm = self.create_client(Trigger, self._of_arm("disarm"))
            self._set_parameters = self.create_client(SetParameters, f"{target}/set_parameters")

    def _of_arm(self, key: str) -> str:
        return f"{self.parameter('arm_node')}/{interface(key).name.rpartition('/')[2]}"

    def _mapping(self) -> JoyMapping:
        value = self.parameter
        return JoyMapping(
            axes=tuple(value("joy.axes")),
            signs=tuple(value("joy.signs")),
            deadzone=float(value("joy.deadzone")),
            dead_man=int(value("joy.dead_man_button")),
            open_button=int(value("joy.open_button")),
            close_button=int(value("joy.close_button")),
        )

    def start(self) -> None:
        """Take the keyboard and begin to publish."""
        if self._keyboard is not None:
            self._terminal = KeyTerminal()
            self._terminal.open()
            self._say(f"teleoperation by keyboard\n{KEYBOARD_HELP}")
        self.create_guarded_timer(1.0 / float(self.parameter("rate")), self._tick)

    def stop(self, reason: str) -> None:  # noqa: ARG002 - the base publishes the reason
        """Publish zero, give the terminal back and let go of everything."""
        terminal, self._terminal = self._terminal, None
        if terminal is not None:
            terminal.close()
        if self._keyboard is not None:
            self._keyboard.release()
        if self._gamepad is not None:
            self._gamepad = Gamepad(self._gamepad.mapping, self._gamepad.timeout_s)
        self._publish(np.zeros(6))

    def teardown(self) -> None:
        """Forget the inputs."""
        self._keyboard = self._gamepad = None
        for name in ("_arm", "_disarm", "_reset", "_set_parameters"):
            client = self.__dict__.pop(name, None)
            if client is not None:
                self.destroy_client(client)

    # inputs

    def _tick(self) -> None:
        now = time.monotonic_ns()
        self._read_keys(now)
        if not self.is_active:
            return
        wish = None
        if self._gamepad is not None:
            wish = self._gamepad.wish(now)
        if (wish is None or not wish.engaged) and self._keyboard is not None:
            wish = self._keyboard.wish(now)
        assert wish is not None
        value = self.parameter
        self._publish(twist(wish, value("linear_speed"), value("angular_speed"), value("scale")))

    def _read_keys(self, now_ns: int) -> None:
        if self._terminal is None or self._keyboard is None:
            return
        try:
            data = self._terminal.read()
        except TerminalError as error:
            self._publish(np.zeros(6))
            self.finish(str(error), exit_code=1)
            return
        action = self._keyboard.feed(data, now_ns)
        if action is not None:
            self._act(action)

    def _act(self, action: KeyAction) -> None:
        if action is KeyAction.STOP:
            self._publish(np.zeros(6))
            self._ask(self._disarm, Trigger.Request(), "disarm")
        elif action is KeyAction.ARM:
            message = Parameter("command_source", value=SOURCE).to_parameter_msg()
            request = SetParameters.Request(parameters=[message])
            self._ask(self._set_parameters, request, "command_source", then_arm=True)
        elif action is KeyAction.RESET:
            self._ask(self._reset, Trigger.Request(), "reset")
        elif action is KeyAction.GRIPPER:
            self._move_gripper(CLOSED if self._gripper == OPEN else OPEN)
        elif action is KeyAction.FRAME:
            self._set("frame", FRAMES[1 - FRAMES.index(self.parameter("frame"))])
        elif action is KeyAction.QUIT:
            self.finish("quit by key")
        else:
            factor = SCALE_STEP if action is KeyAction.FASTER else 1.0 / SCALE_STEP
            self._set("scale", bounded_scale(float(self.parameter("scale")) * factor))

    def _set(self, name: str, value: Any) -> None:
        self.set_parameters([Parameter(name, value=value)])
        shown = f"{value:.2f}" if isinstance(value, float) else value
        self._say(f"{name}: {shown}")

    def _on_arm_state(self, message: Any) -> None:
        """Show the operator why the arm does not move."""
        text = message.status[0].message if message.status else ""
        if self._terminal is not None and text != self._arm_text:
            self._arm_text = text
            self._say(f"arm: {text}")

    def _on_joy(self, message: Any) -> None:
        gamepad = self._gamepad
        if gamepad is None or not self.is_active:
            return
        try:
            opening = gamepad.receive(message.axes, message.buttons, time.monotonic_ns())
        except TeleopError as error:
            if str(error) != self._joy_problem:  # said once, not at the gamepad's rate
                self._joy_problem = str(error)
                self.event(Level.WARN, str(error))
            return
        self._joy_problem = ""
        if opening is not None:
            self._move_gripper(opening)

    # outputs

    def _publish(self, values: Any) -> None:
        message = TwistStamped()
        message.header.stamp = to_time(self.get_clock().now().nanoseconds)
        message.header.frame_id = self.parameter("frame")
        linear, angular = message.twist.linear, message.twist.angular
        linear.x, linear.y, linear.z, angular.x, angular.y, angular.z = (float(v) for v in values)
        self._twists.publish(message)
        self._published += 1

    def _move_gripper(self, opening: float) -> None:
        self._gripper = opening
        self._grippers.publish(Float64(data=opening))
        self._say("gripper: open" if opening == OPEN else "gripper: close")

    def _ask(self, client: Any, request: Any, what: str, then_arm: bool = False) -> None:
        """Call a service of the arm without waiting; the answer is shown when it comes."""
        if not client.service_is_ready():
            self._say(f"{what}: {self.parameter('arm_node')} does not answer: is it up, in this namespace and domain?")
            return

        def answer(future: Any) -> None:
            result = future.result()
            if not then_arm:
                self._say(f"{what}: {result.message}")
                return
            first = result.results[0]
            if first.successful:
                self._ask(self._arm, Trigger.Request(), "arm")
            else:
                self._say(f"{what}: refused: {first.reason}")

        client.call_async(request).add_done_callback(self.guard(answer))

    def _say(self, text: str) -> None:
        self.event(Level.OK, text.partition("\n")[0])
        if self._terminal is not None and "\n" in text:
            print(text, flush=True)

    def status(self) -> Sequence[Status]:
        """Report the inputs and whether the operator is engaged."""
        if not self.is_active:
            return ()
        now = time.monotonic_ns()
        values = {
            "keyboard": str(self._terminal is not None).lower(),
            "scale": f"{self.parameter('scale'):.2f}",
            "frame": self.parameter("frame"),
            "published": str(self._published),
        }
        level, text = Level.OK, "waits for the operator"
        gamepad = self._gamepad
        if gamepad is not None:
            silent = gamepad.is_silent(now)
            values |= {
                "joy": "silent" if silent else "heard",
                "joy_messages": str(gamepad.messages),
                "joy_refused": str(gamepad.refused),
            }
            if self._joy_problem or (silent and self._terminal is None):
                level, text = Level.WARN, self._joy_problem or "nothing is heard on joy: is its node running?"
        return [Status(level, "teleop", text, values)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node; see ``run_node`` for the exit code."""
    return run_node(TeleopNode, argv)


if __name__ == "__main__":
    sys.exit(main())
