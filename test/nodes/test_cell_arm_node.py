"""arm_node of a cell with an arm as a real process: emulated Inovo over its WebSocket, the real watchdog process."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from geometry_msgs.msg import PoseStamped
from lifecycle_msgs.msg import Transition
from sensor_msgs.msg import JointState, TimeReference
from std_msgs.msg import Bool
from trajectory_msgs.msg import (
    JointTrajectory,
    JointTrajectoryPoint,
    MultiDOFJointTrajectory,
    MultiDOFJointTrajectoryPoint,
)

from dcqfa_ros.drivers.kinematics import inovo_kinematics
from dcqfa_ros.paths import find_config
from dcqfa_ros.ros.arm_messages import twist_message, wrench_message
from dcqfa_ros.ros.conversions import status_values, to_duration, to_time
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.testing import Graph, wait_until
from dcqfa_ros.sim.inovo import HOME, InovoEmulator, MotionFrame

BOX = {"workspace.minimum": "[-0.4, 0.2, 0.1]", "workspace.maximum": "[0.4, 0.6, 0.8]"}
# Generous, for machines that are busy: the figures of the real cell are those of the benchmarks.
AGES = {"maximum_age.wrench": 0.5, "maximum_age.state": 0.5, "maximum_age.command": 1.0, "maximum_age.observation": 2.0,
        "hold_after_s": 0.8, "stop_after_s": 1.5, "cameras": "['']"}  # fmt: skip


class Cell:
    """The node, what it publishes, and the one who commands it."""

    def __init__(self, graph: Graph, source: str = "teleop", **parameters: Any) -> None:
        self.graph, self.source = graph, source
        self.states: list[dict[str, str]] = []
        self.results: list[dict[str, str]] = []
        self.heard: dict[str, Any] = {}
        self._listen("arm_state", lambda m: self.states.append(status_values(m)))
        self._listen("motion_result", lambda m: self.results.append(status_values(m)))
        for key in ("tcp_pose", "joint_states", "tcp_speed", "gripper_state", "tool_wrench"):
            self._listen(key, lambda m, key=key: self.heard.__setitem__(key, m))
        self._publishers: dict[str, Any] = {}
        self.clock_ahead_ns: int | None = 0  # of the policy's host; None: it does not answer
        if source == "policy":
            self._listen("clock_probe", self._echo)
        values = {**AGES, "command_source": source, "rate": 50.0, **parameters}
        self.arm = graph.spawn_node("dcqfa_ros.nodes.cell_arm_node", "arm_node", **values)
        self.wrench: np.ndarray | None = np.zeros(3)
        self.wish: Any = None
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.rival: Any = None
        self.last = ""

    def _listen(self, key: str, callback: Any) -> None:
        entry = interface(key)
        self.graph.node.create_subscription(entry.message_class(), entry.name, callback, qos(entry.qos))

    def _echo(self, probe: TimeReference) -> None:
        if self.clock_ahead_ns is not None:
            echo = TimeReference(time_ref=probe.header.stamp, source=probe.header.frame_id)
            echo.header.stamp = to_time(self.now() + self.clock_ahead_ns)
            self.publish("clock_echo", echo)

    def begin(self) -> None:
        assert self.graph.activate("arm_node"), self.arm.output
        self._thread.start()

    def end(self) -> None:
        self._halt.set()
        if self._thread.ident:
            self._thread.join()
        self.graph.stop_all()

    def _run(self) -> None:
        while not self._halt.wait(0.02):
            if self.wrench is not None:
                stamp = self.graph.node.get_clock().now().to_msg()
                self.publish("wrench", wrench_message(stamp, "ft_sensor", self.wrench, np.zeros(3)))
            if self.wish is not None:
                self.publish("twist_command", twist_message(self.now(), self.wish, np.zeros(3)))

    def now(self) -> int:
        return self.graph.node.get_clock().now().nanoseconds

    def publish(self, key: str, message: Any) -> None:
        if key not in self._publishers:
            entry = interface(key)
            name = entry.resolve(source=self.source)
            self._publishers[key] = self.graph.node.create_publisher(entry.message_class(), name, qos(entry.qos))
        self._publishers[key].publish(message)

    def armed(self) -> None:
        def arm() -> bool:
            response = self.graph.trigger("arm_node/arm")
            self.last = response.message
            return bool(response.success)

        try:
            wait_until(arm, "armed")
        except AssertionError:
            raise AssertionError(f"not armed: {self.last}") from None

    def stopped(self) -> str:
        """Wait until the arm has been disarmed and stands still; return why."""

        def stop() -> dict[str, str] | None:
            state = self.states[-1] if self.states else {"state": "armed"}
            return state if state["state"] == "disarmed" and state["code"] != "never_armed" else None

        state: dict[str, str] = wait_until(stop, "stop")
        return state["code"]


@pytest.fixture
def graph() -> Iterator[Graph]:
    with Graph() as graph:
        yield graph


@pytest.fixture
def emulator() -> Iterator[InovoEmulator]:
    with InovoEmulator(ready=True, time_scale=0.05) as emulator:
        yield emulator


@pytest.fixture
def cell(graph: Graph, emulator: InovoEmulator) -> Iterator[Cell]:
    cell = Cell(graph, **BOX, **{"inovo.host": "127.0.0.1", "inovo.port": emulator.port, "watchdog.use": "none"})
    cell.begin()
    yield cell
    cell.end()


def moving(frame: MotionFrame) -> bool:
    return frame.moves


def moves(cell: Cell, emulator: InovoEmulator) -> None:
    """Arm until the arm moves; what a busy machine stops meanwhile is begun again."""
    direction = -1.0 if emulator.position[0] > 0.0 else 1.0  # away from the walls of the workspace
    cell.wish = np.array([0.05 * direction, 0.0, 0.0])

    def moving() -> bool:
        if cell.states[-1]["state"] == "disarmed":
            cell.graph.trigger("arm_node/reset_stop")
            cell.last = cell.graph.trigger("arm_node/arm").message
            return False
        return abs(emulator.twist[0]) > 0.03

    try:
        wait_until(moving, "motion")
    except AssertionError:
        raise AssertionError(f"no motion: {cell.last}; {cell.states[-1]}") from None


def at_rest(emulator: InovoEmulator) -> None:
    wait_until(lambda: not emulator.is_moving, "rest")
    last = emulator.frames[-1].number
    time.sleep(0.3)
    assert not [f for f in emulator.frames if f.number > last and f.moves], "a motion command after the stop"


def _second_publisher(cell: Cell, key: str) -> None:
    entry = interface(key)
    node = cell.graph.node
    cell.rival = node.create_publisher(entry.message_class(), entry.resolve(source="teleop"), qos(entry.qos))


def _wish(cell: Cell, value: Any) -> None:
    cell.wish = value


def _wrench(cell: Cell, value: Any) -> None:
    cell.wrench = value


def _nothing(cell: Cell, emulator: InovoEmulator) -> None:
    """The cause goes by itself."""


Act = Callable[[Cell, InovoEmulator], Any]
FAULTS: dict[str, tuple[str, Act, Act]] = {  # name: stop code, what causes it, what takes it away
    "service": ("operator_stop", lambda c, _: c.graph.trigger("arm_node/stop"), _nothing),
    "topic": (
        "operator_stop",
        lambda c, _: c.publish("operator_stop", Bool(data=True)),
        lambda c, _: c.publish("operator_stop", Bool(data=False)),
    ),
    "contact": ("force", lambda c, _: _wrench(c, np.array([0, 0, 60.0])), lambda c, _: _wrench(c, np.zeros(3))),
    "NaN": ("not_finite", lambda c, _: _wish(c, np.array([np.nan, 0, 0])), _nothing),
    "silence": ("command_timeout", lambda c, _: _wish(c, None), _nothing),
    "sensor": ("wrench_lost", lambda c, _: _wrench(c, None), lambda c, _: _wrench(c, np.zeros(3))),
    "connection": ("arm_lost", lambda _, e: e.drop_connections(0.2), _nothing),
    "emergency stop": ("estop", lambda _, e: e.press_estop(), lambda _, e: e.release_estop()),
    "safe stop": ("safe_stop", lambda _, e: e.trip(), _nothing),
    "second sensor": (
        "two_publishers",
        lambda c, _: _second_publisher(c, "wrench"),
        lambda c, _: c.graph.node.destroy_publisher(c.rival),
    ),
    "rival": ("two_publishers", lambda c, _: _second_publisher(c, "twist_command"), _nothing),
}
TWICE = ("second sensor", "rival")
STARVED = ("wrench_lost", "command_timeout", "arm_lost")  # what a busy machine may cause before the fault does


def test_each_fault_stops_by_name_and_latches_until_it_is_reset(cell: Cell, emulator: InovoEmulator) -> None:
    trigger = cell.graph.trigger
    for name, (code, cause, remedy) in FAULTS.items():
        for _ in range(5):
            moves(cell, emulator)
            cause(cell, emulator)
            seen = cell.stopped()
            assert seen == code or seen in STARVED, (name, seen)
            at_rest(emulator)
            refused = trigger("arm_node/arm")
            assert not refused.success, name
            assert "two publishers" in refused.message if name in TWICE else "reset_stop" in refused.message
            if name in ("topic", "contact", "sensor") and seen == code:
                assert not trigger("arm_node/reset_stop").success, f"{name}: its cause is still there"
            remedy(cell, emulator)
            wait_until(lambda: trigger("arm_node/reset_stop").success, f"reset after {name}")
            at_rest(emulator)
            if seen == code:
                break
        assert seen == code, name
    for key in ("tcp_pose", "joint_states", "tcp_speed", "gripper_state", "tool_wrench"):
        assert key in cell.heard, key
    assert cell.heard["tcp_pose"].header.frame_id == "world"


def test_a_pose_and_its_refusal_are_answered(graph: Graph, emulator: InovoEmulator) -> None:
    cell = Cell(
        graph, "operator", **BOX, **{"inovo.host": "127.0.0.1", "inovo.port": emulator.port, "watchdog.use": "none"}
    )
    try:
        cell.begin()
        cell.armed()
        pose: PoseStamped = wait_until(lambda: cell.heard.get("tcp_pose"), "pose")
        start = emulator.position
        pose.header.stamp = to_time(0)
        pose.pose.position.z = 5.0
        wait_until(lambda: cell.publish("pose_command", pose) or cell.results, "refusal")
        assert cell.results[-1]["outcome"] == "rejected" and "workspace" in cell.results[-1]["reason"]
        pose.pose.position.z = float(start[2]) + 0.03
        cell.publish("pose_command", pose)
        wait_until(lambda: cell.results[-1]["outcome"] == "succeeded", "end of the move")
        assert emulator.position[2] == pytest.approx(start[2] + 0.03, abs=2e-3)

        wait_until(lambda: cell.states[-1]["activity"] == "waiting", "streaming again")
        cell.results.clear()
        names = [f"j{i + 1}" for i in range(6)]
        goal = emulator.joints
        goal[5] += 0.2
        command = JointTrajectory(joint_names=names[::-1])
        command.points = [JointTrajectoryPoint(positions=goal[::-1].tolist(), time_from_start=to_duration(10**8))]
        wait_until(lambda: cell.publish("joint_command", command) or cell.results, "refusal")
        assert cell.results[-1]["outcome"] == "rejected" and "would turn at" in cell.results[-1]["reason"]
        command.points[0].time_from_start = to_duration(10**9)
        cell.publish("joint_command", command)
        wait_until(lambda: cell.results[-1]["outcome"] == "succeeded", "end of the trajectory")
        assert cell.results[-1]["command"] == "joint_trajectory"
        assert emulator.joints == pytest.approx(goal, abs=5e-3)
    finally:
        cell.end()


@pytest.mark.parametrize("command", ["twist", "pose"])
def test_an_orderly_end_in_mid_motion_stops_the_arm_and_alarms_nobody(
    graph: Graph, emulator: InovoEmulator, command: str, tmp_path: Any
) -> None:
    source, listen = "teleop" if command == "twist" else "operator", f"unix:{tmp_path}/w.sock"
    url = f"ws://127.0.0.1:{emulator.port}"
    dog = graph.spawn(
        sys.executable, "-m", "dcqfa_ros.watchdog", "--url", url, "--listen", listen, "--timeout-ms", "1000"
    )
    cell = Cell(graph, source, **BOX, **{"inovo.host": "127.0.0.1", "inovo.port": emulator.port,
                                         "watchdog.address": listen})  # fmt: skip
    try:
        cell.begin()
        if command == "twist":
            moves(cell, emulator)
        else:
            cell.armed()
            pose: PoseStamped = wait_until(lambda: cell.heard.get("tcp_pose"), "pose")
            pose.header.stamp = to_time(0)
            pose.pose.position.z += 0.1
            wait_until(lambda: cell.publish("pose_command", pose) or emulator.is_moving, "motion")
        cell.arm.send(signal.SIGTERM)
        assert cell.arm.wait() == 0
        at_rest(emulator)
        assert cell.states[-1]["code"] == "shutdown"
        time.sleep(1.0)  # the silence that would trip
        assert '"connected"' in dog.output and '"silence"' not in dog.output
    finally:
        cell.end()


def test_a_latched_stop_outlives_configuring_anew(cell: Cell, emulator: InovoEmulator) -> None:
    moves(cell, emulator)
    cell.graph.trigger("arm_node/stop")
    cell.wish = None
    assert cell.stopped() == "operator_stop"
    for step in ("DEACTIVATE", "CLEANUP", "CONFIGURE", "ACTIVATE"):
        assert cell.graph.change("arm_node", getattr(Transition, f"TRANSITION_{step}")), step
    at_rest(emulator)
    assert "operator_stop" in cell.graph.trigger("arm_node/arm").message
    assert cell.graph.trigger("arm_node/reset_stop").success


def test_a_policy_chunk_moves_the_arm(graph: Graph, emulator: InovoEmulator) -> None:
    cell = Cell(
        graph, "policy", **BOX, **{"inovo.host": "127.0.0.1", "inovo.port": emulator.port, "watchdog.use": "none"}
    )
    try:
        cell.begin()
        cell.armed()
        wait_until(lambda: cell.heard.get("tcp_pose"), "pose")
        chunk = MultiDOFJointTrajectory(joint_names=["tcp"])
        chunk.header.frame_id = "world"
        gripper = JointTrajectory(joint_names=["gripper"])
        for index in range(16):
            point = MultiDOFJointTrajectoryPoint()
            twist = twist_message(0, np.array([0.04, 0.0, 0.0]), np.zeros(3)).twist
            point.velocities = [twist]
            point.time_from_start = to_duration(index * 33_333_333)
            chunk.points.append(point)
            opening = JointTrajectoryPoint(positions=[0.0], time_from_start=point.time_from_start)
            gripper.points.append(opening)
        start = emulator.position[0]

        def send() -> bool:
            chunk.header.stamp = gripper.header.stamp = to_time(cell.now())
            cell.publish("gripper_chunk", gripper)
            cell.publish("chunk", chunk)
            time.sleep(0.2)
            return bool(emulator.position[0] - start > 0.01)

        wait_until(send, "motion by chunks")
        wait_until(lambda: cell.heard["gripper_state"].position[0] < 0.9, "gripper closes")
        assert cell.stopped() == "command_timeout"

        def stops_on(cause: Callable[[], None], code: str) -> None:
            cell.clock_ahead_ns = 0
            graph.set_parameter("arm_node", "clock_offset_ms", 0.0)

            def moves() -> bool:
                if cell.states[-1]["state"] == "disarmed":
                    graph.trigger("arm_node/reset_stop")
                    graph.trigger("arm_node/arm")
                send()
                return bool(emulator.is_moving)

            def stopped() -> str:
                send()
                last = cell.states[-1]
                return last["code"] if last["state"] == "disarmed" else ""

            for _ in range(3):  # a busy machine may stop the arm for another reason first
                wait_until(moves, f"motion before {code}")
                cause()
                seen = wait_until(stopped, code)
                if seen == code:
                    break
            assert seen == code, cell.states[-1]

        stops_on(lambda: setattr(cell, "clock_ahead_ns", 400_000_000), "clock_step")
        assert graph.trigger("arm_node/reset_stop").success
        wait_until(lambda: "clock_skew" in graph.trigger("arm_node/arm").message, "refused while the clocks differ")
        stops_on(lambda: setattr(cell, "clock_ahead_ns", None), "clock_unknown")
        stops_on(lambda: graph.set_parameter("arm_node", "clock_offset_ms", -300.0), "clock_step")
    finally:
        cell.end()


def test_a_cell_without_a_workspace_or_beyond_a_hard_limit_is_refused(graph: Graph, emulator: InovoEmulator) -> None:
    address = {"inovo.host": "127.0.0.1", "inovo.port": emulator.port}
    for name, parameters, text in (
        ("a", {}, "a cell without a workspace box is refused"),
        ("b", {**BOX, "limits.linear_speed": 3.0}, "linear_speed: expected a number above 0 and at most 1"),
        ("c", {**BOX, "has_wrench": False}, "cannot be left out"),
    ):
        graph.spawn_node("dcqfa_ros.nodes.cell_arm_node", name, **address, **parameters)
        assert not graph.configure(name)
        graph.wait_for(name, "event", text)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_watchdog_trips_the_safe_stop_in_mid_motion(
    graph: Graph, emulator: InovoEmulator, number: signal.Signals, tmp_path: Any
) -> None:
    listen = f"unix:{tmp_path}/w.sock"
    cell = Cell(graph, **BOX, **{"inovo.host": "127.0.0.1", "inovo.port": emulator.port, "watchdog.address": listen})
    try:
        cell.begin()
        wait_until(lambda: "watchdog" in graph.trigger("arm_node/arm").message, "refused without a watchdog")
        assert "armed" not in [state["state"] for state in cell.states]
        url = f"ws://127.0.0.1:{emulator.port}"
        # Longer than in the real cell: a busy machine must not trip it before the test does.
        dog = graph.spawn(
            sys.executable, "-m", "dcqfa_ros.watchdog", "--url", url, "--listen", listen, "--timeout-ms", "400"
        )
        moves(cell, emulator)
        cell.arm.send(number)
        wait_until(lambda: not emulator.is_moving, "rest")
        wait_until(lambda: '"tripped"' in dog.output, "trip")
        if number is signal.SIGSTOP:
            cell.arm.send(signal.SIGCONT)
            state = wait_until(lambda: self_stopped(cell), "stop of the node that woke up")
            assert state["code"] in ("watchdog_lost", "safe_stop", "command_timeout", "wrench_lost", "arm_lost"), state
            at_rest(emulator)
    finally:
        cell.end()


def self_stopped(cell: Cell) -> dict[str, str] | None:
    return cell.states[-1] if cell.states[-1]["state"] == "disarmed" else None


def test_any_arm_behind_topics_is_driven_within_the_same_limits(graph: Graph) -> None:
    kinematics = inovo_kinematics("short")
    joints = np.array(HOME, dtype=float)
    sent: list[Any] = []
    cell = Cell(
        graph, **BOX, driver="ros", **{"ros.output": "joint_velocity", "ros.kinematics": str(find_config("inovo_arm"))}
    )
    cell._listen("output_joint_velocity", sent.append)
    halt = threading.Event()

    def arm() -> None:
        while not halt.wait(0.01):
            if sent:
                joints[:] += 0.01 * np.array(sent[-1].data)
            message = JointState(name=[f"j{i + 1}" for i in range(6)], position=joints.tolist())
            cell.publish("input_joint_states", message)

    thread = threading.Thread(target=arm)
    try:
        cell.begin()
        thread.start()
        start = kinematics.forward(joints)[0]
        cell.wish = np.array([10.0, 0.0, 0.0])
        cell.armed()
        wait_until(lambda: kinematics.forward(joints)[0][0] - start[0] > 0.03, "motion")
        speeds = [kinematics.jacobian(joints) @ np.array(m.data) for m in sent]
        assert max(np.linalg.norm(s[:3]) for s in speeds) < 0.11
        halt.set()
        assert cell.stopped() == "arm_lost"
        assert not np.any(sent[-1].data)
    finally:
        halt.set()
        if thread.ident:
            thread.join()
        cell.end()


def test_any_arm_behind_topics_takes_twists_and_moves(graph: Graph) -> None:
    kinematics = inovo_kinematics("short")
    joints = np.array(HOME, dtype=float)
    twists: list[Any] = []
    paths: list[tuple[float, np.ndarray, np.ndarray]] = []
    cell = Cell(
        graph, "operator", **BOX, driver="ros",
        **{"ros.output": "twist", "ros.kinematics": str(find_config("inovo_arm")), "has_wrench": False},
    )  # fmt: skip
    cell.wrench = None
    halt = threading.Event()

    def hear_path(message: JointTrajectory) -> None:
        times = [p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points]
        rows = np.array([joints, *(p.positions for p in message.points)])
        paths.append((time.monotonic(), np.array([0.0, *times]), rows))

    def arm() -> None:
        while not halt.wait(0.01):
            if paths:
                begun, times, rows = paths[-1]
                joints[:] = [np.interp(time.monotonic() - begun, times, column) for column in rows.T]
            message = JointState(name=[f"j{i + 1}" for i in range(6)], position=joints.tolist())
            cell.publish("input_joint_states", message)

    cell._listen("output_twist", twists.append)
    cell._listen("output_trajectory", hear_path)
    thread = threading.Thread(target=arm)
    try:
        cell.begin()
        thread.start()
        cell.armed()
        cell.wish = np.array([0.0, 0.0, 10.0])
        wait_until(lambda: twists and twists[-1].twist.linear.z > 0.03, "twists")
        assert {m.header.frame_id for m in twists} == {"world"}
        assert max(m.twist.linear.z for m in twists) <= 0.1
        cell.wish = None
        assert cell.stopped() in STARVED
        assert twists[-1].twist.linear.z == 0.0

        def begin(height: float) -> None:
            wait_until(lambda: cell.graph.trigger("arm_node/reset_stop").success, "reset")
            cell.armed()
            pose = cell.heard["tcp_pose"]
            pose.header.stamp = to_time(0)
            pose.pose.position.z += height
            before = len(paths)
            wait_until(lambda: cell.publish("pose_command", pose) or len(paths) > before, "trajectory")

        start = kinematics.forward(joints)[0]
        begin(0.02)
        wait_until(lambda: cell.results and cell.results[-1]["outcome"] == "succeeded", "end of the move")
        assert kinematics.forward(joints)[0] == pytest.approx(start + np.array([0.0, 0.0, 0.02]), abs=2e-3)
        cell.graph.trigger("arm_node/disarm")
        begin(0.1)
        cell.graph.trigger("arm_node/stop")
        wait_until(lambda: len(paths[-1][1]) == 2, "hold")  # one point, the present place
        assert cell.stopped() == "operator_stop"
        wait_until(lambda: cell.results[-1]["outcome"] == "cancelled", "cancelled")
        assert kinematics.forward(joints)[0][2] < start[2] + 0.11
    finally:
        halt.set()
        if thread.ident:
            thread.join()
        cell.end()
