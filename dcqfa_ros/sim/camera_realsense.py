"""An emulated RealSense camera: librealsense's software device, fed with the synthetic scene at a true frame rate.

The driver opens it as it opens hardware; only USB is missing. It can be unplugged and plugged in again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dcqfa_ros.drivers.realsense import RealSenseCamera
from dcqfa_ros.drivers.realsense_device import librealsense
from dcqfa_ros.drivers.realsense_options import RealSenseOptions
from dcqfa_ros.sim.camera_synthetic import SCENE_ROWS, scene

BASELINE_M = 0.015
"""Distance between the depth and the color camera of a RealSense D435."""
_FOCAL = 0.96


class EmulatedRealSense:
    """A software device with a stereo module and an RGB camera, whose frames come from a thread of its own.

    Use it as a context manager. ``devices()`` is what a driver gets instead of librealsense's list.
    """

    def __init__(
        self,
        serial_number: str = "emulated",
        width: int = 640,
        height: int = 480,
        fps: int = 30,
        depth_unit_m: float = 0.001,
        usb: str = "3.2",
        repeat: int = 1,
        baseline_m: float = BASELINE_M,
    ) -> None:
        """Describe the camera; it is plugged in by :meth:`plug`.

        Args:
            serial_number: what it calls itself.
            width: of both streams, px.
            height: likewise.
            fps: frames per second.
            depth_unit_m: value of one raw depth step, m.
            usb: the link it claims to be on.
            repeat: how often each frame is sent, as playback does.
            baseline_m: distance between the depth and the color camera.
        """
        self.serial_number, self.width, self.height, self.fps = serial_number, width, height, fps
        self.depth_unit_m, self.usb, self.repeat, self.baseline_m = depth_unit_m, usb, repeat, baseline_m
        self._device: Any = None
        self._thread: threading.Thread | None = None
        self._halt = threading.Event()
        self.sent = 0
        """Number of the next frame; it starts anew with each :meth:`plug`."""

    def __enter__(self) -> EmulatedRealSense:
        """Plug it in."""
        self.plug()
        return self

    def __exit__(self, *_: object) -> None:
        """Unplug it."""
        self.unplug()

    def devices(self) -> Sequence[Any]:
        """Return the connected devices: this one, or none while it is unplugged."""
        return [] if self._device is None else [self._device]

    def make(self) -> Any:
        """Return a new software device with the streams and options of a camera, without a thread that feeds it."""
        rs = librealsense()
        device = rs.software_device()
        for name, text in (
            ("name", "Emulated RealSense"),
            ("serial_number", self.serial_number),
            ("usb_type_descriptor", self.usb),
        ):
            device.register_info(getattr(rs.camera_info, name), text)
        self._stereo, self._rgb = device.add_sensor("Stereo Module"), device.add_sensor("RGB Camera")
        self._depth_profile = self._stereo.add_video_stream(self._stream(rs.stream.depth, rs.format.z16, 2, 1))
        self._color_profile = self._rgb.add_video_stream(self._stream(rs.stream.color, rs.format.rgb8, 3, 2))
        self._stereo.add_read_only_option(rs.option.depth_units, self.depth_unit_m)
        for sensor, low, high, start in ((self._rgb, 1.0, 10000.0, 156.0), (self._stereo, 1.0, 165000.0, 8500.0)):
            sensor.add_option(rs.option.exposure, _range(low, high, 1.0, start))
            sensor.add_option(rs.option.gain, _range(0.0, 128.0, 1.0, 64.0))
            sensor.add_option(rs.option.enable_auto_exposure, _range(0.0, 1.0, 1.0, 1.0))
        pose = rs.extrinsics()
        pose.rotation = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
        pose.translation = [self.baseline_m, 0.0, 0.0]
        self._depth_profile.register_extrinsics_to(self._color_profile, pose)
        device.create_matcher(rs.matchers.default)
        return device

    def _stream(self, kind: Any, form: Any, bytes_per_pixel: int, uid: int) -> Any:
        rs = librealsense()
        i = rs.intrinsics()
        i.width, i.height = self.width, self.height
        i.fx = i.fy = _FOCAL * self.width
        i.ppx, i.ppy = (self.width - 1) / 2, (self.height - 1) / 2
        i.model, i.coeffs = rs.distortion.none, [0.0] * 5
        stream = rs.video_stream()
        stream.type, stream.index, stream.uid, stream.fmt, stream.bpp = kind, 0, uid, form, bytes_per_pixel
        stream.width, stream.height, stream.fps, stream.intrinsics = self.width, self.height, self.fps, i
        return stream

    def prepare(self) -> list[tuple[Any, list[Any]]]:
        """Make a device without a thread, for callers of :meth:`send`; return its sensors with their profiles."""
        self._made = self.make()
        self._color, self._depth = scene(self.width, self.height)
        return [(sensor, list(sensor.get_stream_profiles())) for sensor in self._made.query_sensors()]

    def plug(self) -> None:
        """Plug it in; frames flow as soon as a driver streams. Does nothing when it is plugged in."""
        if self._device is not None:
            return
        self._device = self.make()
        self._color, self._depth = scene(self.width, self.height)
        self.sent = 0
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._feed, args=(self._halt,), name="emulated camera", daemon=True)
        self._thread.start()

    def unplug(self) -> None:
        """Unplug it: the device leaves the list and is silent. Safe to call more than once."""
        self._halt.set()
        thread, self._thread, self._device = self._thread, None, None
        if thread is not None:
            thread.join()

    def _feed(self, halt: threading.Event) -> None:
        begin = time.monotonic()
        while not halt.wait(max(0.0, begin + self.sent / self.fps - time.monotonic())):
            self.send(self.sent, self.sent * 1000.0 / self.fps)
            self.sent += 1

    def send(self, number: int, time_ms: float) -> None:
        """Send frame ``number`` of both streams with ``time_ms`` on the device's clock."""
        rs = librealsense()
        top = number % SCENE_ROWS
        rows = slice(top, top + self.height)
        for sensor, profile, pixels, bytes_per_pixel in (
            (self._stereo, self._depth_profile, self._depth[rows], 2),
            (self._rgb, self._color_profile, self._color[rows], 3),
        ):
            for _ in range(self.repeat):
                frame = rs.software_video_frame()
                frame.pixels = np.ascontiguousarray(pixels)
                frame.stride, frame.bpp = self.width * bytes_per_pixel, bytes_per_pixel
                frame.timestamp, frame.domain = time_ms, rs.timestamp_domain.hardware_clock
                frame.frame_number = number
                frame.profile = profile.as_video_stream_profile()
                if bytes_per_pixel == 2:
                    frame.depth_units = self.depth_unit_m
                sensor.on_video_frame(frame)


def _range(low: float, high: float, step: float, start: float) -> Any:
    span = librealsense().option_range()
    span.min, span.max, span.step, span.default = low, high, step, start
    return span


class EmulatedRealSenseCamera(RealSenseCamera):
    """The RealSense driver on an emulated camera of its own, which is plugged in while the driver is connected."""

    def __init__(self, options: RealSenseOptions) -> None:
        """Emulate a camera with the profile, and the serial number if any, of ``options``."""
        self.emulated = EmulatedRealSense(
            options.serial_number or "emulated", options.width, options.height, options.fps
        )
        super().__init__(options, self.emulated.devices)

    def connect(self) -> None:
        """Plug the camera in and open it; see :meth:`RealSenseCamera.connect`."""
        self.emulated.plug()
        super().connect()

    def close(self) -> None:
        """Close the camera and unplug it."""
        super().close()
        self.emulated.unplug()
