"""Driver of the Robotiq FT 300-S force/torque sensor: serial stream at 100 Hz, registers at 30 Hz as fallback.

Source: Robotiq FT 300-S Instruction Manual, chapter 4. Frames and what is believed of them: ``ft300s_protocol``.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dcqfa_ros.drivers.ft300s_line import (
    Port,
    SensorOverrangeError,
    SensorReplacedError,
    SensorSilentError,
    SerialLine,
    latency_timer_ms,
    latency_warning,
    open_serial,
)
from dcqfa_ros.drivers.ft300s_protocol import (
    BYTE_NS,
    COUNTS_PER_NEWTON,
    COUNTS_PER_NEWTON_METRE,
    FRAME_NS,
    POLL_HZ,
    SILENCE_S,
    STOP_SEQUENCE,
    STREAM_HZ,
    STREAM_PERIOD_NS,
    Counts,
    SensorInfo,
    StreamParser,
    info_requests,
    overrange,
    sensor_info,
    signed,
    stream_request,
    wrench_request,
)
from dcqfa_ros.drivers.modbus import ModbusExceptionError, answer_size, find_answer
from dcqfa_ros.drivers.protocols import DriverError, WrenchSample

Mode = Literal["auto", "stream", "poll"]
MODES: tuple[Mode, ...] = ("auto", "stream", "poll")

_LISTEN_S = 0.05  # a stream shows itself within two periods and an adapter's 16 ms
_STOP_LIMIT_S = 0.2
_SLOW_STOP_S = 0.01  # a byte of the slow stop sequence: 0.5 s in all
_ANSWER_S = 0.1
_TRIES = 3
_FIRST_FRAME_S = 0.3
_STALLED_NS = 1_000_000_000  # with a pause this long between two reads the system's buffer may have overflowed


@dataclass(frozen=True, slots=True)
class LineFigures:
    """What the line has brought since the driver was made.

    Attributes:
        readings: believed readings.
        crc_errors: damaged frames and answers.
        resyncs: times the stream was found again after damage.
        discarded: bytes that belonged to nothing.
        withheld: valid frames that were not believed, as on a suspect line.
        suspect: whether damage was seen in the last 10 s, so that sudden changes wait for a second frame.
    """

    readings: int
    crc_errors: int
    resyncs: int
    discarded: int
    withheld: int
    suspect: bool


class FT300S:
    """A Robotiq FT 300-S on a serial port (a ``WrenchDriver``). Not thread-safe."""

    def __init__(
        self,
        port: str,
        mode: Mode = "auto",
        *,
        sysfs: Path = Path("/sys"),
        opener: Callable[[str], Port] = open_serial,
    ) -> None:
        """Choose the port and how readings come; nothing is opened yet.

        Args:
            port: serial port, best a link of /dev/serial/by-id.
            mode: ``stream`` (100 Hz), ``poll`` (registers, about 30 Hz), or ``auto``: the stream, and polling where
                the stream does not start.
            sysfs: where the system's device tree is mounted.
            opener: opens the port.

        Raises:
            ValueError: unknown mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self._mode: Mode = mode
        self._sysfs = sysfs
        self._line = SerialLine(port, opener)
        self._parser = StreamParser()
        self._pending: deque[tuple[int, Counts]] = deque()
        self._polling = False
        self._next_poll_ns = 0
        self._read_ns = 0
        self._number = 0
        self._answer_errors = 0
        self._info: SensorInfo | None = None
        self._timer_ms: int | None = None
        self._rest = b""

    @property
    def name(self) -> str:
        """Short name for messages."""
        return f"FT 300-S at {self._line.port}"

    @property
    def info(self) -> SensorInfo | None:
        """Who the sensor is; None before the first connection."""
        return self._info

    @property
    def polling(self) -> bool:
        """Whether readings come by polling."""
        return self._polling

    @property
    def rate_hz(self) -> float:
        """Nominal readings per second."""
        return POLL_HZ if self._polling else STREAM_HZ

    @property
    def latency_timer_ms(self) -> int | None:
        """Latency timer of the USB adapter, ms; None where it has none."""
        return self._timer_ms

    @property
    def warning(self) -> str:
        """What is wrong with the set-up and what to do; empty when nothing is."""
        texts = [latency_warning(self._line.port, self._timer_ms)]
        if self._polling and self._mode == "auto":
            texts.append(f"{self.name}: the stream does not start; readings come by polling at {POLL_HZ:g} Hz")
        return "; ".join(text for text in texts if text)

    @property
    def figures(self) -> LineFigures:
        """What the line has brought so far."""
        p = self._parser
        return LineFigures(
            self._number, p.crc_errors + self._answer_errors, p.resyncs, p.discarded, p.withheld, p.trust.suspect > 0
        )

    # Connecting ------------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Open the port, stop a stream that runs, read who the sensor is, and start the readings.

        Does nothing when already connected. Takes about 0.2 s, or 0.9 s where a running stream resists the short stop
        sequence.

        Raises:
            SensorUnpluggedError: there is no such port, or it vanished meanwhile.
            PortBusyError: another program holds it.
            PortPermissionError: this user may not open it.
            SensorSilentError: nobody answers, or the stream does not start (mode ``stream``).
            SensorReplacedError: another sensor than at the first connection answers.
            DriverError: pyserial is missing.
        """
        if self._line.is_open:
            return
        self._line.open()
        try:
            self._timer_ms = latency_timer_ms(self._line.port, self._sysfs)
            self._stop_stream()
            self._check_identity()
            self._pending.clear()
            self._parser.reset()
            self._polling = self._mode == "poll" or not self._start_stream()
            self._next_poll_ns = time.monotonic_ns()
        except BaseException:
            self._line.close()
            raise

    def _stop_stream(self) -> None:
        """End a stream that may run.

        The sensor wants at least 50 bytes 0xFF; the manual's own driver spreads them over half a second. They are sent
        at once first, so that a sensor that is plugged in again delivers within a second.
        """
        self._line.discard()
        if not self._line.read(_LISTEN_S):
            return
        self._line.write(STOP_SEQUENCE)
        if self._line.silence(SILENCE_S, _STOP_LIMIT_S):
            return
        for _ in STOP_SEQUENCE:
            self._line.write(STOP_SEQUENCE[:1])
            self._line.read(0.0)
            time.sleep(_SLOW_STOP_S)
        if not self._line.silence(SILENCE_S, 2 * _STOP_LIMIT_S):
            raise SensorSilentError(
                f"{self.name}: bytes keep coming after the stop sequence; is it the sensor's port, at 19200 baud?"
            )

    def _check_identity(self) -> None:
        firmware, identity = (self._ask(request) for request in info_requests())
        info = sensor_info(firmware, identity)
        if self._info is not None and info.serial_number != self._info.serial_number:
            raise SensorReplacedError(
                f"{self.name}: sensor {info.serial_number} answers, expected {self._info.serial_number}: bias and zero "
                "belong to the other one; plug that in, or configure anew"
            )
        self._info = info

    def _start_stream(self) -> bool:
        """Start the stream and wait for its first frame; False when there is none and polling may replace it.

        Raises:
            SensorSilentError: it does not start, and mode is ``stream``.
        """
        try:
            self._ask(stream_request(), keep_rest=True)
            self._read_ns = time.monotonic_ns()
            end = self._read_ns + int(_FIRST_FRAME_S * 1e9)
            self._take(self._rest, self._read_ns)
            while not self._pending and time.monotonic_ns() < end:
                self._take(self._line.read(_FIRST_FRAME_S), time.monotonic_ns())
        except SensorSilentError:
            pass
        if self._pending:
            return True
        if self._mode == "stream":
            raise SensorSilentError(f"{self.name}: the stream does not start; set the parameter mode to poll or auto")
        self._stop_stream()
        return False

    def _ask(self, request: bytes, keep_rest: bool = False, tries: int = _TRIES) -> tuple[int, ...]:
        """Send ``request`` until it is answered, at most ``tries`` times.

        With ``keep_rest`` what came behind the answer is in ``_rest`` afterwards.
        """
        heard = 0
        for _ in range(tries):
            self._line.discard()
            self._line.write(request)
            received = bytearray()
            end = time.monotonic() + _ANSWER_S
            while (left := end - time.monotonic()) > 0:
                received += self._line.read(left)
                try:
                    found = find_answer(received, request)
                except ModbusExceptionError as error:
                    raise SensorSilentError(f"{self.name}: the sensor refuses: {error}; is it an FT 300-S?") from error
                if found is not None:
                    registers, behind = found
                    self._rest = bytes(received[behind:]) if keep_rest else b""
                    return registers
            heard += len(received)
            self._answer_errors += len(received) >= answer_size(request)
        what = f"{heard} bytes that are no answer" if heard else "no answer"
        raise SensorSilentError(
            f"{self.name}: {what} from Modbus slave 9 at 19200 baud; check the sensor's 24 V supply and its cable"
        )

    # Reading ---------------------------------------------------------------------------------------------------------

    def read(self, timeout_s: float = 0.1) -> WrenchSample:
        """Wait for the next reading.

        Raises:
            ValueError: ``timeout_s`` is not positive.
            SensorOverrangeError: the load is beyond the measuring range; the next call waits for the next reading.
            SensorSilentError: no valid reading came within ``timeout_s`` seconds (and, polling, the 0.1 s that an
                answer may take).
            SensorUnpluggedError: the port vanished, or the driver is not connected.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected a positive number of seconds, got {timeout_s}")
        end = time.monotonic() + timeout_s
        while not self._pending:
            left = end - time.monotonic()
            if left <= 0:
                raise SensorSilentError(
                    f"{self.name}: no valid reading within {timeout_s:g} s; check the sensor's supply and cable"
                )
            if self._polling:
                self._poll(left)
            else:
                paused_ns = time.monotonic_ns() - self._read_ns
                data = self._line.read(left)
                self._read_ns = time.monotonic_ns()
                if data and paused_ns > _STALLED_NS:
                    self.discard()  # how old these bytes are cannot be known
                    continue
                self._take(data, self._read_ns)
        stamp_ns, counts = self._pending.popleft()
        return self._sample(stamp_ns, counts)

    def discard(self) -> None:
        """Forget readings that have arrived but were not read, after a pause in reading.

        Raises:
            SensorUnpluggedError: the port vanished, or the driver is not connected.
        """
        self._line.discard()
        self._parser.reset()
        self._pending.clear()
        self._read_ns = time.monotonic_ns()

    def _take(self, data: bytes, arrival_ns: int) -> None:
        """Queue the frames that ``data`` completes, which arrived at ``arrival_ns``."""
        frames = self._parser.feed(data)
        for behind, frame in enumerate(reversed(frames)):
            # The newest frame's last byte arrived just before the bytes behind it; older ones came a period apart.
            late_ns = max(frame.trailing * BYTE_NS, behind * STREAM_PERIOD_NS)
            self._pending.insert(len(self._pending) - behind, (arrival_ns - late_ns - FRAME_NS, frame.counts))

    def _poll(self, left_s: float) -> None:
        """Ask for one reading at the polling rate."""
        wait_s = (self._next_poll_ns - time.monotonic_ns()) * 1e-9
        if wait_s > 0:
            time.sleep(min(wait_s, left_s))
            if wait_s > left_s:
                return
        request = wrench_request()
        with contextlib.suppress(SensorSilentError):  # read() says so once its time is over
            registers = self._ask(request, tries=1)
            arrival_ns = time.monotonic_ns()
            self._pending.append((arrival_ns - answer_size(request) * BYTE_NS, signed(registers)))
        self._next_poll_ns = max(self._next_poll_ns + int(1e9 / POLL_HZ), time.monotonic_ns())

    def _sample(self, stamp_ns: int, counts: Counts) -> WrenchSample:
        force = np.array(counts[:3], dtype=np.float64) / COUNTS_PER_NEWTON
        torque = np.array(counts[3:], dtype=np.float64) / COUNTS_PER_NEWTON_METRE
        force.flags.writeable = torque.flags.writeable = False
        sample = WrenchSample(stamp_ns, force, torque, self._number)
        self._number += 1
        axes = overrange(counts)
        if axes:
            values = ", ".join(f"{value:.1f}" for value in (*force, *torque))
            raise SensorOverrangeError(
                f"{self.name}: overrange on {', '.join(axes)} (readings {values} N, N m; range 300 N, 30 N m): "
                "take the load off",
                sample,
            )
        return sample

    def close(self) -> None:
        """Stop the readings and release the port. Safe to call at any time and more than once."""
        if self._line.is_open and not self._polling:
            with contextlib.suppress(DriverError):  # unplugged: there is nothing to stop
                self._line.write(STOP_SEQUENCE)
                self._line.silence(SILENCE_S, _STOP_LIMIT_S)
        self._line.close()
        self._pending.clear()
