"""The graph of the real cell, each node a process, on emulators that live in the test and can be unplugged."""

from __future__ import annotations

import contextlib
import functools
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from geometry_msgs.msg import Transform, Twist, TwistStamped
from sensor_msgs.msg import TimeReference
from std_srvs.srv import Trigger
from trajectory_msgs.msg import MultiDOFJointTrajectory, MultiDOFJointTrajectoryPoint

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.ros.bringup import MANAGER, BringupOptions, describe
from dcqfa_ros.ros.conversions import TCP, to_duration, to_time
from dcqfa_ros.ros.diagnostics import from_message
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.supervisor import _command
from dcqfa_ros.ros.testing import Graph, Spawned, wait_until
from dcqfa_ros.rotations import quaternion_of
from dcqfa_ros.sim.ft300s import FT300SEmulator, FT300SOptions
from dcqfa_ros.sim.inovo import InovoEmulator, MotionFrame

HERE = Path(__file__).parent
UP_S = 120.0
JOG = m.CARTESIAN_JOG
SMALL = {"source": "emulated", "width": 160, "height": 120, "fps": 15.0}
SIGNS_OF_LIFE = {
    "sensor": ("wrench", {}),
    "arm": ("joint_states", {}),
    "wrist": ("camera_info", {"camera": "wrist"}),
    "front": ("camera_info", {"camera": "front"}),
}
"""What a device's node publishes only while the device is there: key of the interface and its placeholders."""


