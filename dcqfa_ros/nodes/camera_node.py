"""camera_node: one camera's color pictures, with ``camera_info`` under the same stamp.

A thread of its own reads the driver, whose frame clock has monotonic deadlines, and publishes serialized bytes; the
executor only serves parameters and diagnostics. Without a picture nothing is published: subscribers see the age grow,
and ``diagnostics`` says why.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from rclpy.clock import ROSClock
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CameraInfo

from dcqfa_ros.drivers.protocols import CameraDriver, CameraFrame, CameraIntrinsics, DriverError
from dcqfa_ros.ros.diagnostics import Level, Status
from dcqfa_ros.ros.fastdds import use_image_profile
from dcqfa_ros.ros.images import encode_image, restamp
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.node import ManagedNode, run_node
from dcqfa_ros.sim.camera import SimulatedCamera
from dcqfa_ros.sim.cell_state import cell_state_name

SOURCES = ("simulated",)
ENCODING = "rgb8"
_WINDOW_FRAMES = 120  # frames over which rate and work are reported
_SLOW_SHARE = 0.9  # a rate below this share of fps is a warning
_JOIN_S = 1.5  # longer than a period at the slowest rate


def camera_info(intrinsics: CameraIntrinsics, frame_id: str) -> CameraInfo:
    """Return the message for a pinhole camera without distortion (``plumb_bob``, all zero)."""
    i = intrinsics
    message = CameraInfo()
    message.header.frame_id = frame_id
    message.width, message.height = i.width, i.height
    message.distortion_model = "plumb_bob"
    message.d = [0.0] * 5
    message.k = [i.fx, 0.0, i.cx, 0.0, i.fy, i.cy, 0.0, 0.0, 1.0]
    message.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    message.p = [i.fx, 0.0, i.cx, 0.0, 0.0, i.fy, i.cy, 0.0, 0.0, 0.0, 1.0, 0.0]
    return message


@dataclass(frozen=True, slots=True)
class _Picture:
    """What is remembered of a published frame: when it was taken and how long reading to publishing took, ns."""

    stamp_ns: int
    work_ns: int


class _Record:
    """Frames, drops and outages of one activation. Written by the capture thread, read by the executor."""

    def __init__(self, fps: float) -> None:
        self._period_ns = 1e9 / fps
        self._lock = threading.Lock()
        self._pictures: deque[_Picture] = deque(maxlen=_WINDOW_FRAMES)
        self._began_ns = time.monotonic_ns()
        self.frames = 0
        self.drops = 0
        self.outage = "the camera has not delivered yet"
        """Why there is no picture; empty while there is one."""

    def picture(self, picture: _Picture) -> bool:
        """Count a frame; True when it ends an outage, whose missing frames are not drops."""
        with self._lock:
            recovered = bool(self.outage)
            if recovered:
                self._pictures.clear()
            elif self._pictures:
                periods = (picture.stamp_ns - self._pictures[-1].stamp_ns) / self._period_ns
                self.drops += max(0, round(periods) - 1)
            self._pictures.append(picture)
            self.frames += 1
            self.outage = ""
            return recovered

    def lost(self, reason: str) -> bool:
        """Note why there is no picture; True when there was one until now."""
        with self._lock:
            first = not self.outage
            self.outage = reason
            return first

    @property
    def waited_ns(self) -> int:
        """Time since the capture began."""
        return time.monotonic_ns() - self._began_ns

    def figures(self) -> tuple[float, float, float]:
        """Return rate [Hz], age of the newest frame [ms] and p99 of the work per frame [ms]; NaN where unknown."""
        with self._lock:
            pictures = list(self._pictures)
        if not pictures:
            return float("nan"), float("nan"), float("nan")
        age = (time.monotonic_ns() - pictures[-1].stamp_ns) / 1e6
        span = pictures[-1].stamp_ns - pictures[0].stamp_ns
        rate = (len(pictures) - 1) * 1e9 / span if span > 0 else float("nan")
        return rate, age, float(np.percentile([p.work_ns for p in pictures], 99)) / 1e6


class CameraNode(ManagedNode):
    """Publishes one camera's color stream and its ``camera_info``."""

    NODE_NAME: ClassVar[str] = "camera_node"

    def __init__(self, **kwargs: Any) -> None:
        """Choose the transport for images (before DDS starts), then create the node."""
        self._transport = use_image_profile()
        super().__init__(**kwargs)

    def declare(self) -> None:
        """Declare the parameters."""
        self.add_parameter("camera_name", "front", "name of the camera: prefix of topics and frames", read_only=True)
        self.add_parameter("source", "simulated", f"where pictures come from: {', '.join(SOURCES)}", read_only=True)
        self.add_parameter("width", 640, "px", minimum=16, maximum=8192, read_only=True)
        self.add_parameter("height", 480, "px", minimum=16, maximum=8192, read_only=True)
        self.add_parameter("fps", 30.0, "pictures per second", minimum=1.0, maximum=1000.0, read_only=True)
        self.add_parameter(
            "cell", "", "shared-memory name of the simulated cell; empty: this ROS domain and namespace", read_only=True
        )
        self.add_parameter(
            "stale_after_ms",
            2000,
            "there is no picture when the cell has not moved on for longer; 0: only when its process is gone",
            minimum=0,
            maximum=600_000,
            read_only=True,
        )
        self._camera: CameraDriver | None = None
        self._record: _Record | None = None
        self._capture: threading.Thread | None = None
        self._halt = threading.Event()

    def setup(self) -> None:
        """Open the camera and create the publishers.

        Raises:
            DriverError: the source is unknown or the camera cannot be opened.
        """
        name = self.parameter("camera_name")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise DriverError(f"parameter camera_name is {name!r}, expected letters, digits and '_', a letter first")
        self._camera = self._open(name)
        self._camera.connect()
        self._frame_id = interface("color").frame.format(camera=name)
        self._info = bytes(serialize_message(camera_info(self._camera.intrinsics, self._frame_id)))
        self._color_publisher = self.create_interface_publisher("color", camera=name)
        self._info_publisher = self.create_interface_publisher("camera_info", camera=name)
        problem = self._transport.problem
        self.event(Level.ERROR if problem else Level.OK, problem or self._transport.message, camera=name)

    def _open(self, name: str) -> CameraDriver:
        source = self.parameter("source")
        if source not in SOURCES:
            raise DriverError(
                f"camera {name}: parameter source is {source!r}, expected one of {', '.join(SOURCES)}; other cameras "
                "are not available in this version"
            )
        cell = self.parameter("cell") or cell_state_name(self.context.get_domain_id(), self.get_namespace())
        stale_ms = self.parameter("stale_after_ms")
        try:
            return SimulatedCamera(
                cell,
                self.parameter("width"),
                self.parameter("height"),
                self.parameter("fps"),
                maximum_age_s=stale_ms / 1e3 if stale_ms else None,
            )
        except ValueError as error:
            raise DriverError(f"camera {name}: {error}") from error

    def start(self) -> None:
        """Begin to capture."""
        assert self._camera is not None
        self._camera.connect()
        self._record = _Record(self._camera.fps)
        self._halt = threading.Event()
        arguments = (self._camera, self._record, self._halt)
        self._capture = threading.Thread(target=self.guard(self._run), args=arguments, name="capture", daemon=True)
        self._capture.start()

    def stop(self, reason: str) -> None:  # noqa: ARG002 - the base publishes the reason
        """End the capture thread; it may be the caller."""
        self._halt.set()
        capture, self._capture = self._capture, None
        if capture is not None and capture is not threading.current_thread():
            capture.join(_JOIN_S)

    def teardown(self) -> None:
        """Release the camera."""
        camera, self._camera, self._record = self._camera, None, None
        if camera is not None:
            camera.close()

    # capture thread

    def _run(self, camera: CameraDriver, record: _Record, halt: threading.Event) -> None:
        grace_ns = self.parameter("stale_after_ms") * 1_000_000
        timeout_s = max(1.0, 3.0 / camera.fps)
        seen = False
        while not halt.is_set():
            try:
                frame = camera.read(timeout_s)
            except DriverError as error:
                # A cell that starts after its camera is no outage until the same time has passed.
                if record.lost(str(error)) or (not seen and record.waited_ns > grace_ns):
                    seen = True
                    self.event(Level.ERROR, f"no picture from camera {self.parameter('camera_name')}: {error}")
                continue
            if halt.is_set():
                return
            self._publish_frame(frame)
            if record.picture(_Picture(frame.stamp_ns, time.monotonic_ns() - frame.stamp_ns)) and seen:
                self.event(Level.OK, f"camera {self.parameter('camera_name')} delivers pictures again")
            seen = True

    def _publish_frame(self, frame: CameraFrame) -> None:
        stamp_ns = self._ros_stamp_ns(frame)
        stamp = (stamp_ns // 1_000_000_000, stamp_ns % 1_000_000_000)
        self._color_publisher.publish(encode_image(stamp, self._frame_id, frame.color, ENCODING))
        self._info_publisher.publish(restamp(self._info, stamp))

    def _ros_stamp_ns(self, frame: CameraFrame) -> int:
        """Return the time the frame was taken on the node's clock (simulated time stands still in between)."""
        clock = self.get_clock()
        now = int(clock.now().nanoseconds)
        simulated = isinstance(clock, ROSClock) and clock.ros_time_is_active
        return now if simulated else now - (time.monotonic_ns() - frame.stamp_ns)

    # diagnostics

    def status(self) -> Sequence[Status]:
        """Report rate, age, drops and transport; an error by name while there is no picture."""
        name = self.parameter("camera_name")
        statuses = [self._transport_status()]
        camera, record = self._camera, self._record
        if camera is None or record is None or not self.is_active:
            return statuses
        rate, age, work = record.figures()
        values = {
            "camera": name,
            "source": camera.name,
            "fps": f"{camera.fps:g}",
            "rate_hz": _text(rate),
            "age_ms": _text(age),
            "work_p99_ms": _text(work),
            "frames": str(record.frames),
            "drops": str(record.drops),
        }
        outage = record.outage
        if outage:
            waiting = record.frames == 0 and record.waited_ns <= self.parameter("stale_after_ms") * 1_000_000
            level = Level.WARN if waiting else Level.ERROR
            statuses.append(Status(level, "camera", f"no picture from camera {name}: {outage}", values))
        elif rate < _SLOW_SHARE * camera.fps:
            text = f"camera {name} delivers {rate:.1f} of {camera.fps:g} pictures per second"
            statuses.append(Status(Level.WARN, "camera", text, values))
        else:
            statuses.append(Status(Level.OK, "camera", f"camera {name} delivers", values))
        return statuses

    def _transport_status(self) -> Status:
        t = self._transport
        free = "none" if t.shared_memory_free is None else str(t.shared_memory_free >> 20)
        values = {"profile": t.profile, "rmw": t.rmw, "shared_memory_free_mib": free}
        return Status(Level.ERROR if t.problem else Level.OK, "image transport", t.problem or t.message, values)


def _text(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node; see ``run_node`` for the exit code."""
    return run_node(CameraNode, argv)


if __name__ == "__main__":
    sys.exit(main())
