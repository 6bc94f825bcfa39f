"""camera_node: one camera's color pictures, aligned depth where it has it, and ``camera_info`` under the same stamp.

A thread of its own reads the driver and publishes serialized bytes; the executor only serves parameters and
diagnostics. Without a picture nothing is published: subscribers see the age grow, and ``diagnostics`` says why. A
camera that is lost is looked for again until it is back; the node stays active meanwhile.
"""

from __future__ import annotations

import importlib
import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from rclpy.serialization import serialize_message

from dcqfa_ros.drivers.capture import CaptureRecord
from dcqfa_ros.drivers.extrinsics import CameraPose
from dcqfa_ros.drivers.protocols import CameraDriver, CameraFrame, DriverError
from dcqfa_ros.drivers.realsense import RecordingEndedError
from dcqfa_ros.nodes.camera_jpeg import JpegStream
from dcqfa_ros.nodes.camera_sources import camera_pose, declare_camera, open_camera
from dcqfa_ros.ros.camera_messages import camera_info, camera_transforms, transform_message
from dcqfa_ros.ros.conversions import NS, at_monotonic
from dcqfa_ros.ros.diagnostics import Level, Status
from dcqfa_ros.ros.fastdds import use_image_profile
from dcqfa_ros.ros.image_memory import keep_picture_memory
from dcqfa_ros.ros.images import encode_image, restamp
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.node import ManagedNode, run_node
from dcqfa_ros.ros.realtime_parameters import RealtimeParameters
from dcqfa_ros.rotations import quaternion_of

COLOR_ENCODING, DEPTH_ENCODING = "rgb8", "16UC1"
_SLOW_SHARE = 0.9  # a rate below this share of fps is a warning
_JOIN_S = 1.5  # longer than a period at the slowest rate
_ERROR_PAUSE_S = 0.1  # a driver that fails at once is not asked more often


