"""Color and depth frames of one librealsense device: received, paired by time, filtered, aligned, in millimetres."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.drivers.realsense_device import librealsense
from dcqfa_ros.drivers.realsense_options import RealSenseOptions

COLOR, DEPTH = "color", "depth"
_QUEUE = 8  # frames of both streams together; the oldest go first
_PENDING = 3
_TOLERANCE = 0.55  # of a period: without a common trigger color and depth are up to half a period apart


@dataclass(frozen=True, slots=True)
class RawFrame:
    """One frame of one stream: number and time (ms) as the device gave them, monotonic arrival, the frame itself."""

    number: int
    time_ms: float
    domain: str
    arrival_ns: int
    frame: Any


class Pairing:
    """Pairs color with the depth taken nearest to it; repeated frames are dropped by their number."""

    def __init__(self, fps: float, depth: bool = True) -> None:
        """Pair at ``fps``; without ``depth`` every new color frame is a pair by itself."""
        self._tolerance_ms = _TOLERANCE * 1000.0 / fps
        self._kinds = (COLOR, DEPTH) if depth else (COLOR,)
        self.repeated = 0
        """Frames that came more than once."""
        self.reset()

    def reset(self) -> None:
        """Forget what is pending: the device starts to count anew."""
        self._pending: dict[str, list[RawFrame]] = {kind: [] for kind in self._kinds}
        self._newest: dict[str, tuple[int, float]] = {}

    def offer(self, kind: str, frame: RawFrame) -> tuple[RawFrame, RawFrame | None] | None:
        """Take a frame; return (color, depth) when it completes a pair. Older frames are then given up."""
        if kind not in self._pending:
            return None
        identity = (frame.number, frame.time_ms)
        if self._newest.get(kind) == identity:
            self.repeated += 1
            return None
        self._newest[kind] = identity
        if len(self._kinds) == 1:
            return frame, None
        mine, others = self._pending[kind], self._pending[DEPTH if kind == COLOR else COLOR]
        mine.append(frame)
        del mine[:-_PENDING]
        partner = min(others, key=lambda other: abs(other.time_ms - frame.time_ms), default=None)
        if partner is None or not abs(partner.time_ms - frame.time_ms) <= self._tolerance_ms:
            return None
        mine.clear()
        others[:] = [other for other in others if other.time_ms > partner.time_ms]
        return (frame, partner) if kind == COLOR else (partner, frame)

    def trouble(self) -> str:
        """Say why frames come and find no partner; empty when there is nothing to say."""
        for kind in self._kinds:
            if kind not in self._newest:
                return f"no {kind} frame has come"
        domains = {frame.domain for frames in self._pending.values() for frame in frames}
        if len(domains) > 1:
            return (
                f"color and depth carry times of different clocks ({', '.join(sorted(domains))}): install "
                "librealsense's udev rules and a kernel with its metadata patch"
            )
        return ""


class Streams:
    """The open sensors of one device. Not thread-safe; librealsense's own threads fill the queue."""

    def __init__(self, sensors: Sequence[tuple[Any, list[Any]]], fps: float, depth: bool) -> None:
        """Take what :func:`~dcqfa_ros.drivers.realsense_device.choose_profiles` chose; nothing is opened yet."""
        self._sensors = list(sensors)
        self._queue: Any = None
        self._opened: list[Any] = []
        self.pairing = Pairing(fps, depth)
        self.skipped = 0
        """Pairs that were given up because a newer one had arrived before they were read."""

    def start(self, what: str) -> None:
        """Open the sensors and stream.

        Raises:
            DriverError: another program has the camera, or it refuses; ``what`` names it. Nothing stays open.
        """
        rs = librealsense()
        self.pairing.reset()
        self._queue = rs.frame_queue(_QUEUE, keep_frames=True)
        try:
            for sensor, profiles in self._sensors:
                sensor.open(profiles)
                self._opened.append(sensor)
            for sensor, _ in self._sensors:
                sensor.start(self._queue)
        except RuntimeError as error:
            self.stop()
            text = " ".join(str(error).split())
            if any(word in text.lower() for word in ("busy", "errno=16", "streaming", "in use")):
                raise DriverError(
                    f"{what} is busy ({text}): end the program that uses it (another camera_node, realsense-viewer)"
                ) from error
            raise DriverError(f"{what} cannot be opened: {text}") from error

    def stop(self) -> None:
        """Stop streaming and close the sensors, also of a device that is gone."""
        for sensor in self._opened:
            with contextlib.suppress(RuntimeError):
                sensor.stop()
            with contextlib.suppress(RuntimeError):
                sensor.close()
        self._opened, self._queue = [], None

    def wait(self, timeout_s: float) -> tuple[RawFrame, RawFrame | None] | None:
        """Return the newest pair, waiting for the next one where none is there yet; None after ``timeout_s`` s."""
        deadline = time.monotonic() + timeout_s
        newest = None
        while True:
            if newest is None:
                left = deadline - time.monotonic()
                came, frame = self._queue.try_wait_for_frame(max(1, round(left * 1e3))) if left > 0 else (False, None)
            else:
                frame = self._queue.poll_for_frame()
                came = bool(frame)
            if not came:
                return newest
            pair = self._offer(frame)
            if pair is not None:
                self.skipped += newest is not None
                newest = pair

    def _offer(self, frame: Any) -> tuple[RawFrame, RawFrame | None] | None:
        rs = librealsense()
        stream = frame.get_profile().stream_type()
        kind = {rs.stream.color: COLOR, rs.stream.depth: DEPTH}.get(stream, "")
        domain = str(frame.get_frame_timestamp_domain()).rpartition(".")[2]
        raw = RawFrame(frame.get_frame_number(), frame.get_timestamp(), domain, time.monotonic_ns(), frame)
        return self.pairing.offer(kind, raw)


