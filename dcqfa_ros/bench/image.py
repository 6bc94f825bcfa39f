"""Measure how images travel between two processes of this host: share delivered and latency.

Runs ``dcqfa_ros.ros.image_stream`` twice in a ROS domain of its own. Every picture sent counts: the publisher starts a
second after it has found its subscriber, and what has not arrived by the end is lost.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcqfa_ros.bench.processes import BenchError, end, result, run_module
from dcqfa_ros.ros.isolation import isolated_environment

__all__ = ["BenchError", "ImageBench", "run_image_bench", "summarize"]

_MODULE = "dcqfa_ros.ros.image_stream"
_START_S = 30.0
_DISCOVERY_S = 15.0
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class ImageBench:
    """Result of one run.

    Attributes:
        delivered: share of the pictures sent that arrived, 0..1.
        p50_ms, p99_ms, max_ms: from just before serialization to the subscriber's callback; None when none arrived.
        frames: pictures sent.
        late: pictures that the publisher itself sent over a period late.
        width, height, rate: what was sent, px and Hz.
        profile: Fast DDS profile of the publisher: dcqfa, user or none.
        rmw: RMW implementation.
        shm: MiB free in /dev/shm before the run, None where there is none.
        problem: why images may not arrive, or None.
        load_1min: the host's load average after the run: latencies on busy cores are those of the scheduler.
    """

    delivered: float
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    frames: int
    late: int
    width: int
    height: int
    rate: float
    profile: str
    rmw: str
    shm: int | None
    problem: str | None
    load_1min: float


def summarize(
    sent: dict[str, Any], received: Sequence[tuple[int, float]], width: int, height: int, rate: float
) -> ImageBench:
    """Return the figures from what both processes printed; a picture that arrived twice counts once."""
    frames = int(sent["sent"])
    latencies = dict(reversed([(int(number), float(ms)) for number, ms in received]))  # the first arrival counts
    values = [ms for number, ms in latencies.items() if 0 <= number < frames]
    p50, p99, most = (float(np.percentile(values, q)) for q in (50, 99, 100)) if values else (None, None, None)
    return ImageBench(
        len(values) / frames if frames else 0.0,
        p50,
        p99,
        most,
        frames,
        int(sent["late"]),
        width,
        height,
        rate,
        sent["profile"],
        sent["rmw"],
        sent["shm"],
        sent["problem"],
        round(os.getloadavg()[0], 2),
    )


def run_image_bench(seconds: float = 10.0, width: int = 640, height: int = 480, rate: float = 30.0) -> ImageBench:
    """Send ``width`` x ``height`` RGB pictures at ``rate`` Hz for ``seconds`` between two processes.

    Raises:
        BenchError: a value is out of range, a process failed, or they did not find each other.
    """
    for name, value, low, high in (
        ("seconds", seconds, 0.1, 3600.0),
        ("width", width, 1, 8192),
        ("height", height, 1, 8192),
        ("rate", rate, 0.1, 1000.0),
    ):
        if not low <= value <= high:
            raise BenchError(f"{name}: expected {low:g} to {high:g}, got {value:g}")
    frames = max(1, round(seconds * rate))
    options = {"frames": frames, "rate": rate, "width": width, "height": height, "timeout": _DISCOVERY_S}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with isolated_environment() as isolation, contextlib.ExitStack() as stack:

        def start(role: str, *extra: str) -> subprocess.Popen[str]:
            process = run_module(_MODULE, role, *extra, env=isolation.env)
            stack.callback(end, process)
            return process

        subscriber = start("subscribe")
        publisher = start("publish", *arguments)
        sent = result(publisher, "publisher", _START_S + _DISCOVERY_S + frames / rate + _END_S)
        received = result(subscriber, "subscriber", _START_S)
    if not sent["sent"]:
        raise BenchError(
            f"the two processes did not find each other within {_DISCOVERY_S:g} s in an isolated ROS domain"
        )
    return summarize(sent, received["received"], width, height, rate)
