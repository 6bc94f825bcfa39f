"""teleop_node in a real graph: gamepad and keyboard become commands, and letting go or dying ends them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rcl_interfaces.msg import SetParametersResult
from rcl_interfaces.srv import SetParameters
from sensor_msgs.msg import Joy
from std_srvs.srv import Trigger

from dcqfa_ros.cli import main
from dcqfa_ros.ros.conversions import status_message
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.testing import Graph, wait_until

NODE = "teleop_node"
MODULE = "dcqfa_ros.nodes.teleop_node"
FREE, HELD = [0] * 6, [0, 0, 0, 0, 1, 0]


class Commands:
    """What the node publishes, as the arm would hear it."""

    def __init__(self, graph: Graph) -> None:
        self.twists: list[Any] = []
        self.grippers: list[float] = []
        for key, take in (
            ("twist_command", self.twists.append),
            ("gripper_command", lambda m: self.grippers.append(m.data)),
        ):
            entry = interface(key)
            graph.node.create_subscription(entry.message_class(), entry.resolve(source="teleop"), take, qos(entry.qos))

    def speed(self) -> float:
        """Of the newest twist along x; NaN before the first."""
        return self.twists[-1].twist.linear.x if self.twists else float("nan")

    def forget(self) -> None:
        self.twists.clear()


@contextlib.contextmanager
def joystick(graph: Graph, rate: float = 50.0) -> Iterator[dict[str, list[Any]]]:
    """Publish joy at ``rate`` with what the yielded dictionary holds, as joy_node's autorepeat does."""
    state: dict[str, list[Any]] = {"axes": [0.0] * 6, "buttons": FREE}
    entry = interface("joy")
    publisher = graph.node.create_publisher(entry.message_class(), entry.name, qos(entry.qos))
    halt = threading.Event()

    def run() -> None:
        while not halt.wait(1.0 / rate):
            publisher.publish(Joy(axes=state["axes"], buttons=state["buttons"]))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield state
    finally:
        halt.set()
        thread.join()
        graph.node.destroy_publisher(publisher)


def test_a_gamepad_moves_the_arm_while_its_dead_man_button_is_held() -> None:
    with Graph() as graph:
        graph.spawn_node(MODULE, NODE, input="joy", linear_speed=0.05, scale=0.5, **{"joy.timeout_s": 1.0})
        assert graph.activate(NODE)
        commands = Commands(graph)
        wait_until(lambda: commands.twists, "twists")
        assert commands.speed() == 0.0
        with joystick(graph) as joy:
            joy["axes"] = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
            graph.wait_for(NODE, "teleop", joy="heard")
            assert commands.speed() == 0.0, "the dead-man button is not held"
            joy["buttons"] = HELD
            wait_until(lambda: commands.speed() == pytest.approx(0.025), "motion")
            assert commands.twists[-1].header.frame_id == "world"
            joy["buttons"] = [1, 0, 0, 0, 1, 0]
            wait_until(lambda: commands.grippers == [0.0], "the gripper closes")
            joy["buttons"] = FREE
            wait_until(lambda: commands.speed() == 0.0, "rest after letting go")
            joy["buttons"] = HELD
            wait_until(lambda: commands.speed() > 0.0, "motion again")
        wait_until(lambda: commands.speed() == 0.0, "rest after the gamepad went silent")
        graph.wait_for(NODE, "teleop", "nothing is heard on joy", joy="silent")


def test_a_gamepad_that_does_not_fit_is_said_once_and_moves_nothing() -> None:
    with Graph() as graph:
        graph.spawn_node(MODULE, NODE, input="joy")
        assert graph.activate(NODE)
        commands = Commands(graph)
        with joystick(graph) as joy:
            joy["axes"], joy["buttons"] = [0.0, 1.0], HELD
            graph.wait_for(NODE, "event", "joy: 2 axes, but joy.axes uses number 4")
            wait_until(lambda: len(commands.twists) > 20, "twists")
        assert all(t.twist.linear.x == 0.0 for t in commands.twists)
        events = [r for r in graph.reports if r.status.name == "event" and "joy: 2 axes" in r.status.message]
        assert len(events) == 1


def test_a_mapping_without_a_dead_man_button_or_axis_is_refused() -> None:
    with Graph() as graph:
        graph.spawn_node(MODULE, NODE, input="joy", **{"joy.axes": "[-1, -1, -1, -1, -1, -1]"})
        assert not graph.configure(NODE)
        graph.wait_for(NODE, "event", "joy.axes: no axis is used")


