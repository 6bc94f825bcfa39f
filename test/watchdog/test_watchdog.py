"""The real watchdog process: trips when an armed process is killed or stopped, and says when it could not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros.watchdog.address import Address, AddressError
from dcqfa_ros.watchdog.client import WatchdogClient
from test.watchdog.controller import Controller

WAIT_S = 20.0


def wait_for(condition: Any, what: str) -> Any:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"not within {WAIT_S:g} s: {what}")


class Process:
    """A Python process whose output is read from a file."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=subprocess.STDOUT)

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def events(self, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [event for event in found if event["watchdog"] == name]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()


class Bench:
    """A controller, the watchdog, and processes that beat."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"unix:{folder}/w.sock"
        self.controller = Controller()
        self.processes: list[Process] = []
        self.watchdog = self.start("-m", "dcqfa_ros.watchdog", "--url", self.controller.url, "--listen", self.address)
        wait_for(lambda: self.watchdog.events("connected"), "watchdog connected")

    def start(self, *arguments: str) -> Process:
        process = Process(self.folder / f"{len(self.processes)}.log", *arguments)
        self.processes.append(process)
        return process

    def beating(self) -> Process:
        process = self.start(str(Path(__file__).with_name("beating.py")), self.address)
        wait_for(lambda: "ready" in process.lines, "ready")
        time.sleep(0.1)  # some armed beats
        return process

    def close(self) -> None:
        for process in reversed(self.processes):
            process.end()
        self.controller.__exit__()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_killing_or_stopping_an_armed_process_trips_the_safe_stop(bench: Bench, number: signal.Signals) -> None:
    armed = bench.beating()
    assert not bench.controller.trips
    at = time.monotonic()
    armed.process.send_signal(number)
    wait_for(lambda: bench.controller.trips, "trip")
    assert bench.controller.trips[0] - at >= 0.08, "not before the time-out"
    wait_for(lambda: bench.watchdog.events("tripped"), "acknowledged")
    assert len(bench.controller.trips) == 1
    if number is signal.SIGSTOP:
        armed.process.send_signal(signal.SIGCONT)
        wait_for(lambda: "tripped" in armed.lines, "the process that woke up is told")


def test_an_orderly_end_trips_nothing(bench: Bench) -> None:
    client = WatchdogClient(bench.address)
    wait_for(lambda: client.beat(False) or client.problem() is None, "ready")
    for armed in (True, True, False):
        client.beat(armed)
    client.close()
    time.sleep(0.3)  # three time-outs
    assert not bench.controller.trips
    bench.watchdog.process.terminate()
    assert bench.watchdog.process.wait(WAIT_S) == 0
    assert not Path(bench.address.removeprefix("unix:")).exists()


def test_a_refused_trip_is_repeated_until_the_controller_obeys(bench: Bench) -> None:
    bench.controller.refusing = True
    bench.beating().process.kill()
    wait_for(lambda: len(bench.controller.trips) >= 3, "three attempts")
    bench.controller.refusing = False
    wait_for(lambda: bench.watchdog.events("tripped"), "acknowledged")


def test_a_trip_is_sent_over_a_new_connection_when_the_old_one_is_lost(bench: Bench) -> None:
    armed = bench.beating()
    armed.process.send_signal(signal.SIGSTOP)
    bench.controller.hang_up()
    wait_for(lambda: bench.controller.trips, "trip over the new connection")
    assert bench.controller.connections >= 2


def test_a_connection_that_answers_no_trip_is_made_anew(bench: Bench) -> None:
    armed = bench.beating()
    bench.controller.hang()
    armed.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: bench.watchdog.events("tripped"), "trip over a new connection")
    assert "after a trip" in bench.watchdog.events("connection lost")[0]["reason"]


def test_a_watchdog_that_is_told_to_end_watches_an_armed_process_on(bench: Bench) -> None:
    armed = bench.beating()
    armed.process.send_signal(signal.SIGSTOP)  # it hangs, and the signal that ends the cell comes at the same time
    bench.watchdog.process.send_signal(signal.SIGINT)
    assert bench.watchdog.process.wait(WAIT_S) == 0
    assert bench.watchdog.events("tripped") and bench.controller.trips


def test_a_watchdog_that_is_told_to_end_leaves_a_healthy_armed_process_in_the_end(bench: Bench) -> None:
    bench.beating()
    bench.watchdog.process.terminate()
    assert bench.watchdog.process.wait(WAIT_S) == 0


def test_a_watchdog_without_controller_says_that_it_could_not_stop_the_arm(bench: Bench) -> None:
    client = WatchdogClient(bench.address)
    wait_for(lambda: client.beat(False) or client.problem() is None, "ready")
    bench.controller.__exit__()
    problem = wait_for(lambda: client.beat(True) or client.problem(), "problem")
    assert "no connection to the controller" in problem
    client.close()


def test_nobody_listening_is_a_problem_by_name(tmp_path: Path) -> None:
    for address in (f"unix:{tmp_path}/none", "udp:127.0.0.1:9"):
        client = WatchdogClient(address)
        client.beat(False)
        client.beat(False)
        assert "has never answered" in str(client.problem()) and address in str(client.problem())
        client.close()


def test_a_second_watchdog_is_refused_and_a_dead_ones_socket_is_taken_over(bench: Bench, tmp_path: Path) -> None:
    second = bench.start("-m", "dcqfa_ros.watchdog", "--url", bench.controller.url, "--listen", bench.address)
    assert second.process.wait(WAIT_S) == 1 and "another process does" in second.log.read_text()
    bench.watchdog.process.kill()
    bench.watchdog.process.wait()
    third = bench.start("-m", "dcqfa_ros.watchdog", "--url", bench.controller.url, "--listen", bench.address)
    wait_for(lambda: third.events("connected"), "taken over")


def test_udp_works_as_well(tmp_path: Path) -> None:
    socket = Address.parse("udp:127.0.0.1:0").listen()
    port = socket.getsockname()[1]
    socket.close()
    with Controller() as controller:
        arguments = ("--url", controller.url, "--listen", f"udp:127.0.0.1:{port}", "--timeout-ms", "60")
        watchdog = Process(tmp_path / "log", "-m", "dcqfa_ros.watchdog", *arguments)
        client = WatchdogClient(f"udp:127.0.0.1:{port}")
        try:
            wait_for(lambda: client.beat(False) or client.problem() is None, "ready")
            client.beat(True)
            wait_for(lambda: controller.trips, "trip")
        finally:
            client.close()
            watchdog.end()


@pytest.mark.parametrize(
    "text", ["", "unix:relative", "udp:192.168.1.7:5", "udp:127.0.0.1:x", "tcp:1", "unix:/" + "a" * 120]
)
def test_addresses_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(AddressError, match="expected unix:/path"):
        Address.parse(text)


def test_the_watchdog_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys, dcqfa_ros.watchdog.__main__, dcqfa_ros.watchdog.client\n"
        "names = {m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(n for n in names - {'dcqfa_ros'} if not n.startswith('_')))"
    )
    out = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert out.stdout.strip() == "[]"
