"""The subscriber of ``dcqfa bench camera``: brings camera nodes up, receives their RGB-D pictures, notes when.

``python -m dcqfa_ros.ros.camera_stream --cameras front wrist --pids 12 13 ...`` prints one JSON document when it ends.
Pictures are received as the graph's own nodes do: ``raw=True``, the QoS of the interface table. Every stamp is that of
the frame clock's tick, so latency is from the moment the picture was due to this process' callback, and the tick's
number follows from the stamp.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import get_rmw_implementation_identifier, try_shutdown

from dcqfa_ros.ros.image_memory import keep_picture_memory
from dcqfa_ros.ros.images import decode_image
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.process import die_with_parent
from dcqfa_ros.ros.qos import qos

STREAMS = ("color", "depth")
_SETTLE_S = 2.0  # from the first pictures of all streams: imports and discovery are over
_TAIL_S = 0.5


class StreamError(RuntimeError):
    """The cameras did not come up."""


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used so far, user and system, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Subscriber:
    """Notes (stamp, arrival) in ns of every picture of every stream."""

    def __init__(self, node: Any, executor: Any, cameras: Sequence[str]) -> None:
        self._node, self._executor = node, executor
        self.arrivals: dict[str, list[tuple[int, int]]] = {}
        for camera in cameras:
            for key in STREAMS:
                self._subscribe(f"{camera}/{key}", key, camera)

    def _subscribe(self, label: str, key: str, camera: str) -> None:
        arrivals = self.arrivals[label] = []

        def arrived(data: bytes) -> None:
            now = time.time_ns()
            arrivals.append((decode_image(data).stamp_ns, now))

        entry = interface(key)
        self._node.create_subscription(
            entry.message_class(), entry.resolve(camera=camera), arrived, qos(entry.qos), raw=True
        )

    def spin(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Spin until ``condition``; raise StreamError after ``timeout_s``."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                raise StreamError(f"not within {timeout_s:g} s: {what}")
            self._executor.spin_once(timeout_sec=0.05)

    def spin_for(self, seconds: float) -> None:
        """Spin for a fixed time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def change(self, name: str, transition: int, timeout_s: float) -> None:
        """Ask a node for a lifecycle transition and wait for its success."""
        client = self._node.create_client(ChangeState, f"{name}/change_state")
        self.spin(client.service_is_ready, timeout_s, f"{name} answers")
        future = client.call_async(ChangeState.Request(transition=Transition(id=transition)))
        self.spin(future.done, timeout_s, f"transition of {name}")
        if not future.result().success:
            raise StreamError(f"{name} refused a transition")
        self._node.destroy_client(client)


def receive(cameras: Sequence[str], pids: Sequence[int], seconds: float, timeout_s: float) -> dict[str, Any]:
    """Bring up the nodes ``<camera>_camera_node``, receive for ``seconds`` and return what came.

    Returns:
        ``arrivals``: per ``camera/stream`` a list of [stamp, arrival], ns of the wall clock; ``begin`` and ``end``,
        the measured span likewise; ``cpu``: cores used in it, per process id of ``pids``, and ``self``; ``rmw``.

    Raises:
        StreamError: a node did not come up or nothing came.
    """
    keep_picture_memory()
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("camera_bench_subscriber")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        subscriber = _Subscriber(node, executor, cameras)
        for camera in cameras:
            for transition in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
                subscriber.change(f"{camera}_camera_node", transition, timeout_s)
        subscriber.spin(lambda: all(subscriber.arrivals.values()), timeout_s, "a picture of every stream")
        gc.collect()
        gc.disable()
        subscriber.spin_for(_SETTLE_S)
        watched = {**{str(pid): pid for pid in pids}, "self": os.getpid()}
        before, begin, began = {n: cpu_seconds(p) for n, p in watched.items()}, time.time_ns(), time.monotonic()
        subscriber.spin_for(seconds)
        span, end = time.monotonic() - began, time.time_ns()
        cpu = {name: (cpu_seconds(pid) - before[name]) / span for name, pid in watched.items()}
        subscriber.spin_for(_TAIL_S)  # what was sent in the span must have arrived by now
        return {
            "arrivals": subscriber.arrivals,
            "begin": begin,
            "end": end,
            "cpu": cpu,
            "rmw": get_rmw_implementation_identifier(),
        }
    finally:
        executor.shutdown()
        node.destroy_node()
        try_shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subscriber; 1 when the parent is gone or the cameras did not come up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cameras", nargs="+", required=True)
    parser.add_argument("--pids", nargs="+", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--timeout", type=float, default=30.0)
    args = parser.parse_args(argv)
    if not die_with_parent():
        return 1
    try:
        report = receive(args.cameras, args.pids, args.seconds, args.timeout)
    except StreamError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
