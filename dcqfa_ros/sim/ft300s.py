"""Emulator of a Robotiq FT 300-S behind a pseudo-terminal: registers, stream, stop sequence, and what goes wrong.

The driver opens :attr:`FT300SEmulator.port` as it would open ``/dev/ttyUSB0``. Nothing here shares code with the driver
except the protocol's constants and encoders.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import threading
import time
import tty
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from dcqfa_ros.drivers import ft300s_protocol as ft
from dcqfa_ros.drivers.modbus import crc16
from dcqfa_ros.sim.ft300s_options import EmulatorError, FT300SOptions, SentFrame, wrench_counts
from dcqfa_ros.sim.ft300s_registers import answer, registers, request_size

__all__ = ["EmulatorError", "FT300SEmulator", "FT300SOptions", "SentFrame", "WrenchSource"]

WrenchSource = Callable[[int], Sequence[float]]
"""From monotonic time, ns, to Fx Fy Fz (N) and Mx My Mz (N m) as the sensor would read them."""

_STOP_BYTES = len(ft.STOP_SEQUENCE)
_REST_NS = 1_000_000_000
_KEPT_FRAMES = 100_000
_PAUSE_NS = 50_000_000
_ALIVE_S = 0.5  # so often whoever waits for the thread looks whether there still is one


@dataclass(slots=True)
class _Outgoing:
    """Bytes under way: when the first one is due, how long each takes, and the frame they are."""

    due_ns: int
    step_ns: int
    data: bytes
    sent: int = 0
    frame: tuple[int, int, ft.Counts, bool] | None = None


@dataclass
class _State:
    """What the loop's thread owns."""

    master: int = -1
    slave: int = -1
    streaming: bool = False
    boot_ns: int = 0
    next_frame_ns: int = 0
    number: int = 0
    stop_bytes: int = 0
    received_ns: int = 0
    received: bytearray = field(default_factory=bytearray)
    outgoing: deque[_Outgoing] = field(default_factory=deque)


