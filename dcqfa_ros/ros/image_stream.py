"""The two processes of ``dcqfa bench image``: one publishes numbered pictures, the other notes when each arrived.

``python -m dcqfa_ros.ros.image_stream publish|subscribe ...`` prints one JSON document when it ends. The stamp of every
picture is CLOCK_MONOTONIC of this host just before it is serialized, so latencies need no clock but the kernel's; the
number is the frame's name. Both use the graph's own path: serialized bytes out, ``raw=True`` in, the QoS of the
interface table, the Fast DDS profile for the publisher only.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import get_rmw_implementation_identifier, try_shutdown

from dcqfa_ros.ros.fastdds import use_image_profile
from dcqfa_ros.ros.image_memory import keep_picture_memory
from dcqfa_ros.ros.images import decode_image, encode_image
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.process import die_with_parent
from dcqfa_ros.ros.qos import qos

CAMERA = "bench"
_SETTLE_S = 1.0  # between the publisher's match and the first picture: the subscriber matches in the meantime
_POLL_S = 0.1


@contextmanager
def _node(name: str) -> Iterator[Any]:
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node(name)
    try:
        yield node
    finally:
        node.destroy_node()
        try_shutdown()


def publish(frames: int, rate: float, width: int, height: int, timeout_s: float) -> dict[str, Any]:
    """Publish ``frames`` pictures at ``rate`` Hz after a subscriber was found.

    Returns:
        ``sent``, ``late`` (pictures sent over a period late), ``profile``, ``shm`` (MiB free, None without),
        ``problem``, ``rmw``; ``sent`` is 0 when nobody subscribed within ``timeout_s``.
    """
    transport = use_image_profile()
    report: dict[str, Any] = {"sent": 0, "late": 0, "profile": transport.profile, "problem": transport.problem}
    free = transport.shared_memory_free
    report["shm"] = None if free is None else free >> 20
    report["rmw"] = get_rmw_implementation_identifier()
    entry = interface("color")
    with _node("image_bench_publisher") as node:
        publisher = node.create_publisher(entry.message_class(), entry.resolve(camera=CAMERA), qos(entry.qos))
        give_up = time.monotonic() + timeout_s
        while publisher.get_subscription_count() == 0:
            if time.monotonic() > give_up:
                return report
            time.sleep(0.02)
        time.sleep(_SETTLE_S)
        generator = np.random.default_rng(0)
        pictures = [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(4)]
        gc.collect()
        gc.disable()
        period_ns = round(1e9 / rate)
        begin = time.monotonic_ns()
        for number in range(frames):
            deadline = begin + number * period_ns
            pause = deadline - time.monotonic_ns()
            if pause > 0:
                time.sleep(pause / 1e9)
            now = time.monotonic_ns()
            report["late"] += now - deadline > period_ns
            stamp = (now // 1_000_000_000, now % 1_000_000_000)
            publisher.publish(encode_image(stamp, str(number), pictures[number % len(pictures)], "rgb8"))
            report["sent"] += 1
        time.sleep(_SETTLE_S)  # the last picture must be read before its segment goes
    return report


def subscribe() -> dict[str, Any]:
    """Receive until standard input ends.

    Returns:
        ``received``: [number, latency in ms] of every picture, in the order of arrival.
    """
    received: list[tuple[int, float]] = []
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        ended.set()

    def arrived(data: bytes) -> None:
        now = time.monotonic_ns()
        view = decode_image(data)
        received.append((int(view.frame_id), (now - view.stamp_ns) / 1e6))

    entry = interface("color")
    with _node("image_bench_subscriber") as node:
        node.create_subscription(entry.message_class(), entry.resolve(camera=CAMERA), arrived, qos(entry.qos), raw=True)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        threading.Thread(target=wait_for_end, daemon=True).start()
        print("ready", flush=True)
        gc.collect()
        gc.disable()
        while not ended.is_set():
            executor.spin_once(timeout_sec=_POLL_S)
        executor.shutdown()
    return {"received": received}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two processes; 1 when the parent is gone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("publish", "subscribe"))
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--rate", type=float, default=30.0)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--timeout", type=float, default=15.0)
    args = parser.parse_args(argv)
    if not die_with_parent():
        return 1
    keep_picture_memory()
    if args.role == "publish":
        report = publish(args.frames, args.rate, args.width, args.height, args.timeout)
    else:
        report = subscribe()
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
