"""The processes of ``dcqfa bench executor``: a lifecycle node that receives messages, and what sends them.

``python -m dcqfa_ros.ros.executor_load stream|rclpy`` receives, on this project's executor or on rclpy's, until
standard input ends, and ``... send --rate 400`` sends. Each prints a line when it has begun (to count, or to send) and
one JSON document when it ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import try_shutdown
from sensor_msgs.msg import JointState

from dcqfa_ros.ros.executor import StreamExecutor
from dcqfa_ros.ros.process import die_with_parent
from dcqfa_ros.runtime.ticker import Ticker

TOPICS, PUBLISHERS, TIMERS = 10, 10, 4  # about what arm_node has
EXECUTORS = {"stream": StreamExecutor, "rclpy": SingleThreadedExecutor}
_QUEUE = 50
_WARM = 20  # messages that are not counted
_POLL_S = 0.1


def receive(executor_name: str, ended: threading.Event) -> dict[str, Any]:
    """Receive until ``ended``; ``cpu_us`` is processor time of the receiving thread per message."""
    node, received = LifecycleNode("executor_load"), [0]

    def take(_: JointState) -> None:
        received[0] += 1

    for index in range(TOPICS):
        node.create_subscription(JointState, f"load_{index}", take, _QUEUE)
    for index in range(PUBLISHERS):
        node.create_publisher(JointState, f"out_{index}", _QUEUE)
    for _ in range(TIMERS):
        node.create_timer(1.0, lambda: None)
    executor = EXECUTORS[executor_name]()
    executor.add_node(node)
    try:
        while received[0] < _WARM and not ended.is_set():
            executor.spin_once(timeout_sec=_POLL_S)
        print("begun", flush=True)
        before, began, used = received[0], time.monotonic(), time.thread_time()
        while not ended.is_set():
            executor.spin_once(timeout_sec=_POLL_S)
        seconds, cpu = time.monotonic() - began, time.thread_time() - used
    finally:
        executor.shutdown()
        node.destroy_node()
    messages = received[0] - before
    return {
        "messages": messages,
        "seconds": seconds,
        "cpu_us": 1e6 * cpu / max(1, messages),
        "entities": f"{TOPICS} subscriptions, {PUBLISHERS} publishers, {TIMERS} timers",
    }


def send(rate: float, ended: threading.Event) -> dict[str, Any]:
    """Send ``rate`` messages per second, in turn on all topics, from when all are listened to until ``ended``."""
    node = rclpy.create_node("executor_load_sender")
    publishers = [node.create_publisher(JointState, f"load_{index}", _QUEUE) for index in range(TOPICS)]
    message = JointState(name=[f"joint_{n}" for n in range(6)], position=[0.0] * 6, velocity=[0.0] * 6)
    while not (ended.is_set() or all(publisher.get_subscription_count() for publisher in publishers)):
        time.sleep(0.05)
    print("begun", flush=True)
    ticker, sent = Ticker(round(1e9 / rate)), 0
    while not ended.is_set():
        ticker.wait(ended)
        publishers[sent % TOPICS].publish(message)
        sent += 1
        ticker.done()
    node.destroy_node()
    return {"sent": sent}


def main(arguments: Sequence[str] | None = None) -> int:
    """Play one part until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*EXECUTORS, "send"])
    parser.add_argument("--rate", type=float, default=400.0, help="messages per second, all topics together")
    args = parser.parse_args(arguments)
    if not die_with_parent():
        return 0
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    play: Callable[[], dict[str, Any]] = (
        (lambda: send(args.rate, ended)) if args.part == "send" else lambda: receive(args.part, ended)
    )
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        print(json.dumps(play()))
    finally:
        try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
