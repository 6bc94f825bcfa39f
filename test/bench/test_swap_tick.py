"""The control tick in a process of its own: what it consumes and tells, what it counts, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dcqfa_ros.bench import swap_tick
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.bench.swap_tick import TickProcess
from dcqfa_ros.runtime.realtime import RealtimeSettings

_PERIOD_NS = 5_000_000
_PATIENCE_S = 20.0
_OWNER = """
import time
from dcqfa_ros.bench.swap_tick import TickProcess
from dcqfa_ros.runtime.realtime import RealtimeSettings
tick = TickProcess(2, 10_000_000, RealtimeSettings(), lambda *_: None)
try:
    tick.start()
    tick.count_anew()
    print(tick.pid, flush=True)
    time.sleep(60)
finally:
    tick.close()
"""


class _Told:
    """A running control tick and what it has told."""

    def __init__(self, priority: int = 0) -> None:
        self.ticks: list[tuple[int, int]] = []
        self.lost: list[str] = []
        self.tick = TickProcess(
            2, _PERIOD_NS, RealtimeSettings(priority), lambda *told: self.ticks.append(told), self.lost.append
        )


@pytest.fixture
def told() -> Iterator[_Told]:
    told = _Told()
    try:
        told.tick.start()
        _until(lambda: len(told.ticks) > 2)
        yield told
    finally:
        told.tick.close()


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "did not come"
        time.sleep(0.002)


def _gone(pid: int) -> bool:
    """Whether a process has ended; nobody may reap one whose parent has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_every_tick_is_told_and_consumes_one_action_of_the_chunk(told) -> None:
    assert {consumed for _, consumed in told.ticks} == {0}
    told.tick.push(0, np.ones((3, 2), np.float32))
    _until(lambda: told.ticks[-1][1] == 3)
    told.tick.push(1, np.ones((4, 2), np.float32))  # two of its actions have been consumed
    _until(lambda: told.ticks[-1][1] == 5)
    told.tick.push(2, np.ones((3, 2), np.float32))  # all of them have
    count = len(told.ticks)
    _until(lambda: len(told.ticks) > count + 3)
    stamps, counts = zip(*told.ticks, strict=True)
    assert [stamp // _PERIOD_NS for stamp in stamps] == list(range(len(stamps)))
    assert [after - before for before, after in pairwise(counts) if after != before] == [1] * 5


def test_it_counts_anew_on_request_and_ticks_without_an_action_are_starved(told) -> None:
    told.tick.count_anew()
    first = len(told.ticks)
    _until(lambda: len(told.ticks) >= first + 4)
    report = told.tick.report()
    assert 4 <= report.starved == report.ticks < len(told.ticks) and report.untold == 0
    assert 0.0 <= report.jitter_p50_ms <= report.jitter_p99_ms <= report.jitter_max_ms
    assert report.scheduler.startswith("SCHED_")


def test_ticks_that_come_late_are_counted(told) -> None:
    told.tick.count_anew()
    before = told.tick.report()
    os.kill(told.tick.pid, signal.SIGSTOP)
    time.sleep(0.1)
    os.kill(told.tick.pid, signal.SIGCONT)
    report = told.tick.report()
    assert report.missed >= before.missed + 10 and report.jitter_max_ms > 50.0
    assert told.tick.missed == report.missed


def test_what_was_not_read_is_lost_and_counted_and_the_tick_goes_on(monkeypatch) -> None:
    monkeypatch.setattr(swap_tick, "_BUFFER", 4096)  # room for a few
    began, room = threading.Event(), threading.Event()

    def block(*_: int) -> None:
        began.set()
        room.wait(_PATIENCE_S)

    tick = TickProcess(2, _PERIOD_NS, RealtimeSettings(), block)
    try:
        tick.start()
        assert began.wait(_PATIENCE_S)
        time.sleep(0.3)  # 60 ticks
        room.set()
        report = tick.report()
        assert 0 < report.untold < report.ticks
    finally:
        room.set()
        tick.close()


def test_its_thread_is_the_only_one_and_no_child_is_left(told) -> None:
    pid = told.tick.pid
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    assert not told.lost
    told.tick.close()
    told.tick.close()
    assert not Path(f"/proc/{pid}").exists() and not told.lost
    with pytest.raises(BenchError, match="started before"):
        told.tick.start()


def test_its_death_is_told_by_name(told) -> None:
    os.kill(told.tick.pid, signal.SIGKILL)
    _until(lambda: bool(told.lost))
    told.tick.push(0, np.ones((1, 2), np.float32))  # tells nothing new
    expected = rf"control tick's process \(pid {told.tick.pid}\) was killed by signal 9 \(SIGKILL\)"
    for question in (told.tick.report, told.tick.count_anew):
        with pytest.raises(BenchError, match=expected):
            question()


def test_a_halted_process_is_ended_too(told) -> None:
    os.kill(told.tick.pid, signal.SIGSTOP)
    told.tick.close()
    assert _gone(told.tick.pid)


def test_a_priority_that_the_system_refuses_is_told() -> None:
    told = _Told(priority=200)  # beyond what any system has
    try:
        told.tick.start()
        with pytest.raises(BenchError, match="realtime_priority 200 refused"):
            told.tick.report()
        _until(lambda: bool(told.lost))
        assert told.lost == [told.lost[0]] and "docs/realtime.md" in told.lost[0]
    finally:
        told.tick.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_its_parent(number) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as owner:
        try:
            assert owner.stdout is not None
            pid = int(owner.stdout.readline())
            assert not _gone(pid)
            os.killpg(owner.pid, number)  # as a terminal does
            owner.wait(_PATIENCE_S)
            _until(lambda: _gone(pid))
        finally:
            owner.kill()
