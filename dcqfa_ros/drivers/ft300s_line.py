"""The serial line to a Robotiq FT 300-S: opening with errors that say what to do, and reading without delay."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from dcqfa_ros.drivers.ft300s_protocol import BAUD_RATE
from dcqfa_ros.drivers.protocols import DriverError, WrenchSample

MAX_LATENCY_TIMER_MS = 2
"""An FTDI adapter that waits longer than this before it hands bytes on makes readings late."""

_CHUNK = 4096
_GONE = {errno.EIO, errno.ENXIO, errno.ENODEV, errno.EBADF, errno.ENOENT, errno.ENOTDIR}


class SensorUnpluggedError(DriverError):
    """The serial port is not there, or vanished."""


class PortBusyError(DriverError):
    """Another program holds the serial port."""


class PortPermissionError(DriverError):
    """This user may not open the serial port."""


class SensorSilentError(DriverError):
    """The port is there, but no valid reading or answer comes."""


class SensorReplacedError(DriverError):
    """Another sensor than before answers, to which bias and zero do not belong."""


class SensorOverrangeError(DriverError):
    """The load is beyond the measuring range: the sensor works, but ``sample`` is no measurement of the load."""

    def __init__(self, text: str, sample: WrenchSample) -> None:
        """Keep the reading beside the text."""
        super().__init__(text)
        self.sample = sample


class Port(Protocol):
    """What is used of pyserial's ``Serial``."""

    def fileno(self) -> int:
        """File descriptor, not blocking."""

    def write(self, data: bytes, /) -> int | None:
        """Write all bytes."""

    def flush(self) -> None:
        """Wait until they are sent."""

    def reset_input_buffer(self) -> None:
        """Forget what the system has received."""

    def close(self) -> None:
        """Give the port back."""


def open_serial(port: str) -> Port:
    """Open ``port`` at 19200 8N1 for this process alone.

    Raises:
        DriverError: pyserial is not installed.
        OSError: (pyserial's SerialException) the port cannot be opened; ``errno`` says why.
    """
    try:
        import serial
    except ModuleNotFoundError as error:
        raise DriverError(
            "the Python package 'serial' (pyserial) is not installed: pip install -r requirements/cell.txt"
        ) from error
    opened: Any = serial.Serial(port, BAUD_RATE, timeout=0, write_timeout=1.0, exclusive=True)
    return opened  # type: ignore[no-any-return]


def latency_timer_ms(port: str, sysfs: Path = Path("/sys")) -> int | None:
    """Return the latency timer of the USB adapter behind ``port``, None where it has none (no FTDI adapter).

    ``sysfs`` is where the system's device tree is mounted.
    """
    name = Path(port).resolve().name
    for place in (f"bus/usb-serial/devices/{name}/latency_timer", f"class/tty/{name}/device/latency_timer"):
        with contextlib.suppress(OSError, ValueError):
            return int((sysfs / place).read_text())
    return None


def latency_warning(port: str, timer_ms: int | None) -> str:
    """Return what is wrong with the latency timer and what to do; empty when nothing is."""
    if timer_ms is None or timer_ms <= MAX_LATENCY_TIMER_MS:
        return ""
    name = Path(port).resolve().name
    return (
        f"{port}: the adapter's latency timer is {timer_ms} ms, expected {MAX_LATENCY_TIMER_MS} or less: readings come "
        f"up to {timer_ms} ms late and in bunches; echo 1 > /sys/bus/usb-serial/devices/{name}/latency_timer, or "
        "install the udev rule of docs/robot.md"
    )


class SerialLine:
    """One open serial port; every error names it and says what to do. Not thread-safe."""

    def __init__(self, port: str, opener: Callable[[str], Port] = open_serial) -> None:
        """Choose the port (``/dev/ttyUSB0``, a link to it); ``opener`` opens it."""
        self.port = port
        self._opener = opener
        self._device: Port | None = None
        self._fd = -1

    @property
    def is_open(self) -> bool:
        """Whether the port is open; it may have vanished since."""
        return self._device is not None

    def open(self) -> None:
        """Open the port; nothing happens when it is open.

        Raises:
            SensorUnpluggedError: there is no such port.
            PortBusyError: another program holds it.
            PortPermissionError: this user may not open it.
            DriverError: pyserial is missing, or the port is no serial port.
        """
        if self._device is not None:
            return
        try:
            self._device = self._opener(self.port)
            self._fd = self._device.fileno()
        except OSError as error:
            self.close()
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> DriverError:
        number = error.errno
        if number in _GONE or (number is None and not Path(self.port).exists()):
            return SensorUnpluggedError(
                f"{self.port}: no such serial port; plug the sensor in or correct the port (ls /dev/serial/by-id)"
            )
        if number in {errno.EAGAIN, errno.EWOULDBLOCK, errno.EBUSY}:
            return PortBusyError(f"{self.port}: held by another program; end it (fuser -v {self.port} names it)")
        if number in {errno.EACCES, errno.EPERM}:
            return PortPermissionError(
                f"{self.port}: permission denied; add this user to the group dialout "
                "(sudo usermod -aG dialout $USER) and log in again"
            )
        return DriverError(f"{self.port}: cannot be opened as a serial port: {error}")

    def read(self, timeout_s: float) -> bytes:
        """Return what has arrived, waiting at most ``timeout_s`` seconds for a first byte; empty when none came.

        Raises:
            SensorUnpluggedError: the port vanished, or was never opened.
        """
        self._opened()
        try:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, timeout_s))
            if not ready:
                return b""
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return b""
        except (OSError, ValueError) as error:
            raise self._vanished(error) from error
        if not data:  # a hung-up line is always ready and gives nothing
            raise self._vanished(None)
        return data

    def write(self, data: bytes) -> None:
        """Send ``data``.

        Raises:
            SensorUnpluggedError: the port vanished, or was never opened.
        """
        device = self._opened()
        try:
            device.write(data)
        except OSError as error:
            raise self._vanished(error) from error

    def discard(self) -> None:
        """Forget what has arrived but was not read.

        Raises:
            SensorUnpluggedError: the port vanished, or was never opened.
        """
        device = self._opened()
        try:
            device.reset_input_buffer()
        except Exception as error:  # termios.error is no OSError
            raise self._vanished(error) from error

    def silence(self, quiet_s: float, limit_s: float) -> bool:
        """Read until nothing came for ``quiet_s`` seconds; False when ``limit_s`` seconds passed before.

        Raises:
            SensorUnpluggedError: the port vanished.
        """
        end = time.monotonic() + limit_s
        while self.read(quiet_s):
            if time.monotonic() > end:
                return False
        return True

    def close(self) -> None:
        """Give the port back. Safe to call at any time and more than once."""
        device, self._device = self._device, None
        if device is not None:
            with contextlib.suppress(Exception):  # of a device that is gone there is nothing to give back
                device.close()

    def _opened(self) -> Port:
        if self._device is None:
            raise SensorUnpluggedError(f"{self.port}: not open; call connect() first")
        return self._device

    def _vanished(self, error: Exception | None) -> SensorUnpluggedError:
        why = f" ({error})" if error is not None and str(error) else ""
        return SensorUnpluggedError(f"{self.port}: the sensor was unplugged{why}; plug it in again")
