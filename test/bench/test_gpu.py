"""Warming a GPU up and noting its clock: with made-up clocks, because there is no GPU here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dcqfa_ros.bench import gpu
from dcqfa_ros.bench.gpu import gpu_clock, warm_up, watch_clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes 0.1 s with every chunk."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now.seconds)
    return now


def chunk(clock: SimpleNamespace, calls: list[str], name: str) -> Callable[[], None]:
    def run() -> None:
        calls.append(name)
        clock.seconds += 0.1

    return run


def test_warm_up_lasts_until_the_clock_has_settled(clock: SimpleNamespace) -> None:
    calls: list[str] = []
    runs = [chunk(clock, calls, "a"), chunk(clock, calls, "b")]
    rising = lambda: (min(300.0 + 200 * clock.seconds, 1500.0), 1980.0)  # noqa: E731
    assert warm_up(runs, rising)
    assert 6.0 <= clock.seconds < 7.5
    assert calls == ["a", "b"] * (len(calls) // 2)


def test_warm_up_of_a_steady_or_unknown_clock_takes_the_least_time(clock: SimpleNamespace) -> None:
    run = chunk(clock, [], "a")
    assert warm_up([run], lambda: (1500.0, 1980.0))
    assert 2.0 <= clock.seconds < 2.7
    assert not warm_up([run], lambda: None)
    assert clock.seconds < 5.2


def test_warm_up_of_a_clock_that_never_settles_ends(clock: SimpleNamespace) -> None:
    clocks = itertools.cycle([(1000.0, 1980.0), (1500.0, 1980.0)])
    assert not warm_up([chunk(clock, [], "a")], lambda: next(clocks))
    assert 20.0 <= clock.seconds < 21.0


def test_the_note_says_that_the_clock_changed() -> None:
    clocks = iter([(1500.0, 1980.0), (1200.0, 1980.0), (1500.0, 1980.0), (1505.0, 1980.0)])
    read = lambda: next(clocks)  # noqa: E731
    assert watch_clock(read)().endswith("at most 1980 MHz: it changed meanwhile, so latencies are not comparable")
    assert watch_clock(read)() == "GPU clock 1500 MHz before, 1505 MHz after, at most 1980 MHz"
    assert watch_clock(lambda: None)().startswith("GPU clock unknown")


@pytest.mark.parametrize("name", ["17000000.gpu", "17000000.ga10b"])
def test_a_jetson_tells_its_clock_by_devfreq(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "sys/class/devfreq" / name
    folder.mkdir(parents=True)
    (folder / "cur_freq").write_text("612000000\n")
    (folder / "max_freq").write_text("918000000\n")
    assert gpu_clock(tmp_path) == (612.0, 918.0)


def test_other_gpus_tell_it_by_nvml(tmp_path: Path) -> None:
    class NvmlError(Exception):
        pass

    ended: list[bool] = []
    nvml = SimpleNamespace(
        NVMLError=NvmlError,
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: ended.append(True),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1410,
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1980,
    )
    assert gpu_clock(tmp_path, nvml) == (1410.0, 1980.0)

    def fail(*_: object) -> None:
        raise NvmlError

    nvml.nvmlDeviceGetClockInfo = fail
    assert gpu_clock(tmp_path, nvml) is None
    assert ended == [True, True]
    nvml.nvmlInit = fail
    assert gpu_clock(tmp_path, nvml) is None
