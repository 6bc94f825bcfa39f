"""Measure an emulated cell: from a command on ROS 2 to its frame on the arm's socket, and from a contact to zero twist.

The nodes run as processes of their own in a ROS domain of their own; the emulators run here, behind a real WebSocket
and a real pseudo-terminal. Both ends of every figure are read from the same monotonic clock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcqfa_ros.bench.conditions import Conditions, watch_conditions
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.ros.arm_messages import wrench_message
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.testing import Graph, Spawned, wait_until
from dcqfa_ros.sim.inovo import InovoEmulator, MotionFrame

ARM_NODE = "dcqfa_ros.nodes.cell_arm_node"
SETTLED_S = 0.15
_WAIT_S = 3.0
_WRENCH_RATE = 100.0  # Hz
_STEP = 0.004  # m/s, between two commands; small against every limit
_SHOWS = 1e-5  # m/s, of change that shows a command: what the jerk limit lets through in the shortest tick is more
PARAMETERS: dict[str, Any] = {
    "command_source": "teleop",
    "workspace.minimum": "[-0.4, 0.2, 0.1]",
    "workspace.maximum": "[0.4, 0.6, 0.8]",
    "watchdog.use": "none",
    "cameras": "['']",
    # What a busy computer delays must not end the measurement: the distribution shows it instead.
    "maximum_age.wrench": 0.5,
    "maximum_age.state": 0.5,
    "maximum_age.command": 2.0,
    "hold_after_s": 0.9,
    "stop_after_s": 5.0,
    "force.retreat_distance": 0.0,
}


@dataclass(frozen=True, slots=True)
class ArmBench:
    """Result of one run.

    Attributes:
        p50_ms, p99_ms, max_ms: of the latencies.
        trials: commands or contacts measured.
        repeated: trials begun again because something else stopped the arm, such as a sensor starved of processor time.
        limit_ms: what p99 is meant to stay under.
        rate_hz: commands per second of the control loop.
        what: beginning and end of a latency.
        latencies_ms: all of them, in order.
        conditions: what else went on.
        problem: why figures may not be those of the software, or None.
    """

    p50_ms: float
    p99_ms: float
    max_ms: float
    trials: int
    repeated: int
    limit_ms: float
    rate_hz: float
    what: str
    latencies_ms: tuple[float, ...]
    conditions: Conditions
    problem: str | None


def summarize(
    latencies_ms: Sequence[float], limit_ms: float, rate_hz: float, what: str, conditions: Conditions, repeated: int = 0
) -> ArmBench:
    """Return the figures of some latencies.

    Raises:
        BenchError: there are none.
    """
    if not len(latencies_ms):
        raise BenchError(f"nothing was measured: {what}")
    p50, p99, most = (float(np.percentile(latencies_ms, q)) for q in (50, 99, 100))
    busy = conditions.load_1min > (available_cores() - 0.5)
    text = f"load {conditions.load_1min:.1f} on {available_cores()} cores: other programs delayed this one"
    return ArmBench(
        round(p50, 3), round(p99, 3), round(most, 3), len(latencies_ms), repeated, limit_ms, rate_hz, what,
        tuple(round(v, 3) for v in latencies_ms), conditions, text if busy else None,
    )  # fmt: skip


def available_cores() -> int:
    """Return how many processor cores this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Cell:
    """Emulated arm, its node, and a source of twists."""

    def __init__(self, graph: Graph, emulator: InovoEmulator, rate_hz: float) -> None:
        """Start the node."""
        self.graph, self.emulator = graph, emulator
        values = {**PARAMETERS, "rate": rate_hz, "inovo.host": "127.0.0.1", "inovo.port": emulator.port}
        self.node: Spawned = graph.spawn_node(ARM_NODE, "arm_node", **values)
        entry = interface("twist_command")
        name = entry.resolve(source="teleop")
        self._commands = graph.node.create_publisher(entry.message_class(), name, qos(entry.qos))
        self._message = entry.message_class()()
        self._message.header.frame_id = "world"
        self._refusal = ""
        self.speed = _STEP

    def is_settled(self, speed: float) -> bool:
        """Whether the arm is commanded ``speed`` along x."""
        return abs(float(self.emulator.twist[0]) - speed) < 0.02 * _STEP

    def activate(self) -> None:
        """Bring the node to work.

        Raises:
            BenchError: it refused; the message holds the end of its output.
        """
        if not self.graph.activate("arm_node"):
            raise BenchError(f"arm_node was not activated: {self.node.output[-500:]}")

    def command(self, speed: float) -> int:
        """Publish a twist along x; returns the monotonic time just before."""
        self._message.twist.linear.x = speed
        now = time.monotonic_ns()
        self._commands.publish(self._message)
        return now

    def arm(self) -> None:
        """Reset what is latched and arm, as soon as the node lets us."""

        def done() -> bool:
            self.graph.trigger("arm_node/reset_stop")
            response = self.graph.trigger("arm_node/arm")
            self._refusal = response.message
            return bool(response.success) or response.message == "already armed"

        with _named(lambda: f"arm_node does not arm: {self._refusal}"):
            wait_until(done, "armed")

    def frame(self, wanted: Callable[[MotionFrame], bool], after: int) -> MotionFrame:
        """Return the first frame after number ``after`` that is ``wanted``.

        Raises:
            BenchError: it does not come.
        """
        try:
            return self.emulator.wait_for_frame(wanted, _WAIT_S, after)
        except TimeoutError as error:
            raise BenchError(f"{error}; arm_node: {self.node.output[-500:]}") from error

    @property
    def last(self) -> int:
        """Number of the newest frame."""
        frames = self.emulator.frames
        return frames[-1].number if frames else -1