def test_the_keyboard_needs_a_terminal() -> None:
    with Graph() as graph:
        graph.spawn_node(MODULE, NODE, input="keyboard")
        assert not graph.configure(NODE)
        graph.wait_for(NODE, "event", "there is no terminal: run `dcqfa teleop` in one")


class Terminal:
    """`dcqfa teleop` on a pseudo-terminal."""

    def __init__(self, graph: Graph, *arguments: str) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.text = ""

        def login() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        command = [sys.executable, "-m", "dcqfa_ros.cli", "teleop", *arguments]
        self.process = subprocess.Popen(
            command, stdin=self.slave, stdout=self.slave, stderr=self.slave, env=graph.env, preexec_fn=login
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 4096):
                self.text += data.decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    @property
    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.slave)
        self._reader.join(5.0)
        os.close(self.master)


@contextlib.contextmanager
def terminal(graph: Graph, *arguments: str) -> Iterator[Terminal]:
    there = Terminal(graph, *arguments)
    try:
        wait_until(lambda: "teleoperation by keyboard" in there.text, "the help of the keyboard")
        yield there
    finally:
        there.close()


def test_keys_move_while_they_repeat_and_quitting_gives_the_terminal_back() -> None:
    with Graph() as graph:
        commands = Commands(graph)
        with terminal(graph, "--scale", "1.0") as there:
            assert not there.is_as_before
            wait_until(lambda: commands.twists, "twists")
            end = time.monotonic() + 20.0
            while commands.speed() != pytest.approx(0.05) and time.monotonic() < end:
                there.type("w")
                time.sleep(0.03)
            assert commands.speed() == pytest.approx(0.05)
            wait_until(lambda: commands.speed() == 0.0, "rest after the key is up")
            there.type("g")
            wait_until(lambda: commands.grippers == [0.0], "the gripper closes")
            there.type("t")
            wait_until(lambda: commands.twists[-1].header.frame_id == "tool", "tool frame")
            there.type("q")
            assert there.process.wait(20.0) == 0
            assert there.is_as_before
            assert commands.speed() == 0.0


def test_the_arm_key_takes_the_lease_then_arms_and_space_disarms() -> None:
    with Graph() as graph:
        asked: list[str] = []

        def parameters(request: Any, response: Any) -> Any:
            asked.extend(f"{p.name}={p.value.string_value}" for p in request.parameters)
            response.results = [SetParametersResult(successful=True)]
            return response

        def trigger(name: str) -> Any:
            def answer(_: Any, response: Any) -> Any:
                asked.append(name)
                response.success, response.message = True, f"{name}ed"
                return response

            return answer

        graph.node.create_service(SetParameters, "arm_node/set_parameters", parameters)
        graph.node.create_service(Trigger, "arm_node/arm", trigger("arm"))
        graph.node.create_service(Trigger, "arm_node/disarm", trigger("disarm"))
        graph.node.create_service(Trigger, "arm_node/reset_stop", trigger("reset_stop"))
        with terminal(graph) as there:
            end = time.monotonic() + 20.0
            while len(asked) < 2 and time.monotonic() < end:  # until the services are discovered
                there.type("m")
                time.sleep(0.5)
            assert asked[:2] == ["command_source=teleop", "arm"]
            there.type("x")
            wait_until(lambda: asked[-1] == "reset_stop", "reset")
            there.type(" ")
            wait_until(lambda: asked[-1] == "disarm", "disarmed")
            wait_until(lambda: "disarm: disarmed" in there.text, "the answer")
            graph.publish("arm_state", status_message(0, "arm", 2, "disarmed: contact force 30 N", {}))
            wait_until(lambda: "arm: disarmed: contact force 30 N" in there.text, "why the arm was stopped")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_ends_it_in_order_with_the_terminal_given_back(number: signal.Signals) -> None:
    with Graph() as graph, terminal(graph) as there:
        there.process.send_signal(number)
        assert there.process.wait(20.0) == 0
        assert there.is_as_before
        assert "Traceback" not in there.text


def test_a_killed_node_leaves_a_usable_terminal() -> None:
    with Graph() as graph, terminal(graph) as there:
        report = graph.wait_for(NODE, "lifecycle", state="active")
        os.kill(int(report.status.values["pid"]), signal.SIGKILL)
        assert there.process.wait(20.0) == 128 + signal.SIGKILL
        assert there.is_as_before


def test_a_scale_out_of_range_is_refused() -> None:
    assert main(["teleop", "--scale", "2"]) == 2
