"""wrench_node: the force/torque sensor's contact wrench at 100 Hz, with bias and the tool's weight taken off.

A thread of its own reads the driver and publishes at once, because the arm's force guard acts on these messages; the
executor only takes in ``tcp_pose``, serves ``~/zero`` and reports. Without a fresh reading nothing is published:
subscribers see the age grow, and ``diagnostics`` says why.

A reading beyond the measuring range is published as the sensor sent it, so that the force guard trips at once, and
reported as an error by name. Without a fresh ``tcp_pose`` the tool's weight stays in ``wrench``, which is reported too.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from geometry_msgs.msg import PoseStamped, WrenchStamped

from dcqfa_ros.drivers.ft300s import FT300S, MODES
from dcqfa_ros.drivers.ft300s_line import SensorUnpluggedError
from dcqfa_ros.drivers.ft300s_reader import WrenchReader
from dcqfa_ros.drivers.patience import connect_patiently
from dcqfa_ros.drivers.protocols import WrenchSample
from dcqfa_ros.ros.conversions import at_monotonic, to_time
from dcqfa_ros.ros.diagnostics import Level, Status
from dcqfa_ros.ros.node import ManagedNode, Refused, run_node
from dcqfa_ros.runtime.histogram import percentiles
from dcqfa_ros.safety.tool_load import Floats, ToolLoad, WrenchCompensation, ZeroRefusedError

_WINDOW = 200  # readings over which rate and work are reported
_SLOW_SHARE = 0.9  # a rate below this share of the nominal one is a warning
_START_S = 2.0  # so long a new activation may be without a rate
_JOIN_S = 3.0  # longer than an attempt to connect


class WrenchNode(ManagedNode):
    """Publishes ``wrench`` and ``wrench_node/raw`` and takes the present load as zero on request."""

    NODE_NAME: ClassVar[str] = "wrench_node"

    def declare(self) -> None:
        """Declare the parameters."""
        add = self.add_parameter
        add("port", "/dev/ttyUSB0", "serial port, best a link of /dev/serial/by-id", read_only=True)
        add(
            "mode", "auto", "stream, poll, or auto: poll where the stream does not start", choices=MODES, read_only=True
        )
        add("frame_id", "ft_sensor", "frame of the published wrenches", read_only=True)
        add("mass", 0.0, "of what hangs on the sensor, kg (dcqfa tool-load)", minimum=0.0, maximum=30.0, read_only=True)
        add("centre_of_mass", [0.0, 0.0, 0.0], "of it, m, sensor frame", read_only=True)
        add("bias", [0.0] * 6, "readings without any load: N, N m, sensor frame", read_only=True)
        rotation = "orientation of the sensor's frame in the tool frame of tcp_pose, quaternion x y z w"
        add("sensor_rotation", [0.0, 0.0, 0.0, 1.0], rotation, read_only=True)
        cutoff = "cut-off of the low-pass filter of wrench, Hz; 0: none. A filter delays the force guard"
        add("low_pass_hz", 0.0, cutoff, minimum=0.0, maximum=1000.0, read_only=True)
        add(
            "orientation_max_age_ms",
            500,
            "oldest tcp_pose that gives gravity",
            minimum=1,
            maximum=60_000,
            read_only=True,
        )
        add("appear_timeout_s", 0.0, "how long the port may take to appear, s", minimum=0.0, maximum=600.0)
        add("silence_ms", 100, "without a reading for longer the sensor counts as lost", minimum=20, maximum=10_000)
        add("maximum_age_ms", 50, "older readings are dropped, not published", minimum=10, maximum=10_000)
        self._driver: FT300S | None = None
        self._reader: WrenchReader | None = None
        self._capture: threading.Thread | None = None
        self._halt = threading.Event()
        self._pose: tuple[int, Floats] | None = None
        self._lock = threading.Lock()  # of what the reading thread and the executor share

    def setup(self) -> None:
        """Find the sensor, read who it is and start its readings.

        Raises:
            DriverError: the sensor is missing, busy or silent.
            ToolLoadError: the tool's parameters cannot be.
        """
        load = ToolLoad(self.parameter("mass"), tuple(self.parameter("centre_of_mass")), tuple(self.parameter("bias")))
        rotation, low_pass = self.parameter("sensor_rotation"), self.parameter("low_pass_hz")
        self._compensation = WrenchCompensation(load, rotation, low_pass)
        self._frame_id = self.parameter("frame_id")
        self._driver = FT300S(self.parameter("port"), self.parameter("mode"))
        connect_patiently(
            self._driver.connect,
            self.parameter("appear_timeout_s"),
            SensorUnpluggedError,
            lambda text: self.event(Level.WARN, text),
        )
        self._wrench_publisher = self.create_interface_publisher("wrench")
        self._raw_publisher = self.create_interface_publisher("wrench_raw")
        self.create_guarded_subscription("tcp_pose", self._take_pose)
        self.create_guarded_service("wrench_zero", self._zero)
        info = self._driver.info
        assert info is not None
        text = f"{self._driver.name}: {info.serial_number} of {info.production_year}, firmware {info.firmware}"
        self.event(Level.OK, text, serial_number=info.serial_number, firmware=info.firmware)
        if self._driver.warning:
            self.event(Level.WARN, self._driver.warning)

    def start(self) -> None:
        """Begin to read."""
        assert self._driver is not None
        self._halt = threading.Event()
        self._compensation.forget()
        self._times: deque[tuple[int, int]] = deque(maxlen=_WINDOW)
        self._began_ns = time.monotonic_ns()
        self._unoriented = self._late = 0
        self._reader = WrenchReader(
            self._driver,
            self._take_sample,
            lambda good, text: self.event(Level.OK if good else Level.ERROR, text),
            silence_s=self.parameter("silence_ms") / 1e3,
            maximum_age_s=self.parameter("maximum_age_ms") / 1e3,
        )
        run = self.guard(self._reader.run)
        self._capture = threading.Thread(target=run, args=(self._halt,), name="wrench", daemon=True)
        self._capture.start()

    def stop(self, reason: str) -> None:  # noqa: ARG002 - the base publishes the reason
        """End the reading thread; it may be the caller."""
        self._halt.set()
        capture, self._capture = self._capture, None
        if capture is not None and capture is not threading.current_thread():
            capture.join(_JOIN_S)

    def teardown(self) -> None:
        """Release the sensor."""
        driver, self._driver, self._reader, self._pose = self._driver, None, None, None
        if driver is not None:
            driver.close()

    # reading thread

    def _take_sample(self, sample: WrenchSample, overrange: str) -> None:
        raw = np.concatenate([sample.force, sample.torque])
        with self._lock:
            orientation = self._orientation(sample.stamp_ns)
            if orientation is None:
                self._unoriented += 1
            wrench = self._compensation.update(sample.stamp_ns, raw, orientation)
            if overrange:
                self._compensation.forget()
        stamp = to_time(at_monotonic(self.get_clock(), sample.stamp_ns))
        self._wrench_publisher.publish(self._message(stamp, wrench))
        self._times.append((sample.stamp_ns, time.monotonic_ns() - sample.stamp_ns))
        self._raw_publisher.publish(self._message(stamp, raw))

    def _orientation(self, stamp_ns: int) -> Floats | None:
        pose = self._pose
        if pose is None or stamp_ns - pose[0] > self.parameter("orientation_max_age_ms") * 1_000_000:
            return None
        return pose[1]

    def _message(self, stamp: Any, wrench: Floats) -> WrenchStamped:
        message = WrenchStamped()
        message.header.stamp, message.header.frame_id = stamp, self._frame_id
        force, torque = message.wrench.force, message.wrench.torque
        force.x, force.y, force.z, torque.x, torque.y, torque.z = wrench.tolist()
        return message

    # executor

    def _take_pose(self, message: PoseStamped) -> None:
        o = message.pose.orientation
        quaternion = np.array([o.x, o.y, o.z, o.w])
        if 0.5 < float(np.linalg.norm(quaternion)) < 2.0:  # NaN fails too: gravity then ages out by name
            self._pose = (time.monotonic_ns(), quaternion)

    def _zero(self, _request: Any, response: Any) -> Any:
        if not self.is_active:
            raise Refused("zero refused: wrench_node is not active; activate it first")
        reader = self._reader
        outage = "" if reader is None else reader.outage or reader.overrange
        if outage:
            raise Refused(f"zero refused: {outage}")
        try:
            with self._lock:
                zero = self._compensation.take_zero()
        except ZeroRefusedError as error:
            raise Refused(str(error)) from error
        values = _join(zero)
        response.success, response.message = True, f"zero taken: {values} (N, N m)"
        self.event(Level.OK, f"wrench zeroed: {values} (N, N m)", zero=values)
        return response

    def status(self) -> Sequence[Status]:
        """Report rate, age, line, sensor, noise and gravity; an error by name while there is no wrench."""
        driver, reader = self._driver, self._reader
        if driver is None or reader is None or not self.is_active:
            return []
        with self._lock:
            covariance = self._compensation.noise_covariance()
            zero = self._compensation.zero
            orientation = self._orientation(time.monotonic_ns())
        rate, age, work = self._figures()
        info, line = driver.info, driver.figures
        values = {
            "sensor": driver.name,
            "serial_number": "" if info is None else info.serial_number,
            "firmware": "" if info is None else info.firmware,
            "production_year": "" if info is None else str(info.production_year),
            "mode": "poll" if driver.polling else "stream",
            "rate_hz": _text(rate),
            "age_ms": _text(age),
            "stamp_to_published_p99_ms": _text(work),
            "readings": str(line.readings),
            "crc_errors": str(line.crc_errors),
            "resyncs": str(line.resyncs),
            "discarded_bytes": str(line.discarded),
            "withheld": str(line.withheld),
            "line_suspect": str(line.suspect).lower(),
            "late": str(reader.late),
            "overranges": str(reader.overranges),
            "reconnects": str(reader.reconnects),
            "latency_timer_ms": "" if driver.latency_timer_ms is None else str(driver.latency_timer_ms),
            "zero": _join(zero),
            "noise_std": "" if covariance is None else _join(np.sqrt(np.diag(covariance))),
            "noise_covariance": "" if covariance is None else _join(covariance.ravel()),
        }
        return [self._sensor_status(values, rate), self._gravity_status(orientation is not None)]

    def _sensor_status(self, values: dict[str, str], rate: float) -> Status:
        driver, reader = self._driver, self._reader
        assert driver is not None and reader is not None
        started = time.monotonic_ns() - self._began_ns < _START_S * 1e9
        if reader.outage:
            level = Level.WARN if started and not self._times else Level.ERROR
            return Status(level, "wrench", f"no wrench: {reader.outage}", values)
        if reader.overrange:
            return Status(Level.ERROR, "wrench", reader.overrange, values)
        problems = [driver.warning] if driver.warning else []
        late, self._late = reader.late - self._late, reader.late
        if late:
            problems.append(
                f"{late} readings dropped since the last report: read more than {self.parameter('maximum_age_ms')} ms "
                "after they were taken; give this computer's processor relief"
            )
        if not started and rate < _SLOW_SHARE * driver.rate_hz:
            problems.append(f"{rate:.1f} of {driver.rate_hz:g} readings per second")
        if values["line_suspect"] == "true":
            problems.append(
                "damaged bytes on the line in the last 10 s: sudden changes of the load are published 10 ms later; "
                "check cable and shield"
            )
        if problems:
            return Status(Level.WARN, "wrench", "; ".join(problems), values)
        return Status(Level.OK, "wrench", f"{driver.name} delivers", values)

    def _gravity_status(self, oriented: bool) -> Status:
        load = self._compensation.load
        values = {"mass_kg": f"{load.mass:g}", "published_without_orientation": str(self._unoriented)}
        if not self._compensation.needs_orientation:
            return Status(Level.OK, "gravity", "no tool weight to take off: parameter mass is 0", values)
        if oriented:
            return Status(Level.OK, "gravity", f"the weight of {load.mass:g} kg is taken off", values)
        age = "never came" if self._pose is None else f"is {(time.monotonic_ns() - self._pose[0]) / 1e9:.1f} s old"
        text = (
            f"tcp_pose {age}: wrench is published with the tool's weight of {load.mass:g} kg in it, bias taken off only"
        )
        return Status(Level.WARN, "gravity", text, values)

    def _figures(self) -> tuple[float, float, float]:
        """Return rate [Hz], age of the newest reading [ms], p99 from stamp to publication [ms]; NaN where unknown."""
        times = list(self._times)
        if len(times) < 2:
            return float("nan"), float("nan"), float("nan")
        age = (time.monotonic_ns() - times[-1][0]) / 1e6
        span = times[-1][0] - times[0][0]
        rate = (len(times) - 1) * 1e9 / span if span > 0 else float("nan")
        return rate, age, percentiles((work for _, work in times), 99)[0] / 1e6


def _text(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def _join(values: Floats) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node; see ``run_node`` for the exit code."""
    return run_node(WrenchNode, argv)


if __name__ == "__main__":
    sys.exit(main())