@contextlib.contextmanager
def _named(text: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise BenchError(text()) from error


@contextlib.contextmanager
def wrenches(graph: Graph) -> Iterator[None]:
    """Publish wrenches without contact at 100 Hz while the body runs: the node moves nothing without them."""
    entry = interface("wrench")
    publisher = graph.node.create_publisher(entry.message_class(), entry.name, qos(entry.qos))
    halt, zero = threading.Event(), np.zeros(3)

    def run() -> None:
        due = time.monotonic()
        while not halt.wait(max(0.0, due - time.monotonic())):
            due = max(due + 1 / _WRENCH_RATE, time.monotonic())
            publisher.publish(wrench_message(graph.node.get_clock().now().to_msg(), "ft_sensor", zero, zero))

    thread = threading.Thread(target=run, name="wrenches", daemon=True)
    thread.start()
    try:
        yield
    finally:
        halt.set()
        thread.join()


def run_arm_bench(trials: int = 300, rate_hz: float = 100.0) -> ArmBench:
    """Measure from a twist on ROS 2 to its frame on the socket.

    Raises:
        BenchError: a value is out of range, or a process failed.
    """
    check(trials, rate_hz)
    with Graph() as graph, InovoEmulator(ready=True) as emulator, wrenches(graph):
        cell = Cell(graph, emulator, rate_hz)
        cell.activate()
        conditions = watch_conditions()
        random = np.random.default_rng(0)
        latencies, repeated = repeat(trials, lambda _: _trial(cell, random.random() / rate_hz))
        seen = conditions()
        graph.stop_all()
    what = "from publishing a twist on ROS 2 to the last byte of its frame read on the socket"
    return summarize(latencies, 5.0, rate_hz, what, seen, repeated)


def _trial(cell: Cell, phase_s: float) -> float:
    """Return the milliseconds from a new command, at any phase of the control loop, to the frame that shows it."""
    begun = cell.speed
    if not cell.is_settled(begun):
        cell.arm()
        cell.command(begun)
        cell.frame(lambda f: f.values is not None and abs(f.values[0] - begun) < 0.02 * _STEP, cell.last)
    time.sleep(SETTLED_S)
    cell.frame(lambda f: f.values is not None and abs(f.values[0] - begun) < _SHOWS / 4, cell.last)
    time.sleep(phase_s)

    def changed(frame: MotionFrame) -> bool:
        return frame.values is not None and frame.moves and abs(frame.values[0] - begun) > _SHOWS

    number, cell.speed = cell.last, -begun
    at = cell.command(-begun)
    frame = cell.frame(changed, number)
    return (frame.stamp_ns - at) / 1e6


def repeat(trials: int, trial: Callable[[int], float]) -> tuple[list[float], int]:
    """Return the results of ``trials`` trials, and how many had to be begun again.

    Raises:
        BenchError: over half of them had to be.
    """
    results: list[float] = []
    repeated = 0
    while len(results) < trials:
        try:
            results.append(trial(len(results)))
        except BenchError:
            repeated += 1
            if repeated > max(5, trials // 2):
                raise
    return results, repeated


def check(trials: int, rate_hz: float) -> None:
    """Refuse what cannot be measured.

    Raises:
        BenchError: a value is out of range.
    """
    for name, value, low, high in (("trials", trials, 1, 100_000), ("rate", rate_hz, 20.0, 500.0)):
        if not low <= value <= high:
            raise BenchError(f"{name}: expected {low:g} to {high:g}, got {value:g}")
