"""RealSense cameras and their recordings, over librealsense (pyrealsense2 2.59).

Sensors are opened one by one, as realsense-ros does, instead of through ``rs.pipeline``: so the same code serves
hardware, recordings and software devices, which a pipeline does not see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dcqfa_ros.drivers import realsense_device as found
from dcqfa_ros.drivers.device_clock import DeviceClock
from dcqfa_ros.drivers.protocols import CameraExtrinsics, CameraFrame, CameraIntrinsics, DriverError
from dcqfa_ros.drivers.realsense_options import RealSenseOptions
from dcqfa_ros.drivers.realsense_streams import DepthAlignment, RawFrame, Streams

_SLICE_S = 0.25  # so often a silent camera is looked for among those connected
_STALLED_S = 1.0  # a camera that is there and silent for so long is opened anew,
_FIRST_FRAME_S = 4.0  # but its first frame may take longer: sensors start, exposure settles
_RETRY_S = 0.2
_PLAUSIBLE_NS = 1_000_000_000  # between exposure and arrival
_HOST_CLOCKS = ("global_time", "system_time")


class RecordingEndedError(DriverError):
    """A recording that is not repeated has come to its end; nothing more will come."""


class _Device:
    """What a camera and a recording share: open streams, depth, stamps and numbers."""

    def __init__(self, options: RealSenseOptions, what: str, live: bool) -> None:
        self._options, self._what, self._live = options, what, live
        self._streams: Streams | None = None
        self._serial = ""
        self._fps = float(options.fps)
        self._intrinsics: CameraIntrinsics | None = None
        self._extrinsics: CameraExtrinsics | None = None
        self._alignment: DepthAlignment | None = None
        self._clock = DeviceClock()
        self._base, self._last = 0, -1

    @property
    def name(self) -> str:
        """Short name for messages."""
        return self._what

    @property
    def fps(self) -> float:
        """Nominal frames per second."""
        return self._fps

    @property
    def intrinsics(self) -> CameraIntrinsics:
        """Intrinsics of color and of the aligned depth, from the device.

        Raises:
            DriverError: not connected yet.
        """
        if self._intrinsics is None:
            raise DriverError(f"{self._what}: not connected, call connect() first")
        return self._intrinsics

    @property
    def has_depth(self) -> bool:
        """Whether frames carry aligned depth."""
        return self._alignment is not None if self._intrinsics is not None else self._options.depth

    @property
    def serial_number(self) -> str:
        """Serial number of the device; empty before ``connect``."""
        return self._serial

    @property
    def extrinsics(self) -> CameraExtrinsics | None:
        """Depth to color as the device reports it; None without depth."""
        return self._extrinsics

    @property
    def skipped(self) -> int:
        """Pairs that nobody read in time since the camera was last opened."""
        return 0 if self._streams is None else self._streams.skipped

    def _use(self, device: Any, sensors: Sequence[tuple[Any, list[Any]]]) -> None:
        """Take intrinsics, extrinsics and depth unit of the chosen profiles."""
        rs = found.librealsense()
        profiles = {profile.stream_type(): profile for _, group in sensors for profile in group}
        color, depth = profiles[rs.stream.color], profiles.get(rs.stream.depth)
        intrinsics = found.intrinsics(color)
        alignment, extrinsics = None, None
        if depth is not None:
            scale_m = found.depth_unit(next(sensor for sensor, group in sensors if depth in group))
            alignment, extrinsics = DepthAlignment(self._options, scale_m), found.extrinsics(depth, color)
        serial, fps = found.info(device, "serial_number"), float(color.fps())
        streams = Streams(sensors, fps, depth is not None)
        streams.start(self._what)  # last: what follows cannot fail and leave it streaming
        self._serial, self._fps = serial, fps
        self._intrinsics, self._extrinsics, self._alignment = intrinsics, extrinsics, alignment
        self._streams = streams
        self._clock.reset()

    def _frame(self, color: RawFrame, depth: RawFrame | None) -> CameraFrame:
        pixels = np.asanyarray(color.frame.get_data()).copy()  # librealsense has only 16 buffers to give
        pixels.flags.writeable = False
        aligned = None
        if depth is not None:
            assert self._alignment is not None
            aligned = self._alignment.process(color.frame, depth.frame)
        if color.number + self._base <= self._last:  # the device, or the recording, counts from the start again
            self._base = self._last + 1 - color.number
        self._last = color.number + self._base
        return CameraFrame(pixels, aligned, self._stamp(color), self._last)

    def _stamp(self, color: RawFrame) -> int:
        """Return when ``color`` was taken, by the host's clock where the device knows it, else by its own."""
        stamp = self._clock.stamp(round(color.time_ms * 1e6), color.arrival_ns)
        if self._live and color.domain in _HOST_CLOCKS:
            host = round(color.time_ms * 1e6) - (time.time_ns() - time.monotonic_ns())
            if color.arrival_ns - _PLAUSIBLE_NS < host <= color.arrival_ns:
                return host
        return stamp