class FT300SEmulator:
    """A sensor on a pseudo-terminal with a thread of its own; a context manager. Methods may be called by any thread.

    Attributes:
        frames: the newest frames that left, oldest first.
        on_frame: called with each of them on the emulator's thread; must return at once.
        failure: what ended the thread, such as an error of the source; None while all is well.
    """

    def __init__(self, options: FT300SOptions | None = None, source: WrenchSource | None = None) -> None:
        """Prepare a sensor that reads ``source``, or the load of :meth:`set_load`; nothing runs yet."""
        self.options = options or FT300SOptions()
        self.frames: deque[SentFrame] = deque(maxlen=_KEPT_FRAMES)
        self.on_frame: Callable[[SentFrame], None] | None = None
        self._source = source
        self._load = tuple(float(value) for value in self.options.wrench)
        self._silent = False
        self._random = random.Random(self.options.seed)
        self._state = _State()
        self._commands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self.failure: Exception | None = None
        self._wake_read, self._wake_write = -1, -1
        self._thread: threading.Thread | None = None
        self._halt = False
        self._port = ""

    # What users do ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Plug the sensor in and begin.

        Raises:
            EmulatorError: the link's place is taken by something that is no link, or its folder is missing.
        """
        if self._thread is not None:
            return
        self._wake_read, self._wake_write = os.pipe()
        self._halt = False
        try:
            self._plug()
        except BaseException:
            self._close_pipe()
            raise
        self.failure = None
        self._thread = threading.Thread(target=self._guarded_run, name="ft300s emulator", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Unplug the sensor and end. Safe to call more than once."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._halt = True
        os.write(self._wake_write, b"x")
        thread.join()
        self._unplug()
        self._close_pipe()

    def __enter__(self) -> FT300SEmulator:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    @property
    def port(self) -> str:
        """What to open: the link, or the pseudo-terminal itself where there is none."""
        return str(self.options.link) if self.options.link is not None else self._port

    @property
    def streaming(self) -> bool:
        """Whether frames are being sent."""
        return self._state.streaming

    @property
    def plugged(self) -> bool:
        """Whether the sensor is plugged in."""
        return self._state.master >= 0

    def set_load(self, wrench: Sequence[float]) -> None:
        """Let the next sample read ``wrench`` (N, N m) plus noise; a source given at the start is replaced.

        Raises:
            EmulatorError: not six finite numbers.
        """
        wrench_counts(wrench)
        self._load, self._source = tuple(float(value) for value in wrench), None

    def set_silent(self, silent: bool) -> None:
        """Let the sensor send nothing, as one without its supply; it neither streams nor answers afterwards."""

        def apply() -> None:
            self._silent = silent
            self._state.streaming = False
            self._state.outgoing.clear()

        self._do(apply)

    def inject(self, data: bytes) -> None:
        """Put bytes on the line at once."""
        self._do(lambda: self._state.outgoing.append(_Outgoing(time.monotonic_ns(), 0, data)))

    def unplug(self) -> None:
        """Pull the plug: the port vanishes, whoever has it open is hung up."""
        self._do(self._unplug)

    def plug(self) -> None:
        """Plug the sensor in again: a new port behind the same link. Nothing happens when it is plugged in.

        Raises:
            EmulatorError: the link's place is taken meanwhile, or its folder is gone; the sensor stays unplugged.
        """
        self._do(self._plug)

    # The loop --------------------------------------------------------------------------------------------------------

    def _do(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the emulator's thread and wait until it is done; raises what it raises."""
        if self._thread is None:
            raise EmulatorError("the emulated FT 300-S does not run; call start() first")
        done: Future[None] = Future()
        self._commands.append((work, done))
        os.write(self._wake_write, b"x")
        while not wait([done], _ALIVE_S).done:
            if not self._thread.is_alive():
                raise EmulatorError(f"the emulated FT 300-S has ended: {self.failure}")
        done.result()

    def _guarded_run(self) -> None:
        try:
            self._run()
        except Exception as error:
            self.failure = error
            raise

    def _run(self) -> None:
        s = self._state
        while not self._halt:
            now = time.monotonic_ns()
            if s.streaming and s.master >= 0 and now >= s.next_frame_ns:
                self._sample(now)
            due = self._send(time.monotonic_ns())
            if s.streaming:
                due = min(due, s.next_frame_ns)
            pause_s = max(0, due - time.monotonic_ns()) * 1e-9
            watched = [self._wake_read] if s.master < 0 else [self._wake_read, s.master]
            ready, _, _ = select.select(watched, [], [], pause_s)
            if s.master in ready:
                self._receive()
            if self._wake_read in ready:
                os.read(self._wake_read, 256)
                while self._commands:
                    work, done = self._commands.popleft()
                    try:
                        work()
                    except Exception as error:  # noqa: BLE001 - goes to whoever asked for it
                        done.set_exception(error)
                    else:
                        done.set_result(None)

    def _plug(self) -> None:
        s, link = self._state, self.options.link
        if s.master >= 0:
            return
        s.master, s.slave = os.openpty()  # keeping the slave open keeps the port alive while no driver has it open
        try:
            tty.setraw(s.slave)
            os.set_blocking(s.master, False)
            self._port = os.ttyname(s.slave)
            if link is not None:
                _make_link(link, self._port)
        except BaseException:
            os.close(s.master)
            os.close(s.slave)
            s.master = s.slave = -1
            raise
        s.boot_ns = time.monotonic_ns() + int(self.options.boot_s * 1e9)
        s.next_frame_ns = s.boot_ns
        s.streaming = self.options.boot_streaming and not self._silent
        s.received.clear()
        s.outgoing.clear()
        s.stop_bytes = 0

    def _unplug(self) -> None:
        s, link = self._state, self.options.link
        if s.master < 0:
            return
        if link is not None:
            with contextlib.suppress(OSError):
                if link.readlink() == Path(self._port):
                    link.unlink()
        os.close(s.slave)
        os.close(s.master)
        s.master = s.slave = -1
        s.streaming = False
        s.outgoing.clear()

    def _close_pipe(self) -> None:
        os.close(self._wake_read)
        os.close(self._wake_write)

    # Sending ---------------------------------------------------------------------------------------------------------

    def _sample(self, now_ns: int) -> None:
        s, o = self._state, self.options
        counts = self._read_wrench(now_ns)
        frame = ft.encode_frame(counts)
        data = self._damage(frame)
        begin = now_ns
        if self._random.random() < o.noise_share:
            noise = self._random.randbytes(self._random.randint(1, 8))
            s.outgoing.append(_Outgoing(begin, 0, noise))
        step = ft.BYTE_NS if o.paced else 0
        first = begin + ft.BYTE_NS if o.paced else begin + ft.FRAME_NS
        s.outgoing.append(_Outgoing(first, step, data, frame=(s.number, now_ns, counts, data == frame)))
        s.number += 1
        period = int(1e9 / o.rate_hz)
        s.next_frame_ns += period * (1 + max(0, now_ns - s.next_frame_ns) // period)

    def _read_wrench(self, now_ns: int) -> ft.Counts:
        wrench = self._load if self._source is None else self._source(now_ns)
        noise, gauss = self.options.noise, self._random.gauss
        scale = (1.0,) * 3 + (0.01,) * 3
        return wrench_counts([value + gauss(0.0, noise) * s for value, s in zip(wrench, scale, strict=True)])

    def _damage(self, frame: bytes) -> bytes:
        o, rng = self.options, self._random
        if rng.random() < o.damaged_share:
            index = rng.randrange(len(frame))
            frame = frame[:index] + bytes([frame[index] ^ rng.randint(1, 255)]) + frame[index + 1 :]
        if rng.random() < o.cut_share:
            start = rng.randrange(len(frame))
            frame = frame[:start] + frame[start + rng.randint(1, 8) :]
        return frame

    def _send(self, now_ns: int) -> int:
        """Send what is due; return when the next byte is (far away where there is none)."""
        s = self._state
        while s.outgoing and s.master >= 0:
            out = s.outgoing[0]
            if out.step_ns:
                due = min(len(out.data), 1 + (now_ns - out.due_ns) // out.step_ns) if now_ns >= out.due_ns else 0
            else:
                due = len(out.data) if now_ns >= out.due_ns else 0
            if due > out.sent:
                with contextlib.suppress(BlockingIOError):  # nobody reads: a real line loses these bytes as well
                    os.write(s.master, out.data[out.sent : due])
                out.sent = due
            if out.sent < len(out.data):
                return out.due_ns + out.sent * out.step_ns
            s.outgoing.popleft()
            if out.frame is not None:
                number, sampled_ns, counts, intact = out.frame
                sent = SentFrame(number, sampled_ns, time.monotonic_ns(), counts, intact)
                self.frames.append(sent)
                if self.on_frame is not None:
                    self.on_frame(sent)
        return now_ns + _REST_NS

    # Receiving -------------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        s = self._state
        try:
            data = os.read(s.master, 4096)
        except BlockingIOError:
            return
        if self._silent or time.monotonic_ns() < s.boot_ns:
            return
        if s.streaming:  # only the stop sequence is listened to
            for byte in data:
                s.stop_bytes = s.stop_bytes + 1 if byte == 0xFF else 0
                if s.stop_bytes >= _STOP_BYTES:
                    s.streaming = False
                    s.stop_bytes = 0
                    s.outgoing.clear()
            return
        now = time.monotonic_ns()
        if now - s.received_ns > _PAUSE_NS:  # a pause ends a request, also one that never became whole
            s.received.clear()
        s.received_ns = now
        s.received += data
        while s.received:
            size = request_size(s.received)
            if size is None:
                del s.received[:1]
            elif len(s.received) < size:
                return
            elif crc16(s.received[: size - 2]) != int.from_bytes(s.received[size - 2 : size], "little"):
                del s.received[:1]
            else:
                request = bytes(s.received[:size])
                del s.received[:size]
                self._answer(request)

    def _answer(self, request: bytes) -> None:
        s = self._state
        body, start_stream = answer(request, registers(self.options, self._read_wrench(time.monotonic_ns())))
        begin = time.monotonic_ns() + int(self.options.answer_delay_s * 1e9)
        s.outgoing.append(_Outgoing(begin, ft.BYTE_NS if self.options.paced else 0, body))
        if start_stream and self.options.stream_works:
            s.streaming = True
            s.stop_bytes = 0
            s.next_frame_ns = begin + len(body) * ft.BYTE_NS


def _make_link(link: Path, target: str) -> None:
    """Put a link to ``target`` at ``link``, in the place of a link that may be left there."""
    if not link.parent.is_dir():
        raise EmulatorError(f"{link}: the folder {link.parent} does not exist; make it, or choose another link")
    if link.exists() and not link.is_symlink():
        raise EmulatorError(f"{link}: exists and is no link; remove it, or choose another link")
    staging = link.with_name(f".{link.name}.{os.getpid()}")
    staging.unlink(missing_ok=True)
    staging.symlink_to(target)
    staging.replace(link)