class DepthAlignment:
    """Filters depth, aligns it to color and turns it into millimetres."""

    def __init__(self, options: RealSenseOptions, scale_m: float) -> None:
        """Make the filters of ``options``; ``scale_m`` is the depth unit in m.

        Raises:
            DriverError: the depth unit is not positive.
        """
        rs = librealsense()
        if not 0 < scale_m < 1:
            raise DriverError(f"depth unit is {scale_m:g} m, expected above 0 and below 1")
        self._table = millimetres(scale_m)
        self._filters: list[Any] = []
        if options.decimation > 1:
            self._filters.append(rs.decimation_filter(float(options.decimation)))
        if options.spatial:
            self._filters.append(rs.spatial_filter())
        if options.temporal:
            self._filters.append(rs.temporal_filter())
        if options.hole_filling:
            self._filters.append(rs.hole_filling_filter())
        self._align = rs.align(rs.stream.color)
        pair: list[Any] = []
        self._pair = pair
        # librealsense aligns sets of frames, and only a processing block can make one. Its function must not refer to
        # this object: that circle through C++ would never be collected, nor would the pictures it holds.
        self._join = rs.processing_block(
            lambda _frame, source: source.frame_ready(source.allocate_composite_frame(pair))
        )
        self._joined = rs.frame_queue(1)
        self._join.start(self._joined)

    def process(self, color: Any, depth: Any) -> NDArray[np.uint16]:
        """Return depth aligned to ``color``: (height, width) of color, uint16 mm, 0 where unknown, read-only.

        Raises:
            DriverError: librealsense did not align the pair.
        """
        for block in self._filters:
            depth = block.process(depth)
        self._pair[:] = [depth, color]
        try:
            self._join.invoke(color)
            came, joined = self._joined.try_wait_for_frame(1000)
        finally:
            self._pair.clear()
        aligned = self._align.process(joined.as_frameset()).get_depth_frame() if came else None
        if not aligned:
            raise DriverError("librealsense did not align depth to color")
        raw = np.asanyarray(aligned.get_data())
        result: NDArray[np.uint16] = raw.copy() if self._table is None else self._table[raw]
        result.flags.writeable = False
        return result


def millimetres(scale_m: float) -> NDArray[np.uint16] | None:
    """Return the table from raw depth to mm, (65536,) uint16, or None where the unit is exactly 1 mm.

    Devices give their unit as a 32-bit float; those there are are whole micrometres, so that is what it is rounded to
    and everything after is exact: half a millimetre rounds up, and more than 65.535 m is unknown (0).
    """
    micrometres = scale_m * 1e6
    raw = np.arange(65536, dtype=np.int64)
    whole = round(micrometres)
    if whole >= 1 and abs(micrometres - whole) <= 1e-5 * whole:
        if whole == 1000:
            return None
        mm = (raw * whole + 500) // 1000
    else:
        mm = np.floor(raw * micrometres / 1000.0 + 0.5).astype(np.int64)
    return np.where(mm > 65535, 0, mm).astype(np.uint16)
