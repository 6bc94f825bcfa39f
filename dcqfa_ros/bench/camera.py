"""Measure two RGB-D cameras, each its own process, reaching a subscriber in a third: delivery, latency, processor time.

The cameras are real ``camera_node`` processes on the synthetic source. Alignment and JPEG are measured apart from that,
each alone on one thread: they depend on the camera and on who listens, and are no part of the transport.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcqfa_ros.bench.conditions import watch_conditions
from dcqfa_ros.bench.processes import BenchError, end, result, run_module
from dcqfa_ros.drivers.opencv_camera import opencv
from dcqfa_ros.drivers.realsense_options import RealSenseOptions
from dcqfa_ros.drivers.realsense_streams import DepthAlignment, Streams
from dcqfa_ros.ros.isolation import isolated_environment
from dcqfa_ros.sim.camera_realsense import EmulatedRealSense
from dcqfa_ros.sim.camera_synthetic import SyntheticCamera

CAMERAS = ("front", "wrist")
_NODE = "dcqfa_ros.nodes.camera_node"
_SUBSCRIBER = "dcqfa_ros.ros.camera_stream"
_START_S = 60.0
_STOP_S = 5.0
_WARM = 10


@dataclass(frozen=True, slots=True)
class StreamFigures:
    """One stream: pictures due in the measured span, the share that arrived, and latencies in ms (None: none came)."""

    due: int
    delivered: float
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None


@dataclass(frozen=True, slots=True)
class CameraBench:
    """Result of one run.

    Attributes:
        delivered: pictures that arrived over those the frame clocks called for, all streams together, 0..1; a tick the
            camera process itself missed counts as lost.
        p50_ms, p99_ms, max_ms: from the tick of the frame clock to the subscriber's callback, all streams together.
        cpu_cores: transport: processor time of both camera processes and the subscriber, less that of the sources.
        cpu_publishers, cpu_subscriber: of the whole processes, cores.
        cpu_sources: of both synthetic sources alone, measured beforehand in this process.
        alignment_ms, alignment_p99_ms: librealsense's alignment of one depth picture to color, with conversion to mm.
        filters_ms: spatial, temporal and hole-filling filter together, as far as they are on; median.
        jpeg_ms, jpeg_p99_ms: one JPEG of quality 90.
        streams: the same figures per ``camera/stream``.
        width, height, rate, seconds: what was measured.
        rmw: RMW implementation.
        load_1min: load average before; on busy cores latencies are those of the scheduler.
        steal_share: share of processor time that the hypervisor took meanwhile.
    """

    delivered: float
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    cpu_cores: float
    cpu_publishers: float
    cpu_subscriber: float
    cpu_sources: float
    alignment_ms: float
    alignment_p99_ms: float
    filters_ms: float
    jpeg_ms: float
    jpeg_p99_ms: float
    streams: dict[str, StreamFigures]
    width: int
    height: int
    rate: float
    seconds: float
    rmw: str
    load_1min: float
    steal_share: float


def stream_figures(
    arrivals: Sequence[tuple[int, int]], begin: int, end_ns: int, rate: float
) -> tuple[StreamFigures, list[float]]:
    """Return a stream's figures and its latencies in ms.

    Args:
        arrivals: (stamp, arrival) of each picture, ns; a picture that came twice counts once, by its first arrival.
        begin: the measured span, ns of the same clock.
        end_ns: likewise.
        rate: ticks of the frame clock per second; stamps lie on them.
    """
    period = 1e9 / rate
    if not arrivals:
        due = round((end_ns - begin) / period)
        return StreamFigures(due, 0.0, None, None, None), []
    first = arrivals[0][0]
    low, high = int(np.ceil((begin - first) / period)), int(np.ceil((end_ns - first) / period))
    latencies: dict[int, float] = {}
    for stamp, arrival in arrivals:
        number = round((stamp - first) / period)
        if low <= number < high:
            latencies.setdefault(number, (arrival - stamp) / 1e6)
    values = list(latencies.values())
    p50, p99, most = percentiles(values)
    return StreamFigures(high - low, len(values) / max(1, high - low), p50, p99, most), values


def percentiles(values: Sequence[float]) -> tuple[float, float, float] | tuple[None, None, None]:
    """Return median, 99th percentile and maximum, or three times None."""
    if not values:
        return None, None, None
    p50, p99, most = (float(np.percentile(values, q)) for q in (50, 99, 100))
    return p50, p99, most


def run_camera_bench(seconds: float = 10.0, width: int = 640, height: int = 480, rate: float = 30.0) -> CameraBench:
    """Run two RGB-D cameras of ``width`` x ``height`` at ``rate`` Hz for ``seconds``.

    Raises:
        BenchError: a value is out of range, or a process failed.
        DriverError: pyrealsense2 or OpenCV is not installed.
    """
    for name, value, low, high in (
        ("seconds", seconds, 0.5, 3600.0),
        ("width", width, 16, 4096),
        ("height", height, 16, 4096),
        ("rate", rate, 1.0, 1000.0),
    ):
        if not low <= value <= high:
            raise BenchError(f"{name}: expected {low:g} to {high:g}, got {value:g}")
    conditions = watch_conditions()
    alignment, filters = measure_alignment(width, height)
    jpeg = measure_jpeg(width, height)
    sources = len(CAMERAS) * measure_source(width, height, rate)
    report, pids = _transport(seconds, width, height, rate)
    streams, latencies = {}, []
    for label, arrivals in report["arrivals"].items():
        streams[label], values = stream_figures(arrivals, report["begin"], report["end"], rate)
        latencies += values
    p50, p99, most = percentiles(latencies)
    publishers, subscriber = sum(report["cpu"][str(pid)] for pid in pids), report["cpu"]["self"]
    seen = conditions()
    return CameraBench(
        delivered=sum(s.delivered * s.due for s in streams.values()) / max(1, sum(s.due for s in streams.values())),
        p50_ms=p50,
        p99_ms=p99,
        max_ms=most,
        cpu_cores=publishers + subscriber - sources,
        cpu_publishers=publishers,
        cpu_subscriber=subscriber,
        cpu_sources=sources,
        alignment_ms=float(np.median(alignment)),
        alignment_p99_ms=float(np.percentile(alignment, 99)),
        filters_ms=float(np.median(filters)),
        jpeg_ms=float(np.median(jpeg)),
        jpeg_p99_ms=float(np.percentile(jpeg, 99)),
        streams=streams,
        width=width,
        height=height,
        rate=rate,
        seconds=seconds,
        rmw=report["rmw"],
        load_1min=seen.load_1min,
        steal_share=seen.steal_share,
    )


def _transport(seconds: float, width: int, height: int, rate: float) -> tuple[dict[str, Any], list[int]]:
    """Run the three processes; return what the subscriber printed and the ids of the camera processes."""
    with isolated_environment() as isolation, contextlib.ExitStack() as stack:

        def start(*command: str) -> subprocess.Popen[str]:
            process = run_module(*command, env=isolation.env)
            stack.callback(end, process)
            return process

        nodes = []
        for camera in CAMERAS:
            parameters = {"camera_name": camera, "source": "synthetic", "width": width, "height": height}
            arguments = [f"{key}:={value}" for key, value in {**parameters, "fps": float(rate)}.items()]
            options = [word for argument in arguments for word in ("-p", argument)]
            nodes.append(start(_NODE, "--ros-args", "-r", f"__node:={camera}_camera_node", *options))
        pids = [process.pid for process in nodes]
        words = ["--cameras", *CAMERAS, "--pids", *map(str, pids), "--seconds", str(seconds)]
        subscriber = start(_SUBSCRIBER, *words)
        report = result(subscriber, "subscriber", 2 * _START_S + seconds)
        for process in nodes:
            process.send_signal(signal.SIGTERM)
        for process in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
    return report, pids


def measure_source(width: int, height: int, rate: float, seconds: float = 2.0) -> float:
    """Return the cores that one synthetic camera uses without any transport."""
    camera = SyntheticCamera("source", width, height, rate)
    camera.connect()
    camera.read()
    began, used = time.monotonic(), time.thread_time()
    while time.monotonic() - began < seconds:
        camera.read(2.0 / rate + 1.0)
    return (time.thread_time() - used) / (time.monotonic() - began)


def measure_alignment(width: int, height: int, pictures: int = 100) -> tuple[list[float], list[float]]:
    """Return times in ms to align depth to color, and to filter depth beforehand, per picture.

    librealsense's software device stands in for a camera, with the baseline of a D435.

    Raises:
        DriverError: pyrealsense2 is not installed.
        BenchError: librealsense does not deliver what was sent.
    """
    emulated = EmulatedRealSense(width=width, height=height)
    plain = RealSenseOptions(width=width, height=height)
    filtered = RealSenseOptions(width=width, height=height, spatial=True, temporal=True, hole_filling=True)
    sensors = emulated.prepare()
    streams = Streams(sensors, emulated.fps, depth=True)
    streams.start("emulated camera")
    try:
        times: tuple[list[float], list[float]] = ([], [])
        blocks = [DepthAlignment(options, emulated.depth_unit_m) for options in (plain, filtered)]
        for number in range(pictures + _WARM):
            emulated.send(number, number * 1000.0 / emulated.fps)
            pair = streams.wait(1.0)
            if pair is None or pair[1] is None:
                raise BenchError("librealsense's software device did not deliver a pair of frames")
            spent = []
            for block in blocks:
                began = time.perf_counter()
                block.process(pair[0].frame, pair[1].frame)
                spent.append((time.perf_counter() - began) * 1e3)
            if number >= _WARM:
                times[0].append(spent[0])
                times[1].append(spent[1] - spent[0])
    finally:
        streams.stop()
    return times


def measure_jpeg(width: int, height: int, pictures: int = 100, quality: int = 90) -> list[float]:
    """Return times in ms to encode one picture of the synthetic scene as JPEG.

    Raises:
        DriverError: OpenCV is not installed.
    """
    from dcqfa_ros.nodes.camera_jpeg import encode_jpeg
    from dcqfa_ros.sim.camera_synthetic import scene

    cv2 = opencv()
    threads = cv2.getNumThreads()
    color, _ = scene(width, height)
    times = []
    cv2.setNumThreads(1)
    try:
        for number in range(pictures + _WARM):
            picture = color[number : number + height]
            began = time.perf_counter()
            encode_jpeg(picture, quality)
            if number >= _WARM:
                times.append((time.perf_counter() - began) * 1e3)
    finally:
        cv2.setNumThreads(threads)
    return times
