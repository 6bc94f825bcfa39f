"""``dcqfa emulate`` as a process of its own."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcqfa_ros.cli import main
from dcqfa_ros.drivers.arm_protocol import ArmReadiness
from dcqfa_ros.drivers.inovo import InovoArm

PATIENCE_S = 60.0


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        process.kill()
        process.communicate()


def start(processes: list[subprocess.Popen[str]], *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Start the command and return it with what it says once it runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dcqfa_ros.cli", "emulate", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, bufsize=1,
    )  # fmt: skip
    processes.append(process)
    assert process.stdout is not None
    said, deadline = "", time.monotonic() + PATIENCE_S
    while "until Ctrl-C" not in said:
        assert time.monotonic() < deadline and process.poll() is None, said
        if select.select([process.stdout], [], [], 0.5)[0]:
            said += os.read(process.stdout.fileno(), 4096).decode()
    return process, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_arm_can_be_connected_to_and_ends_on_a_signal(
    processes: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    process, said = start(processes, "inovo", "--port", "0", "--ready", "--variant", "medium")
    port = int(re.search(r"ws://127\.0\.0\.1:(\d+)", said).group(1))  # type: ignore[union-attr]
    arm = InovoArm("127.0.0.1", port, variant="medium", connect_timeout_s=PATIENCE_S)
    arm.connect()
    assert arm.state().readiness is ArmReadiness.READY
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 0
    arm.close()


def test_a_cell_has_arm_and_sensor_behind_a_link_that_goes_with_it(
    processes: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    link = tmp_path / "ft300s"
    process, said = start(processes, "cell", "--port", "0", "--ft300s-link", str(link), "--contact-height", "0.3")
    assert str(link) in said and "ws://" in said
    assert link.exists()
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0
    assert not link.is_symlink()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "--port: expected 0 to 65535"),
        (["--time-scale", "-1"], "--time-scale"),
        (["--tool-z", "9"], "--tool-z"),
        (["--latency-ms", "nan"], "--latency-ms"),
        (["--contact-height", "inf"], "--contact-height: expected -10 to 10, got inf"),
        (["--host", "192.0.2.1", "--port", "0"], "cannot listen on 192.0.2.1"),
    ],
)
def test_what_cannot_be_is_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emulate", "inovo", *arguments]) == 2
    assert words in capsys.readouterr().err
