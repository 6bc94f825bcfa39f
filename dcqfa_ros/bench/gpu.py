"""What timing on a GPU needs beside ``dcqfa_ros.bench.engine.measure``: clocks that have risen, and a note of them.

``measure`` itself is right for a GPU: an engine's methods return host arrays, so they end after the device has, and
wall clock around them is synchronised; contenders take turns. But a GPU lowers its clocks when idle, and few drivers
lock them: a first chunk after a pause is slower, and figures at different clocks cannot be compared.

Never executed on a GPU by the authors.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_JETSON_CLOCKS = ("*.gpu", "*.ga10b")  # Orin names it 17000000.gpu or 17000000.ga10b, by release of Jetson Linux
_SETTLED = 0.02  # share by which the clock may still differ between looks
_LOOK_EVERY_S = 0.5

ClockReader = Callable[[], "tuple[float, float] | None"]


def warm_up(
    runs: Sequence[Callable[[], object]], read: ClockReader, least_s: float = 2.0, most_s: float = 20.0
) -> bool:
    """Run contenders in turn until the GPU's clock has settled.

    Args:
        runs: every contender's chunk.
        read: present and greatest clock, MHz: :func:`gpu_clock`.
        least_s: seconds at least, also where the clock cannot be read.
        most_s: seconds at most.

    Returns:
        Whether the clock was the same, within 2 %, at the last two looks; False where it cannot be read.
    """
    began = looked = time.monotonic()
    before = read()
    while True:
        for run in runs:
            run()
        now = time.monotonic()
        if now - looked < min(_LOOK_EVERY_S, least_s):
            continue
        looked, clock = now, read()
        settled = clock is not None and before is not None and abs(clock[0] - before[0]) <= _SETTLED * before[0]
        before = clock
        if now - began >= least_s and (settled or clock is None or now - began >= most_s):
            return settled


def watch_clock(read: ClockReader) -> Callable[[], str]:
    """Note the GPU's clock now; the function returned says in a sentence what it has been, for a report's notes."""
    before = read()

    def note() -> str:
        after = read()
        if before is None or after is None:
            return "GPU clock unknown: neither NVML (nvidia-ml-py) nor devfreq tells it"
        text = f"GPU clock {before[0]:.0f} MHz before, {after[0]:.0f} MHz after, at most {after[1]:.0f} MHz"
        if abs(after[0] - before[0]) > _SETTLED * before[0]:
            return f"{text}: it changed meanwhile, so latencies are not comparable"
        return text

    return note


def gpu_clock(root: Path = Path("/"), nvml: Any = None) -> tuple[float, float] | None:
    """Present and greatest clock of the first GPU, MHz, or None where nothing tells.

    Args:
        root: below which ``sys`` lies; a Jetson's GPU is a devfreq device.
        nvml: module ``pynvml``; by default the installed one.
    """
    for folder in sorted(f for name in _JETSON_CLOCKS for f in root.glob(f"sys/class/devfreq/{name}")):
        try:
            return tuple(int((folder / f"{n}_freq").read_text()) / 1e6 for n in ("cur", "max"))  # type: ignore[return-value]
        except (OSError, ValueError):
            continue
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        now = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        return float(now), float(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()
