"""The driver of the FT 300-S on a real pseudo-terminal, with an emulated sensor behind it."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcqfa_ros.drivers.ft300s import FT300S
from dcqfa_ros.drivers.ft300s_line import (
    PortBusyError,
    PortPermissionError,
    SensorOverrangeError,
    SensorReplacedError,
    SensorSilentError,
    SensorUnpluggedError,
    latency_timer_ms,
    latency_warning,
)
from dcqfa_ros.drivers.ft300s_protocol import FRAME_NS, encode_frame
from dcqfa_ros.drivers.ft300s_reader import WrenchReader
from dcqfa_ros.drivers.protocols import DriverError, WrenchSample
from dcqfa_ros.sim.ft300s import FT300SEmulator, FT300SOptions

LOAD = (1.0, -2.0, 30.0, 0.1, -0.2, 0.3)
PATIENCE_S = 10.0


def wait_until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


@pytest.fixture
def emulate(tmp_path: Path) -> Iterator[Callable[..., FT300SEmulator]]:
    made: list[FT300SEmulator] = []

    def make(**options: Any) -> FT300SEmulator:
        given = {"link": tmp_path / "ft300s", "wrench": LOAD, "noise": 0.0, **options}
        made.append(FT300SEmulator(FT300SOptions(**given)))
        made[-1].start()
        return made[-1]

    yield make
    for emulator in made:
        emulator.stop()


def check(sample: WrenchSample) -> None:
    np.testing.assert_allclose([*sample.force, *sample.torque], LOAD)


@pytest.mark.parametrize(
    "options",
    [{}, {"boot_streaming": True}, {"paced": True}, {"boot_streaming": True, "paced": True}],
    ids=["idle", "streaming already", "paced", "streaming already, paced"],
)
def test_it_finds_the_sensor_whatever_it_is_doing_and_streams(
    emulate: Callable[..., FT300SEmulator], options: dict[str, bool]
) -> None:
    emulator = emulate(**options)
    with closing(FT300S(emulator.port, "stream")) as driver:
        driver.connect()
        info = driver.info
        assert info is not None
        assert (info.serial_number, info.production_year, info.firmware) == ("FTS-4711", 2024, "FTS-2.0.1")
        samples = [driver.read(PATIENCE_S) for _ in range(20)]
        check(samples[-1])
        assert [s.number for s in samples] == list(range(20))
        assert not samples[0].force.flags.writeable
        assert not driver.polling
        assert driver.figures.crc_errors == 0
    wait_until(lambda: not emulator.streaming, "the stream is stopped when the driver is closed")


def test_stamps_are_when_the_reading_was_taken_not_when_it_arrived(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate(paced=True, noise=1.0)
    with closing(FT300S(emulator.port)) as driver:
        driver.connect()
        samples = [driver.read(PATIENCE_S) for _ in range(40)]
    sent = {frame.counts: frame.last_byte_ns - FRAME_NS for frame in emulator.frames}
    errors = [
        sample.stamp_ns - sent[tuple(round(v) for v in (*sample.force * 100, *sample.torque * 1000))]  # type: ignore[index]
        for sample in samples
    ]
    assert abs(np.median(errors)) < 5e6, "half of a frame's time on the wire, on a busy machine"


def test_readings_that_wait_are_stamped_a_period_apart(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate()
    with closing(FT300S(emulator.port)) as driver:
        driver.connect()
        first = driver.read(PATIENCE_S)
        count = len(emulator.frames)
        wait_until(lambda: len(emulator.frames) > count + 10, "frames that nobody reads")
        stamps = [driver.read(PATIENCE_S).stamp_ns for _ in range(8)]
        assert stamps[0] > first.stamp_ns
        assert np.all(np.diff(stamps)[2:6] == pytest.approx(10e6, abs=3e6)), "not all at the time of the one read"


def test_a_stream_that_does_not_start_is_replaced_by_polling_and_said(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate(stream_works=False)
    with closing(FT300S(emulator.port, "auto")) as driver:
        driver.connect()
        assert driver.polling
        assert "the stream does not start; readings come by polling at 30 Hz" in driver.warning
        check([driver.read(PATIENCE_S) for _ in range(3)][-1])
    strict = FT300S(emulator.port, "stream")
    with pytest.raises(SensorSilentError, match="stream does not start; set the parameter mode to poll or auto"):
        strict.connect()


def test_polling_on_request_keeps_to_its_rate(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate()
    with closing(FT300S(emulator.port, "poll")) as driver:
        driver.connect()
        stamps = [driver.read(PATIENCE_S).stamp_ns for _ in range(10)]
        assert min(np.diff(stamps)) > 15e6
        assert not emulator.streaming
        assert driver.warning == ""


def test_polling_says_soon_that_nobody_answers(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate()
    with closing(FT300S(emulator.port, "poll")) as driver:
        driver.connect()
        check(driver.read(PATIENCE_S))
        emulator.set_silent(True)
        asked: list[bytes] = []
        driver._line.write = asked.append  # type: ignore[method-assign]
        with pytest.raises(SensorSilentError, match=r"no valid reading within 0\.05 s"):
            driver.read(0.05)
        assert len(asked) == 1, "a request that is not answered is not repeated beyond the time there is"


def test_a_first_reading_after_a_long_wait_is_fresh_and_one_after_a_pause_of_the_reader_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Clock:
        now_ns = 5_000_000_000

        def monotonic_ns(self) -> int:
            return self.now_ns

        def monotonic(self) -> float:
            return self.now_ns * 1e-9

    class Line:
        """Brings a frame whenever it is asked, after a wait of 2 s; what it brought before a pause is stale."""

        is_open = True
        discarded = 0

        def read(self, timeout_s: float) -> bytes:
            clock.now_ns += 2_000_000_000
            return encode_frame((1, 2, 3, 4, 5, 6))

        def discard(self) -> None:
            self.discarded += 1

        def close(self) -> None:
            pass

    clock, line = Clock(), Line()
    monkeypatch.setattr("dcqfa_ros.drivers.ft300s.time", clock)
    driver = FT300S("/dev/none", "stream")
    driver._line = line  # type: ignore[assignment]
    driver._read_ns = clock.now_ns
    assert [driver.read(PATIENCE_S).number for _ in range(3)] == [0, 1, 2]
    assert line.discarded == 0, "the reader waited for them"
    clock.now_ns += 1_500_000_000  # the reader does something else
    began_ns = clock.now_ns
    sample = driver.read(PATIENCE_S)
    assert line.discarded == 1
    assert sample.stamp_ns > began_ns + 2_000_000_000, "the stale frame was not taken for a reading"


def test_damaged_and_cut_frames_and_noise_are_counted_and_never_read(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate(damaged_share=0.2, cut_share=0.2, noise_share=0.2, seed=5)
    with closing(FT300S(emulator.port, "auto")) as driver:
        driver.connect()
        for _ in range(60):
            check(driver.read(PATIENCE_S))
        figures = driver.figures
    assert figures.crc_errors > 0
    assert figures.resyncs > 0
    assert figures.discarded > 0
    assert figures.suspect


def test_overrange_is_an_error_of_its_own_that_goes_with_the_load(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate()
    with closing(FT300S(emulator.port)) as driver:
        driver.connect()
        emulator.set_load((0.0, 400.0, 0.0, 0.0, 0.0, -31.0))

        def read_on() -> SensorOverrangeError | None:
            try:
                driver.read(PATIENCE_S)
            except SensorOverrangeError as error:
                return error
            return None

        error: list[Any] = []
        wait_until(lambda: error.append(read_on()) or error[-1], "overrange")
        assert "overrange on Fy, Mz" in str(error[-1])
        assert error[-1].sample.force[1] == pytest.approx(327.67)
        emulator.set_load(LOAD)
        wait_until(lambda: read_on() is None, "readings again")


def test_unplugged_and_silent_are_different_errors(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate()
    driver = FT300S(emulator.port)
    driver.connect()
    emulator.set_silent(True)
    driver.discard()
    with pytest.raises(SensorSilentError, match=r"no valid reading within 0\.05 s"):
        driver.read(0.05)
    emulator.unplug()
    with pytest.raises(SensorUnpluggedError, match="the sensor was unplugged"):
        driver.read(PATIENCE_S)
    driver.close()
    with pytest.raises(SensorUnpluggedError, match="no such serial port; plug the sensor in"):
        driver.connect()
    with pytest.raises(SensorUnpluggedError, match=r"not open; call connect\(\) first"):
        driver.read(0.1)
    emulator.plug()
    with pytest.raises(SensorSilentError, match=r"no answer from Modbus slave 9.*24 V supply"):
        driver.connect()
    emulator.set_silent(False)
    driver.connect()
    check(driver.read(PATIENCE_S))
    driver.close()
    driver.close()


def test_another_sensor_in_its_place_is_refused(emulate: Callable[..., FT300SEmulator], tmp_path: Path) -> None:
    first = emulate()
    driver = FT300S(first.port)
    driver.connect()
    first.stop()
    driver.close()
    emulate(serial_number="FTS-0815")
    with pytest.raises(SensorReplacedError, match="sensor FTS-0815 answers, expected FTS-4711"):
        driver.connect()
    driver.close()


def test_a_port_that_another_program_holds_is_busy(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate()
    with closing(FT300S(emulator.port)) as first, closing(FT300S(emulator.port)) as second:
        first.connect()
        with pytest.raises(PortBusyError, match="held by another program"):
            second.connect()
        check(first.read(PATIENCE_S))


def test_a_port_that_may_not_be_opened_names_the_group(tmp_path: Path) -> None:
    def refuse(port: str) -> Any:
        raise PermissionError(errno.EACCES, "permission denied", port)

    with pytest.raises(PortPermissionError, match="usermod -aG dialout"):
        FT300S("/dev/ttyUSB7", opener=refuse).connect()
    (tmp_path / "file").write_text("no serial port")
    with pytest.raises(DriverError, match="cannot be opened as a serial port"):
        FT300S(str(tmp_path / "file")).connect()


def test_an_unknown_mode_and_an_empty_wait_are_refused(emulate: Callable[..., FT300SEmulator]) -> None:
    with pytest.raises(ValueError, match="mode: expected one of auto, stream, poll, got 'fast'"):
        FT300S("/dev/null", "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout_s: expected a positive number"):
        FT300S("/dev/null").read(0.0)


@pytest.mark.parametrize(("timer", "warned"), [("16\n", True), ("2\n", False), ("1\n", False), (None, False)])
def test_the_adapters_latency_timer_is_read_and_warned_about(
    emulate: Callable[..., FT300SEmulator], tmp_path: Path, timer: str | None, warned: bool
) -> None:
    emulator = emulate()
    name = Path(emulator.port).resolve().name
    if timer is not None:
        folder = tmp_path / "bus/usb-serial/devices" / name
        folder.mkdir(parents=True)
        (folder / "latency_timer").write_text(timer)
    with closing(FT300S(emulator.port, sysfs=tmp_path)) as driver:
        driver.connect()
        assert driver.latency_timer_ms == (None if timer is None else int(timer))
        assert ("latency timer is 16 ms, expected 2 or less" in driver.warning) == warned


def test_a_latency_timer_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert latency_timer_ms("/dev/ttyUSB0", tmp_path) is None
    assert latency_warning("/dev/ttyUSB0", None) == ""


class Reading:
    """A reader on a thread, and what it handed on."""

    def __init__(self, driver: FT300S) -> None:
        self.samples: list[tuple[WrenchSample, str]] = []
        self.events: list[tuple[bool, str]] = []
        self.driver = driver
        self.reader = WrenchReader(
            driver,
            lambda sample, why: self.samples.append((sample, why)),
            lambda good, text: self.events.append((good, text)),
            silence_s=0.3,
            maximum_age_s=1.0,
        )
        self.halt = threading.Event()
        self.thread = threading.Thread(target=self.reader.run, args=(self.halt,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.halt.set()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        self.driver.close()


def test_a_reader_brings_a_lost_sensor_back_and_says_each_once(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate(boot_streaming=True)
    with closing(Reading(FT300S(emulator.port))) as reading:
        wait_until(lambda: len(reading.samples) > 5, "readings")
        for times in (1, 2):
            emulator.unplug()
            wait_until(lambda: reading.reader.outage, "the loss")
            count = len(reading.samples)
            emulator.plug()
            wait_until(lambda count=count: len(reading.samples) > count + 3, "readings again")
            assert reading.reader.reconnects == times
        assert [good for good, _ in reading.events] == [False, True] * 2
        check(reading.samples[-1][0])


def test_a_reader_starts_a_sensor_again_that_lost_its_supply(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate()
    with closing(Reading(FT300S(emulator.port))) as reading:
        wait_until(lambda: len(reading.samples) > 5, "readings")
        emulator.set_silent(True)
        wait_until(lambda: "no answer" in reading.reader.outage, "the loss")
        count = len(reading.samples)
        emulator.set_silent(False)
        wait_until(lambda: len(reading.samples) > count, "readings again, though the port never went")


def test_a_reader_hands_overrange_on_as_such(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate()
    with closing(Reading(FT300S(emulator.port))) as reading:
        emulator.set_load((0.0, 0.0, 310.0, 0.0, 0.0, 0.0))
        wait_until(lambda: reading.samples and reading.samples[-1][1], "overrange")
        assert reading.reader.overrange
        assert reading.reader.outage == ""
        emulator.set_load(LOAD)
        wait_until(lambda: not reading.samples[-1][1] and reading.samples[-1][0].force[2] < 100, "an end of it")
        assert [good for good, _ in reading.events] == [False, True]


def test_bytes_of_another_device_are_no_reading(emulate: Callable[..., FT300SEmulator]) -> None:
    emulator = emulate()
    with closing(FT300S(emulator.port)) as driver:
        driver.connect()
        emulator.inject(encode_frame((1, 2, 3, 4, 5, 6))[:-1] + b"\x00")
        for _ in range(10):
            check(driver.read(PATIENCE_S))