class CameraNode(ManagedNode):
    """Publishes one camera's color stream, its aligned depth and what belongs to them."""

    NODE_NAME: ClassVar[str] = "camera_node"

    def __init__(self, **kwargs: Any) -> None:
        """Choose the transport and memory for images (before DDS starts), then create the node."""
        keep_picture_memory()
        self._transport = use_image_profile()
        super().__init__(**kwargs)

    def declare(self) -> None:
        """Declare the parameters."""
        self.add_parameter("camera_name", "front", "name of the camera: prefix of topics and frames", read_only=True)
        declare_camera(self)
        self._realtime = RealtimeParameters(self, "capture")
        self.add_parameter("jpeg_quality", 90, "of the compressed pictures", minimum=1, maximum=100, read_only=True)
        self._camera: CameraDriver | None = None
        self._record: CaptureRecord | None = None
        self._capture: threading.Thread | None = None
        self._jpeg: JpegStream | None = None
        self._pose: CameraPose | None = None
        self._halt = threading.Event()

    def setup(self) -> None:
        """Open the camera and create the publishers.

        Raises:
            DriverError: the source is unknown or the camera cannot be opened.
            CalibrationError: the calibration file cannot be relied on.
        """
        self._realtime.settings()  # refuses before anything is opened
        name = self.parameter("camera_name")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise DriverError(f"parameter camera_name is {name!r}, expected letters, digits and '_', a letter first")
        self._pose = camera_pose(self, name)
        self._camera = open_camera(self, name)
        self._camera.connect()
        self._frame_id = interface("color").frame.format(camera=name)
        self._info = bytes(serialize_message(camera_info(self._camera.intrinsics, self._frame_id)))
        self._color_publisher = self.create_interface_publisher("color", camera=name)
        self._info_publisher = self.create_interface_publisher("camera_info", camera=name)
        self._jpeg_publisher = self.create_interface_publisher("compressed", camera=name)
        self._depth_publisher: Any = None
        self._depth_info_publisher: Any = None
        if self._camera.has_depth and self.parameter("depth"):
            self._depth_publisher = self.create_interface_publisher("depth", camera=name)
            self._depth_info_publisher = self.create_interface_publisher("depth_info", camera=name)
        self._transforms = camera_transforms(name, self._pose, self._camera.extrinsics)
        self._publish_transforms()
        problem = self._transport.problem
        self.event(Level.ERROR if problem else Level.OK, problem or self._transport.message, camera=name)

    def _publish_transforms(self) -> None:
        """Publish where the camera is, on machines that have tf2's messages."""
        try:
            message = importlib.import_module("tf2_msgs.msg").TFMessage()
        except ImportError:
            self._tf = "only here: tf2_msgs is not installed, so tf_static is not published"
            return
        stamp = self.get_clock().now().to_msg()
        message.transforms = [transform_message(*transform, stamp) for transform in self._transforms]
        self.create_interface_publisher("tf_static").publish(message)
        self._tf = "in tf_static"

    def start(self) -> None:
        """Begin to capture."""
        assert self._camera is not None
        if self._capture is not None and self._capture.is_alive():
            raise DriverError(f"{self._camera.name} is still busy with its last read; activate again in a moment")
        self._camera.connect()
        self._record = CaptureRecord(self._camera.fps)
        self._jpeg = JpegStream(self._jpeg_publisher, self._frame_id, self.parameter("jpeg_quality"), self.guard)
        self._halt = threading.Event()
        arguments = (self._camera, self._record, self._jpeg, self._halt)
        self._capture = threading.Thread(target=self.guard(self._run), args=arguments, name="capture", daemon=True)
        self._capture.start()

    def stop(self, reason: str) -> None:  # noqa: ARG002 - the base publishes the reason
        """End the threads; the capture thread may be the caller."""
        self._halt.set()
        capture = self._capture
        if capture is not None and capture is not threading.current_thread():
            capture.join(_JOIN_S)
        jpeg, self._jpeg = self._jpeg, None
        if jpeg is not None:
            jpeg.stop()

    def teardown(self) -> None:
        """Release the camera; where a read still hangs in its driver, the capture thread does so after it."""
        camera, self._camera, self._record = self._camera, None, None
        capture, self._capture = self._capture, None
        if camera is None:
            return
        if capture is not None and capture.is_alive():
            threading.Thread(target=_release, args=(capture, camera), name="release", daemon=True).start()
            self.event(Level.WARN, f"{camera.name} hangs in a read; it is released when that ends")
        else:
            camera.close()

    # capture thread

    def _run(self, camera: CameraDriver, record: CaptureRecord, jpeg: JpegStream, halt: threading.Event) -> None:
        with self._realtime.entered():
            self._read(camera, record, jpeg, halt)

    def _read(self, camera: CameraDriver, record: CaptureRecord, jpeg: JpegStream, halt: threading.Event) -> None:
        grace_ns = self.parameter("stale_after_ms") * 1_000_000
        name = self.parameter("camera_name")
        timeout_s = max(1.0, 3.0 / camera.fps)
        seen = False
        while not halt.is_set():
            try:
                frame = camera.read(timeout_s)
            except DriverError as error:
                # A cell that starts after its camera is no outage until the same time has passed.
                if record.lost(str(error)) or (not seen and record.waited_ns > grace_ns):
                    seen = True
                    self.event(Level.ERROR, f"no picture from camera {name}: {error}")
                if isinstance(error, RecordingEndedError):
                    halt.wait()
                halt.wait(_ERROR_PAUSE_S)
                continue
            if halt.is_set():
                return
            self._publish_frame(frame, jpeg)
            if record.picture(frame.stamp_ns, time.monotonic_ns() - frame.stamp_ns) and seen:
                self.event(Level.OK, f"camera {name} delivers pictures again")
            seen = True

    def _publish_frame(self, frame: CameraFrame, jpeg: JpegStream) -> None:
        stamp = divmod(at_monotonic(self.get_clock(), frame.stamp_ns), NS)
        # Pictures first: a policy waits for both, nobody for what belongs to them.
        self._color_publisher.publish(encode_image(stamp, self._frame_id, frame.color, COLOR_ENCODING))
        depth = frame.depth if self._depth_publisher is not None else None
        if depth is not None:
            self._depth_publisher.publish(encode_image(stamp, self._frame_id, depth, DEPTH_ENCODING))
        info = restamp(self._info, stamp)
        self._info_publisher.publish(info)
        if depth is not None:
            self._depth_info_publisher.publish(info)
        jpeg.submit(stamp, frame.color)

    # diagnostics

    def status(self) -> Sequence[Status]:
        """Report rate, age, drops, transport and where the camera is; an error by name while there is no picture."""
        statuses = [self._transport_status()]
        camera, record, jpeg = self._camera, self._record, self._jpeg
        if camera is None or record is None or jpeg is None or not self.is_active:
            return statuses
        return [*statuses, self._camera_status(camera, record, jpeg), self._extrinsics_status()]

    def _camera_status(self, camera: CameraDriver, record: CaptureRecord, jpeg: JpegStream) -> Status:
        name = self.parameter("camera_name")
        rate, age, work = record.figures()
        outage = record.outage
        values = {
            "camera": name,
            "source": camera.name,
            "serial_number": camera.serial_number,
            "fps": f"{camera.fps:g}",
            "rate_hz": _text(rate),
            "age_ms": _text(age),
            "work_p99_ms": _text(work),
            "frames": str(record.frames),
            "drops": str(record.drops),
            "lost": str(bool(outage)).lower(),
            "reconnects": str(record.reconnects),
            "depth": str(self._depth_publisher is not None).lower(),
            "calibrated": str(camera.intrinsics.calibrated).lower(),
            "jpeg_frames": str(jpeg.pictures),
            "jpeg_ms": _text(jpeg.median_ms),
            **self._realtime.figures(),
        }
        if outage:
            waiting = record.frames == 0 and record.waited_ns <= self.parameter("stale_after_ms") * 1_000_000
            level = Level.WARN if waiting else Level.ERROR
            return Status(level, "camera", f"no picture from camera {name}: {outage}", values)
        if rate < _SLOW_SHARE * camera.fps:
            text = f"camera {name} delivers {rate:.1f} of {camera.fps:g} pictures per second"
            return Status(Level.WARN, "camera", text, values)
        return Status(Level.OK, "camera", f"camera {name} delivers", values)

    def _extrinsics_status(self) -> Status:
        """Report each frame as ``parent > child``: x y z (m), quaternion x y z w."""
        values = {"published": self._tf}
        for parent, child, matrix in self._transforms:
            numbers = (*matrix[:3, 3], *quaternion_of(matrix[:3, :3]))
            values[f"{parent} > {child}"] = " ".join(f"{float(v):.6g}" for v in numbers)
        if self._pose is None:
            return Status(Level.OK, "extrinsics", "where the camera is was not given", values)
        return Status(Level.OK, "extrinsics", f"{self._pose.status} pose in {self._pose.parent}", values)

    def _transport_status(self) -> Status:
        t = self._transport
        free = "none" if t.shared_memory_free is None else str(t.shared_memory_free >> 20)
        values = {"profile": t.profile, "rmw": t.rmw, "shared_memory_free_mib": free}
        return Status(Level.ERROR if t.problem else Level.OK, "image transport", t.problem or t.message, values)


def _release(capture: threading.Thread, camera: CameraDriver) -> None:
    capture.join()
    camera.close()


def _text(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node; see ``run_node`` for the exit code."""
    return run_node(CameraNode, argv)


if __name__ == "__main__":
    sys.exit(main())
