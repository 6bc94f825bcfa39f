"""Measure what one message costs a node on this project's executor and on rclpy's, side by side."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from dcqfa_ros.bench.conditions import watch_conditions
from dcqfa_ros.bench.processes import BenchError, end, result, run_module
from dcqfa_ros.ros.isolation import isolated_environment

EXECUTORS = ("stream", "rclpy")
_LOAD = "dcqfa_ros.ros.executor_load"
_START_S, _END_S = 60.0, 30.0
_LEAST_SHARE = 0.9  # of the messages due, below which several may be taken per wait, which flatters the slower


@dataclass(frozen=True, slots=True)
class ExecutorBench:
    """Result of one run.

    Attributes:
        stream_us, rclpy_us: processor time of the receiving thread per message, microseconds, one figure per round.
        ratio: of the medians, rclpy's over ours.
        rate: messages per second.
        received: messages that were counted, per executor.
        entities: of the node that receives, subscriptions, publishers and timers; a lifecycle node has services too.
        load_1min: load average before.
        steal_share: share of processor time that the hypervisor took meanwhile.
    """

    stream_us: list[float]
    rclpy_us: list[float]
    ratio: float
    rate: float
    received: dict[str, int]
    entities: str
    load_1min: float
    steal_share: float


def run_executor_bench(
    seconds: float = 10.0, rate: float = 400.0, rounds: int = 3, progress: Callable[[str], None] = lambda _: None
) -> ExecutorBench:
    """Let a lifecycle node receive ``rate`` messages per second on each executor in turn, ``rounds`` times.

    Raises:
        BenchError: a value is out of range, a process failed, or messages were lost.
    """
    for name, value, low, high in (
        ("seconds", seconds, 0.5, 600.0),
        ("rate", rate, 10.0, 5000.0),
        ("rounds", rounds, 1, 100),
    ):
        if not low <= value <= high:
            raise BenchError(f"{name}: expected {low:g} to {high:g}, got {value:g}")
    conditions = watch_conditions()
    figures: dict[str, list[float]] = {name: [] for name in EXECUTORS}
    received, entities = dict.fromkeys(EXECUTORS, 0), ""
    for number in range(rounds):
        for name in EXECUTORS:
            found = _measure(name, seconds, rate)
            figures[name].append(found["cpu_us"])
            received[name] += found["messages"]
            entities = found["entities"]
            progress(f"round {number + 1} of {rounds}: {name} {found['cpu_us']:.0f} us per message")
    seen = conditions()
    return ExecutorBench(
        stream_us=figures["stream"],
        rclpy_us=figures["rclpy"],
        ratio=median(figures["rclpy"]) / median(figures["stream"]),
        rate=rate,
        received=received,
        entities=entities,
        load_1min=seen.load_1min,
        steal_share=seen.steal_share,
    )


def _measure(name: str, seconds: float, rate: float) -> dict[str, Any]:
    """Run the two processes and return what the receiver measured."""
    with isolated_environment() as isolation, ExitStack() as stack:

        def start(part: str) -> subprocess.Popen[str]:
            process = run_module(_LOAD, part, "--rate", str(rate), env=isolation.env)
            stack.callback(end, process)
            return process

        receiver, sender = start(name), start("send")
        _begun(receiver, f"receiver on {name}")
        _begun(sender, "sender")
        time.sleep(seconds)
        found = result(receiver, f"receiver on {name}", _END_S)
        result(sender, "sender", _END_S)
    due = rate * found["seconds"]
    if found["messages"] < _LEAST_SHARE * due:
        raise BenchError(
            f"the receiver on {name} got {found['messages']} of {due:.0f} messages: this computer cannot keep up with "
            f"{rate:g} per second; give a lower --rate"
        )
    return found


def _begun(process: subprocess.Popen[str], name: str) -> None:
    """Wait for a process' first line.

    Raises:
        BenchError: there was none in time; the message holds the end of its stderr.
    """
    assert process.stdout is not None
    watch = threading.Timer(_START_S, process.kill)
    watch.start()
    try:
        begun = process.stdout.readline()
    finally:
        watch.cancel()
    if not begun:
        result(process, name, _END_S)  # says why it ended
        raise BenchError(f"the {name} ended before it had begun")
