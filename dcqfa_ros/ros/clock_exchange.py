"""Echoes between the arm and its policy: how far the clock of the policy's host lies from the arm's.

Both sides use ``sensor_msgs/TimeReference``. A probe: ``header.stamp`` is the arm's time. An echo: ``header.stamp`` is
the policy's time, ``time_ref`` the stamp of the probe, ``source`` the frame id of the probe, so that an arm takes its
own echoes only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sensor_msgs.msg import TimeReference

from dcqfa_ros.bundle.schema import ActionSpace
from dcqfa_ros.ros.conversions import from_time, to_time
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.runtime.clock_skew import ClockLimits, ClockWatch
from dcqfa_ros.safety.stops import Stop

PERIOD_S = 0.2
_TRIES, _TOGETHER_NS = 5, 1_000_000


class NodeClock:
    """A node's clock, which tests can shift: parameter ``clock_offset_ms``."""

    def __init__(self, node: ManagedNode) -> None:
        """Declare the parameter."""
        self._node = node
        node.add_parameter("clock_offset_ms", 0.0, "shifts this node's clock, ms; for tests of clock skew")

    def now_ns(self) -> int:
        """Return the node's time, ns."""
        offset_ms: float = self._node.parameter("clock_offset_ms")
        return int(self._node.get_clock().now().nanoseconds) + round(offset_ms * 1e6)

    def now_both_ns(self) -> tuple[int, int]:
        """Return the node's time and the monotonic one of the same moment, ns.

        A thread that the system interrupts between the two readings would take its own delay for a clock that was set.
        """
        readings = []
        for _ in range(_TRIES):
            before, now, after = time.monotonic_ns(), self.now_ns(), time.monotonic_ns()
            readings.append((after - before, now, (before + after) // 2))
            if after - before <= _TOGETHER_NS:
                break
        return min(readings)[1:]


class ClockEcho:
    """Answers the arm's probes, in the policy's process."""

    def __init__(self, node: ManagedNode) -> None:
        """Declare the parameter of the clock."""
        self._node, self._clock = node, NodeClock(node)
        self._publisher: Any = None

    def open(self, space: ActionSpace) -> None:
        """Answer from now on, in ``setup()``; the planar arm knows its observations by their stamps and never asks."""
        if space is ActionSpace.PLANAR_POSITION:
            return
        self._publisher = self._node.create_interface_publisher("clock_echo")
        self._node.create_guarded_subscription("clock_probe", self._answer)

    def _answer(self, probe: Any) -> None:
        echo = TimeReference(time_ref=probe.header.stamp, source=probe.header.frame_id)
        echo.header.stamp = to_time(self._clock.now_ns())
        self._publisher.publish(echo)


class ClockProbe:
    """Asks for echoes and says when stamps of the policy's host cannot be relied on, in the arm's process."""

    def __init__(self, node: ManagedNode, clock: NodeClock) -> None:
        """Declare the limits."""
        self._node, self._clock = node, clock
        add = node.add_parameter
        add("clock.maximum_skew_ms", 50.0, "between this host's clock and the policy's; beyond, the arm stops",
            minimum=1.0, maximum=1000.0, read_only=True)  # fmt: skip
        add("clock.silence_s", 2.0, "without an echo of policy_node its clock counts as unknown, s", minimum=0.5,
            maximum=10.0, read_only=True)  # fmt: skip
        self._on_check: Callable[[], None] = lambda: None
        self._watch: ClockWatch | None = None

    @property
    def watch(self) -> ClockWatch:
        """What is known about the clocks."""
        if self._watch is None:
            limits = ClockLimits(
                round(self._node.parameter("clock.maximum_skew_ms") * 1e6),
                round(self._node.parameter("clock.silence_s") * 1e9),
            )
            self._watch = ClockWatch(limits)
        return self._watch

    def open(self, on_check: Callable[[], None]) -> None:
        """Send probes from now on, in ``start()``; ``on_check`` is called after each, on the executor's thread."""
        self._watch, self._on_check = None, on_check
        self._name = self._node.get_fully_qualified_name()
        self._publisher = self._node.create_interface_publisher("clock_probe")
        self._node.create_guarded_subscription("clock_echo", self._take)
        self._node.create_guarded_timer(PERIOD_S, self._send)

    def _send(self) -> None:
        message = TimeReference()
        own_ns, now_ns = self._clock.now_both_ns()
        message.header.stamp, message.header.frame_id = to_time(own_ns), self._name
        self.watch.probe(own_ns, now_ns)
        self._publisher.publish(message)
        self._on_check()

    def _take(self, message: Any) -> None:
        now_ns = time.monotonic_ns()
        if message.source == self._name:
            self.watch.echo(from_time(message.time_ref), from_time(message.header.stamp), now_ns)

    def problem(self) -> Stop | None:
        """Return why stamps of the policy's host cannot be relied on now; None where they can."""
        return self.watch.problem(time.monotonic_ns())

    def figures(self) -> dict[str, str]:
        """What is known, for diagnostics."""
        return self.watch.figures(time.monotonic_ns())