class RecordingArm(InovoEmulator):
    """An emulated arm that keeps every message of the socket that asks for something.

    Attributes:
        traffic: arrival (monotonic ns), topic and message, while ``keep_traffic``.
        stream: of every velocity demand when it was made (ROS 1 time, s) and whether it moves; None for other messages.
        newest: the last velocity demands that move: when they came and when they were made, both monotonic, ns.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stream: list[tuple[float, bool] | None] = []
        self.traffic: list[tuple[int, str, dict[str, Any]]] = []
        self.keep_traffic = True
        self.newest: deque[tuple[int, int]] = deque(maxlen=50)

    def receive(self, topic: str, message: dict[str, Any], stamp_ns: int) -> None:
        if topic == m.CARTESIAN_JOG:
            stamp, twist = message["header"]["stamp"], message["twist"]
            moves = any(twist[part][axis] for part in ("linear", "angular") for axis in "xyz")
            self.stream.append((stamp["secs"] + stamp["nsecs"] * 1e-9, moves))
            if moves:
                age_ns = time.time_ns() - (stamp["secs"] * 10**9 + stamp["nsecs"])
                self.newest.append((stamp_ns, time.monotonic_ns() - age_ns))
        else:
            self.stream.append(None)
        if self.keep_traffic:
            self.traffic.append((stamp_ns, topic, message))
        super().receive(topic, message, stamp_ns)

    def moving_since(self, stamp_ns: int) -> list[MotionFrame]:
        """Frames that ask for motion, whose last byte came after ``stamp_ns``."""
        return [f for f in self.frames if f.stamp_ns > stamp_ns and f.moves]


class Commander:
    """A source of motion at 50 Hz: twists of ``teleop``, or chunks of ``policy``."""

    def __init__(self, graph: Graph, source: str, publisher: Any) -> None:
        self.speed = 0.0
        self.publishing = False
        self._graph, self._source = graph, source
        self._publisher = publisher
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{source} commands", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._halt.wait(0.02):
            if not self.publishing:
                continue
            # To and fro, so that the arm stays where it is on the whole.
            sign = 1.0 if (time.monotonic() - began) % 2.0 < 1.0 else -1.0
            self._publisher.publish(self._message(sign * self.speed))

    def _message(self, speed: float) -> Any:
        now = self._graph.node.get_clock().now().nanoseconds
        twist = Twist()
        twist.linear.y = speed
        if self._source == "teleop":
            message = TwistStamped(twist=twist)
            message.header.stamp, message.header.frame_id = to_time(now), "world"
            return message
        chunk = MultiDOFJointTrajectory(joint_names=[TCP])
        chunk.header.stamp, chunk.header.frame_id = to_time(now), "world"
        for i in range(8):
            point = MultiDOFJointTrajectoryPoint(transforms=[Transform()], velocities=[twist])
            point.time_from_start = to_duration(i * 33_000_000)
            chunk.points.append(point)
        return chunk

    def close(self) -> None:
        self._halt.set()
        self._thread.join()


class FaultCell:
    """Use as a context manager; the graph is active inside.

    Attributes:
        graph: domain and probe.
        arm, sensor: the emulators.
        processes: by node name.
    """

    def __init__(self, parameters: dict[str, dict[str, Any]] | None = None) -> None:
        self._extra = parameters or {}
        self.processes: dict[str, Spawned] = {}
        self.other_stops: list[str] = []
        self._publishers: dict[str, Any] = {}
        self._clients: dict[str, Any] = {}
        self._commanders: dict[str, Commander] = {}
        self.states: list[Any] = []
        self.reports: list[tuple[float, Any]] = []
        self.arm_reports: list[tuple[float, Any]] = []
        self.heard_ns = dict.fromkeys(SIGNS_OF_LIFE, 0)  # when the newest message came
        self.stamp_ns = dict.fromkeys(SIGNS_OF_LIFE, 0)  # of the same clock, what it is stamped with

    def __enter__(self) -> FaultCell:
        self._stack = contextlib.ExitStack()
        try:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dcqfa_faults_")))
            self.arm = self._stack.enter_context(RecordingArm(time_scale=0.05, tool_m=(0.0, 0.0, 0.15)))
            options = FT300SOptions(link=self._folder / "ft300s")
            self.sensor = self._stack.enter_context(FT300SEmulator(options, source=self.arm.sensor_wrench))
            self.graph = self._stack.enter_context(Graph())
            for key, hear in (("arm_state", self._hear), ("diagnostics", self._hear_diagnostics)):
                entry = interface(key)
                self.graph.node.create_subscription(entry.message_class(), entry.name, hear, qos(entry.qos))
            echo = self.publisher("clock_echo", "policy")
            entry = interface("clock_probe")
            answer = functools.partial(self._answer, echo)
            self.graph.node.create_subscription(entry.message_class(), entry.name, answer, qos(entry.qos))
            for device, (key, fields) in SIGNS_OF_LIFE.items():
                entry = interface(key)
                take = functools.partial(self._note, device)
                self.graph.node.create_subscription(
                    entry.message_class(), entry.resolve(**fields), take, qos(entry.qos), raw=True
                )
            for node in describe(BringupOptions(cell="real", parameters_file=str(self._parameters()))):
                command = _command(node, "/", self._folder, sys.executable)
                if node.module.endswith(".camera_node"):
                    command[1:3] = [str(HERE / "pluggable_camera.py")]
                elif node.name == "watchdog":
                    command += ["--timeout-ms", "1000"]
                self.processes[node.name] = self.graph.spawn(*command, env=dict(node.env))
            try:
                self.graph.wait_graph("active", timeout=UP_S)
            except AssertionError as error:
                said = "\n".join(f"{name}: {p.output[-400:]}" for name, p in self.processes.items())
                raise AssertionError(f"{error}\n{said}") from None
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for commander in self._commanders.values():
            commander.close()
        self.graph.stop_all()
        self._stack.close()

    def _parameters(self) -> Path:
        own: dict[str, dict[str, Any]] = {
            "wrench_node": {"port": self.sensor.port},
            "wrist_camera_node": {**SMALL, "serial_number": "wrist"},
            "front_camera_node": {**SMALL, "serial_number": "front"},
            "arm_node": self.arm_parameters,
            MANAGER: {"lost_after_s": 10.0},
        }
        for name, values in self._extra.items():
            own.setdefault(name, {}).update(values)
        file = self._folder / "own.yaml"
        file.write_text(yaml.safe_dump({f"/**/{name}": {"ros__parameters": values} for name, values in own.items()}))
        return file

    @property
    def arm_parameters(self) -> dict[str, Any]:
        """What ``arm_node`` is told beside the shipped file."""
        return {
            "inovo.host": "127.0.0.1",
            "inovo.port": self.arm.port,
            "watchdog.address": f"unix:{self._folder}/watchdog",
            # Generous, for machines that are busy: what is shown here is that a stop comes, not how soon.
            "rate": 60.0,
            "maximum_age.wrench": 0.2,
            "maximum_age.state": 0.5,
            "maximum_age.command": 1.0,
            "maximum_age.observation": 2.0,
            "hold_after_s": 0.8,
            "stop_after_s": 1.5,
        }

    def _answer(self, publisher: Any, probe: Any) -> None:
        """Tell the arm the clock of the policy's host, as policy_node does."""
        echo = TimeReference(time_ref=probe.header.stamp, source=probe.header.frame_id)
        echo.header.stamp = self.graph.node.get_clock().now().to_msg()
        publisher.publish(echo)

    def _note(self, device: str, octets: bytes) -> None:
        seconds, nanoseconds = struct.unpack_from("<iI", octets, 4)  # the header's, behind four bytes of CDR
        self.heard_ns[device] = now = time.monotonic_ns()
        self.stamp_ns[device] = now - (time.time_ns() - (seconds * 10**9 + nanoseconds))

    def trigger(self, service: str) -> Any:
        """Call a service of ``arm_node``; its client is kept, because a new one must be discovered first."""
        if service not in self._clients:
            self._clients[service] = self.graph.node.create_client(Trigger, f"arm_node/{service}")
        client = self._clients[service]
        wait_until(client.service_is_ready, f"service {service}")
        future = client.call_async(Trigger.Request())
        wait_until(future.done, f"answer of {service}", 30.0)
        return future.result()

    # state of arm_node

    def _hear(self, message: Any) -> None:
        for status in message.status:
            values = {v.key: v.value for v in status.values}
            self.states.append(values | {"message": status.message, "heard_s": time.time()})

    def _hear_diagnostics(self, message: Any) -> None:
        now = time.time()
        for report in from_message(message):
            self.reports.append((now, report))
            if report.node == "arm_node" and report.status.name == "arm" and "missed_ticks" in report.status.values:
                self.arm_reports.append((now, report.status))

    @property
    def state(self) -> dict[str, str]:
        """Newest ``arm_state``."""
        return self.states[-1] if self.states else {}

    @property
    def armed(self) -> bool:
        return self.state.get("state") not in (None, "disarmed")

    def wait_stopped(self, timeout: float = 10.0) -> str:
        """Wait until the arm is disarmed and return the code."""
        wait_until(lambda: self.states and not self.armed, "the arm is disarmed", timeout)
        return self.state["code"]

    def arm_again(self, timeout: float = 60.0) -> None:
        """Reset the stop and arm, again and again until the cell lets it."""
        end = time.monotonic() + timeout
        said = ""
        while time.monotonic() < end:
            reset = self.trigger("reset_stop")
            seen = len(self.states)
            answer = self.trigger("arm")
            if answer.success or "already armed" in answer.message:
                if answer.success:  # a stop may follow at once
                    wait_until(lambda seen=seen: self._was_armed(seen), "the state after arming")
                return
            said = f"{reset.message}; {answer.message}"
            time.sleep(0.1)
        raise AssertionError(f"not armed within {timeout:g} s: {said}")

    def publisher(self, key: str, source: str) -> Any:
        """Return the one publisher for ``key`` of ``source``: ``arm_node`` refuses a second one."""
        entry = interface(key)
        name = entry.resolve(source=source) if "{source}" in entry.name else entry.name
        if name not in self._publishers:
            self._publishers[name] = self.graph.node.create_publisher(entry.message_class(), name, qos(entry.qos))
        return self._publishers[name]

    def _was_armed(self, since: int) -> bool:
        return any(state["state"] == "armed" for state in self.states[since:])

    @contextlib.contextmanager
    def commanded_by(self, source: str) -> Iterator[Commander]:
        """Give the lease to ``source`` and let it command."""
        if self.armed:
            self.trigger("disarm")
            self.wait_stopped()
        assert self.graph.set_parameter("arm_node", "command_source", source).successful
        if source not in self._commanders:  # one publisher per source: arm_node refuses a second one
            key = "twist_command" if source == "teleop" else "chunk"
            self._commanders[source] = Commander(self.graph, source, self.publisher(key, source))
        commander = self._commanders[source]
        commander.publishing = True
        try:
            yield commander
        finally:
            commander.publishing, commander.speed = False, 0.0

    def move(self, commander: Commander, speed: float = 0.02) -> None:
        """Arm, and wait until the arm moves.

        On a computer that stands still for tenths of a second the arm may be stopped before: then once more.
        """
        end = time.monotonic() + UP_S
        stops: list[str] = []
        while time.monotonic() < end:
            self.arm_again()
            before = time.monotonic_ns()
            commander.speed = speed
            moves_or_stopped = functools.partial(self._moves_or_stopped, before)
            wait_until(moves_or_stopped, "the arm moves or is stopped", 20.0)
            if self.armed:
                return
            stops.append(self.state.get("reason", ""))
            self.other_stops.append(self.state.get("code", ""))
        raise AssertionError(f"the arm was stopped again and again: {stops}")

    def _moves_or_stopped(self, since_ns: int) -> bool:
        return bool(self.arm.moving_since(since_ns)) or not self.armed

    # devices

    def unplug(self, device: str) -> None:
        if device == "sensor":
            self.sensor.unplug()
        elif device == "arm":
            self.arm.drop_connections(0.5)
        else:
            self.processes[f"{device}_camera_node"].send(signal.SIGUSR1)

    def plug(self, device: str) -> None:
        if device == "sensor":
            self.sensor.plug()
        elif device != "arm":  # its connections come back by themselves
            self.processes[f"{device}_camera_node"].send(signal.SIGUSR2)

    @property
    def tcp(self) -> np.ndarray:
        """Position of the emulated tool centre point, m."""
        return np.asarray(self.arm.position)

    @property
    def turn(self) -> np.ndarray:
        """Orientation of it, quaternion (x, y, z, w)."""
        return np.asarray(quaternion_of(self.arm.kinematics.forward(self.arm.joints)[1]))