class RealSenseCamera(_Device):
    """A connected RealSense camera. Not thread-safe.

    A camera that is unplugged, or silent for 1 s, is an error of ``read`` until it is back; it is known again by its
    serial number, on whatever port.
    """

    def __init__(self, options: RealSenseOptions, devices: Callable[[], Sequence[Any]] | None = None) -> None:
        """Choose profile and filters; nothing is opened.

        Args:
            options: what to open.
            devices: lists the connected devices; those of librealsense by default.
        """
        super().__init__(options, f"RealSense camera {options.serial_number}".rstrip(), live=True)
        self._list = devices
        self._silent_s, self._patience_s = 0.0, _FIRST_FRAME_S
        self._lost = ""

    def connect(self) -> None:
        """Open the camera and start its streams.

        Raises:
            DriverError: no camera, another serial number, a profile or option it does not have, busy, or USB 2.
        """
        if self._streams is None and not self._lost:
            self._open(self._options.serial_number)

    def _devices(self) -> Sequence[Any]:
        if self._list is None:
            context = found.librealsense().context()
            self._list = lambda: list(context.query_devices())
        return self._list()

    def _is_gone(self) -> bool:
        """Return whether the camera is surely not connected any more."""
        try:
            return self._serial not in [found.info(device, "serial_number") for device in self._devices()]
        except RuntimeError:  # of a device that comes or goes at this moment: the next look tells
            return False

    def _open(self, serial_number: str) -> None:
        try:
            device = found.choose_device(self._devices(), serial_number, self._options.allow_usb2)
            self._what = found.label(device)
            sensors = found.choose_profiles(device, self._options)
            found.check_and_set_options([sensor for sensor, _ in sensors], self._what, self._options)
            self._use(device, sensors)
        except RuntimeError as error:  # librealsense's, as of a device that is not ready yet, or gone again
            raise DriverError(f"{self._what} cannot be set up: {' '.join(str(error).split())}") from error
        self._silent_s, self._patience_s, self._lost = 0.0, _FIRST_FRAME_S, ""

    def read(self, timeout_s: float = 1.0) -> CameraFrame:
        """Wait for the next pair of frames; see :class:`~dcqfa_ros.drivers.protocols.CameraDriver`.

        Raises:
            ValueError: ``timeout_s`` is not positive.
            DriverError: not connected, nothing came in time, or the camera is gone; the next call looks for it.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected a positive number of seconds, got {timeout_s}")
        if self._streams is None and not self._lost:
            raise DriverError(f"{self._what}: not connected, call connect() first")
        deadline = time.monotonic() + timeout_s
        if self._streams is None:
            self._reopen(deadline)
        assert self._streams is not None
        while (left := deadline - time.monotonic()) > 0:
            part = min(left, _SLICE_S)
            pair = self._streams.wait(part)
            if pair is not None:
                self._silent_s, self._patience_s = 0.0, _STALLED_S
                return self._frame(*pair)
            self._silent_s += part
            if self._is_gone():
                self._lose(f"{self._what} was disconnected; it is used again as soon as it is back")
            if self._silent_s >= self._patience_s:
                trouble = self._streams.pairing.trouble() or "it is connected but sends nothing"
                self._lose(
                    f"{self._what} has delivered nothing for {self._silent_s:.1f} s ({trouble}); opening it anew"
                )
        trouble = self._streams.pairing.trouble()
        raise DriverError(f"{self._what}: no frame within {timeout_s:g} s{': ' if trouble else ''}{trouble}")

    def _lose(self, reason: str) -> None:
        self._lost = reason
        streams, self._streams = self._streams, None
        if streams is not None:
            streams.stop()
        raise DriverError(reason)

    def _reopen(self, deadline: float) -> None:
        """Open the camera that was lost as soon as it is there.

        Raises:
            DriverError: it is not there by ``deadline``, or cannot be opened.
        """
        while True:
            try:
                self._open(self._serial)
                return
            except DriverError as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DriverError(f"{self._lost} ({error})") from error
                time.sleep(min(left, _RETRY_S))

    def close(self) -> None:
        """Close the camera; safe to call at any time and more than once."""
        streams, self._streams, self._lost = self._streams, None, ""
        if streams is not None:
            streams.stop()


class RealSenseRecording(_Device):
    """A recording of a RealSense camera (``.db3`` of librealsense from 2.58 on, ``.bag`` before), at its own pace."""

    def __init__(
        self, path: Path, at_end: Literal["loop", "end"] = "loop", options: RealSenseOptions | None = None
    ) -> None:
        """Choose the file; nothing is opened.

        Args:
            path: the recording.
            at_end: begin again, or end with :class:`RecordingEndedError`.
            options: filters and ``depth``; profile and exposure are those of the recording.
        """
        super().__init__(options or RealSenseOptions(), f"recording {path}", live=False)
        self._path, self._at_end = path, at_end
        self._playback: Any = None
        self._sensors: list[tuple[Any, list[Any]]] = []
        self._ended = False

    def connect(self) -> None:
        """Open the file and start to play.

        Raises:
            DriverError: it does not exist, is no recording, or holds no color.
        """
        if self._playback is not None:
            return
        if not self._path.is_file():
            raise DriverError(f"{self._what} does not exist")
        rs = found.librealsense()
        try:
            playback = rs.context().load_device(str(self._path))
        except RuntimeError as error:
            raise DriverError(f"{self._what} cannot be read as a librealsense recording: {error}") from error
        playback.set_real_time(True)
        self._sensors = self._recorded(playback)
        self._use(playback, self._sensors)
        self._playback, self._ended = playback, False

    def _recorded(self, playback: Any) -> list[tuple[Any, list[Any]]]:
        rs = found.librealsense()
        wanted = {rs.stream.color: rs.format.rgb8}
        if self._options.depth:
            wanted[rs.stream.depth] = rs.format.z16
        sensors = []
        seen = []
        for sensor in playback.query_sensors():
            profiles = [p for p in sensor.get_stream_profiles() if wanted.get(p.stream_type()) == p.format()]
            if profiles:
                sensors.append((sensor, [p.as_video_stream_profile() for p in profiles]))
                seen += [p.stream_type() for p in profiles]
        if rs.stream.color not in seen:
            raise DriverError(f"{self._what} holds no color stream in rgb8, expected one")
        if len(seen) != len(set(seen)):
            raise DriverError(f"{self._what} holds more than one color or depth stream, expected one of each")
        return sensors

    def read(self, timeout_s: float = 1.0) -> CameraFrame:
        """Wait for the next pair of frames; see :class:`~dcqfa_ros.drivers.protocols.CameraDriver`.

        Raises:
            ValueError: ``timeout_s`` is not positive.
            RecordingEndedError: (a DriverError) the recording has ended and is not repeated.
            DriverError: not connected, or nothing came in time.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected a positive number of seconds, got {timeout_s}")
        if self._streams is None:
            raise DriverError(f"{self._what}: not connected, call connect() first")
        deadline = time.monotonic() + timeout_s
        while not self._ended and (left := deadline - time.monotonic()) > 0:
            over = self._playback.current_status() == found.librealsense().playback_status.stopped
            pair = self._streams.wait(min(left, 0.02 if over else _SLICE_S))
            if pair is not None:
                return self._frame(*pair)
            if over:
                self._begin_again()
        if self._ended:
            raise RecordingEndedError(f"{self._what} has ended")
        trouble = self._streams.pairing.trouble()
        raise DriverError(f"{self._what}: no frame within {timeout_s:g} s{': ' if trouble else ''}{trouble}")

    def _begin_again(self) -> None:
        if self._at_end == "end":
            self._ended = True
            return
        assert self._streams is not None
        self._streams.stop()
        self._playback.seek(timedelta(0))
        self._clock.reset()
        self._streams.start(self._what)

    def close(self) -> None:
        """Close the file; safe to call at any time and more than once."""
        streams, self._streams, self._playback, self._sensors = self._streams, None, None, []
        if streams is not None:
            streams.stop()
