"""Readings of the force/torque sensor together with the arm's orientation, from a running graph."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import rclpy
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, ShutdownException, SingleThreadedExecutor
from rclpy.utilities import try_shutdown

from dcqfa_ros.errors import UserError
from dcqfa_ros.ros.discovery import discovery_profile
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.safety.tool_load_files import Recorded

_APPEAR_S = 10.0
_STALE_S = 0.5


class NoReadingsError(UserError):
    """A topic that is needed does not come; the message names it and the node to start."""


class GraphReadings:
    """Subscribes to ``wrench_node/raw`` and ``tcp_pose``; see :func:`graph_readings`."""

    def __init__(self, node: Any, appear_s: float = _APPEAR_S) -> None:
        """Subscribe on ``node``; ``appear_s`` is how long a topic may take to come."""
        self._appear_s = appear_s
        self._changed = threading.Condition()
        self._wanted = 0
        self._taken: list[Recorded] = []
        self._pose: tuple[float, tuple[float, ...]] | None = None
        self._wrench_s = self._heard = 0.0
        self._names = {}
        for key, take in (("wrench_raw", self._take_wrench), ("tcp_pose", self._take_pose)):
            entry = interface(key)
            subscription = node.create_subscription(entry.message_class(), entry.name, take, qos(entry.qos))
            self._names[key] = subscription.topic_name

    def record(self, count: int) -> list[Recorded]:
        """Return the next ``count`` readings, each with the newest orientation.

        Raises:
            NoReadingsError: wrenches or poses do not come.
        """
        with self._changed:
            self._taken, self._wanted = [], count
            asked = self._heard = time.monotonic()
            while len(self._taken) < count:
                self._changed.wait(0.1)
                now = time.monotonic()
                if now - self._heard > self._appear_s:
                    if self._wrench_s < asked:
                        raise NoReadingsError(
                            f"no wrench on {self._names['wrench_raw']}: start and activate wrench_node"
                        )
                    raise NoReadingsError(
                        f"no fresh pose on {self._names['tcp_pose']}: start and activate the arm's node, arm_node"
                    )
            self._wanted = 0
            return self._taken

    def _take_wrench(self, message: Any) -> None:
        f, t = message.wrench.force, message.wrench.torque
        with self._changed:
            now = self._wrench_s = time.monotonic()
            if self._pose is None or now - self._pose[0] > _STALE_S or len(self._taken) >= self._wanted:
                return
            self._heard = now
            self._taken.append(Recorded(self._pose[1], (f.x, f.y, f.z, t.x, t.y, t.z), None))
            self._changed.notify_all()

    def _take_pose(self, message: Any) -> None:
        o = message.pose.orientation
        with self._changed:
            self._pose = (time.monotonic(), (o.x, o.y, o.z, o.w))


@contextlib.contextmanager
def graph_readings(namespace: str = "", appear_s: float = _APPEAR_S) -> Iterator[GraphReadings]:
    """Join the graph in ``namespace`` of the environment's ROS domain while the body runs."""
    context = Context()
    rclpy.init(context=context)
    try:
        with discovery_profile():
            node = rclpy.create_node("tool_load", context=context, namespace=namespace)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        readings = GraphReadings(node, appear_s)
        thread = threading.Thread(target=_spin, args=(executor,), name="tool_load", daemon=True)
        thread.start()
        try:
            yield readings
        finally:
            executor.shutdown()
            thread.join()
            node.destroy_node()
    finally:
        try_shutdown(context=context)


def _spin(executor: SingleThreadedExecutor) -> None:
    with contextlib.suppress(ShutdownException, ExternalShutdownException):
        executor.spin()
