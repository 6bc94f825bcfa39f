"""The emulated FT 300-S as others see it: another Modbus implementation, a shell, a program that reads frames."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import minimalmodbus
import pytest
import serial

from dcqfa_ros.drivers.ft300s_protocol import FRAME_BYTES, FRAME_NS, HEADER, STOP_SEQUENCE, decode_frame, stream_request
from dcqfa_ros.sim.ft300s import EmulatorError, FT300SEmulator, FT300SOptions
from dcqfa_ros.sim.ft300s_cli import add_arguments, run

PATIENCE_S = 10.0


@pytest.fixture
def sensor() -> Iterator[FT300SEmulator]:
    with FT300SEmulator(FT300SOptions(wrench=(1.0, -2.0, 3.0, 0.1, -0.2, 0.3), noise=0.0)) as emulator:
        yield emulator


def read_for(port: serial.Serial, seconds: float) -> bytes:
    data, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        data += port.read(4096)
    return data


def read_until(port: serial.Serial, count: int) -> bytes:
    data, end = b"", time.monotonic() + PATIENCE_S
    while len(data) < count and time.monotonic() < end:
        data += port.read(4096)
    return data


def test_its_registers_are_what_minimalmodbus_reads(sensor: FT300SEmulator) -> None:
    instrument = minimalmodbus.Instrument(sensor.port, 9)
    instrument.serial.baudrate = 19200
    instrument.serial.timeout = 2.0
    try:
        wrench = instrument.read_registers(180, 6)
        assert [v - 0x10000 if v > 0x7FFF else v for v in wrench] == [100, -200, 300, 100, -200, 300]
        assert instrument.read_registers(190, 3) == [0, 0, 1000]
        assert instrument.read_string(500, 2)[:3] == "FTS"
        assert instrument.read_registers(510, 4) == [0x4654, 0x5300, 4711, 0]
        assert instrument.read_register(514) == 2024
        with pytest.raises(minimalmodbus.IllegalRequestError, match="illegal data address"):
            instrument.read_registers(186, 3)
        with pytest.raises(minimalmodbus.IllegalRequestError):
            instrument.write_registers(180, [1])
        instrument.write_registers(410, [0x0200])
        assert sensor.streaming
    finally:
        instrument.serial.close()


def test_it_streams_until_fifty_times_ff_and_hears_nothing_else_meanwhile(sensor: FT300SEmulator) -> None:
    with serial.Serial(sensor.port, 19200, timeout=0.02) as port:
        port.write(stream_request())
        data = read_until(port, 8 + 5 * FRAME_BYTES)[8:]
        assert data.startswith(HEADER)
        assert decode_frame(data[:FRAME_BYTES]) == (100, -200, 300, 100, -200, 300)
        port.write(stream_request())
        port.write(STOP_SEQUENCE[:49] + b"\x00" + STOP_SEQUENCE[:49])
        assert read_for(port, 0.2).count(HEADER) >= 3, "forty-nine are not enough"
        port.write(b"\x00" + STOP_SEQUENCE)
        end = time.monotonic() + PATIENCE_S
        while sensor.streaming and time.monotonic() < end:
            port.read(4096)
        assert not sensor.streaming
        read_for(port, 0.05)
        assert read_for(port, 0.1) == b""


def test_paced_bytes_take_their_time_on_the_wire() -> None:
    with (
        FT300SEmulator(FT300SOptions(paced=True, boot_streaming=True)) as sensor,
        serial.Serial(sensor.port, 19200, timeout=PATIENCE_S) as port,
    ):
        spreads = []
        for _ in range(10):
            port.read_until(HEADER)
            first = time.monotonic_ns()
            port.read(FRAME_BYTES - len(HEADER))
            spreads.append(time.monotonic_ns() - first)
        assert max(spreads) > 0.5 * FRAME_NS, "the bytes behind the header come later"
        times = [(f.last_byte_ns - f.sampled_ns) / FRAME_NS for f in sensor.frames]
        assert min(times) > 0.99, "no frame's last byte leaves before its time on the wire is over"


def test_a_step_of_the_load_is_in_the_next_frame_and_every_frame_is_recorded(sensor: FT300SEmulator) -> None:
    with serial.Serial(sensor.port, 19200, timeout=0.02) as port:
        port.write(stream_request())
        read_until(port, 8 + 2 * FRAME_BYTES)
        before = time.monotonic_ns()
        sensor.set_load((0.0, 0.0, 50.0, 0.0, 0.0, 0.0))
        read_until(port, 20 * FRAME_BYTES)
    later = [f for f in sensor.frames if f.sampled_ns > before + 1_000_000]
    assert later
    assert all(f.counts == (0, 0, 5000, 0, 0, 0) and f.intact for f in later)
    assert [f.number for f in sensor.frames] == list(range(len(sensor.frames)))


def test_unplugging_takes_the_link_away_and_plugging_brings_it_back(tmp_path: Path) -> None:
    link = tmp_path / "ft300s"
    link.symlink_to("/dev/pts/nothing")  # left by a process that was killed
    with FT300SEmulator(FT300SOptions(link=link)) as sensor:
        first = link.resolve()
        assert first.exists()
        with serial.Serial(sensor.port, 19200, timeout=1.0) as port:
            sensor.unplug()
            assert not link.is_symlink()
            assert not sensor.plugged
            with pytest.raises((serial.SerialException, OSError)):
                port.read(1)
            sensor.plug()
        assert link.resolve().exists()
        with serial.Serial(sensor.port, 19200, timeout=PATIENCE_S) as port:
            port.write(stream_request())
            assert len(port.read(8)) == 8
    assert not link.is_symlink()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate_hz": 200.0}, "rate_hz: expected 1 to 100, got 200"),
        ({"noise": -1.0}, "noise: expected 0 or more, got -1"),
        ({"cut_share": 1.5}, "cut_share: expected 0 to 1, got 1.5"),
        ({"wrench": (0.0, float("nan"), 0.0, 0.0, 0.0, 0.0)}, "wrench: expected six finite numbers"),
        ({"wrench": (1.0,)}, "wrench: expected six finite numbers"),
        ({"firmware": "new"}, "expected a firmware like"),
    ],
)
def test_what_no_sensor_is_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EmulatorError, match=words):
        FT300SOptions(**options)


def test_a_link_that_cannot_be_made_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for link, words in ((tmp_path / "file", "exists and is no link"), (tmp_path / "no/where", "does not exist")):
        with pytest.raises(EmulatorError, match=words):
            FT300SEmulator(FT300SOptions(link=link)).start()
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(EmulatorError, match=r"does not run; call start\(\) first"):
        FT300SEmulator().unplug()


def test_a_plug_that_cannot_go_in_is_refused_and_the_sensor_lives_on(tmp_path: Path) -> None:
    folder = tmp_path / "by-id"
    folder.mkdir()
    with FT300SEmulator(FT300SOptions(link=folder / "ft300s")) as sensor:
        sensor.unplug()
        folder.rmdir()
        with pytest.raises(EmulatorError, match="by-id does not exist"):
            sensor.plug()
        folder.mkdir()
        sensor.plug()
        assert sensor.plugged and (folder / "ft300s").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_source_that_fails_is_told_and_nobody_waits_for_ever() -> None:
    with FT300SEmulator(FT300SOptions(boot_streaming=True), source=lambda _: [float("inf")] * 6) as sensor:
        end = time.monotonic() + PATIENCE_S
        while sensor.failure is None:
            assert time.monotonic() < end, "the failure"
            time.sleep(0.01)
        with pytest.raises(EmulatorError, match="has ended: wrench: expected six finite numbers"):
            sensor.unplug()


class Process:
    """The emulator as a process, spoken to in lines."""

    def __init__(self, *arguments: str) -> None:
        code = (
            "import argparse; from dcqfa_ros.sim.ft300s_cli import add_arguments, run; p = argparse.ArgumentParser(); "
            "add_arguments(p); raise SystemExit(run(p.parse_args()))"
        )
        command = [sys.executable, "-c", code, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.hear()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 2 * PATIENCE_S)[0], "no line"
        return json.loads(self.process.stdout.readline())

    def say(self, text: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self.hear()


def test_as_a_process_it_obeys_lines_and_logs_frames(tmp_path: Path) -> None:
    link, log = tmp_path / "ft300s", tmp_path / "frames.jsonl"
    p = Process("--link", str(link), "--boot-streaming", "--noise", "0", "--log", str(log))
    try:
        assert p.ready["port"] == str(link)
        assert p.say("load 0 0 40 0 0 0")["done"] == "load"
        with serial.Serial(str(link), 19200, timeout=0.02) as port:
            read_until(port, 10 * FRAME_BYTES)
        assert p.say("unplug")["done"] == "unplug"
        assert not link.is_symlink()
        assert p.say("plug")["done"] == "plug"
        assert link.resolve().exists()
        for line, words in (
            ("load 1 2", "expected one of: load FX"),
            ("load a b c d e f", "load: could not convert"),
            ("inject xyz", "inject: "),
            ("dance", "dance: expected one of"),
            ('load "', "expected one of: load FX"),
        ):
            assert words in p.say(line)["error"]
        p.process.send_signal(signal.SIGTERM)
        assert p.process.wait(PATIENCE_S) == 0
    finally:
        p.process.kill()
        p.process.communicate()
    frames = [json.loads(line) for line in log.read_text().splitlines()]
    assert frames[-1]["counts"] == [0, 0, 4000, 0, 0, 0]
    assert frames[-1]["last_byte_ns"] - frames[-1]["sampled_ns"] >= FRAME_NS
    assert not link.is_symlink()


def test_its_help_tells_the_commands_and_a_bad_log_is_refused(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert "unplug, plug" in parser.format_help()
    with pytest.raises(EmulatorError, match="cannot be written"):
        run(parser.parse_args(["--log", str(tmp_path / "no/file")]))
    assert os.listdir(tmp_path) == []  # noqa: PTH208
