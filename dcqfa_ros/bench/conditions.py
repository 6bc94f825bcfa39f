"""What else goes on on this computer while something is measured, and how to keep this process quiet meanwhile."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from dcqfa_ros.runtime.realtime import processor_ticks, scheduling, steal_share


@dataclass(frozen=True, slots=True)
class Conditions:
    """What else went on: load average before, and the share of processor time that the hypervisor took meanwhile."""

    load_1min: float
    steal_share: float
    scheduler: str


def watch_conditions() -> Callable[[], Conditions]:
    """Note load and processor time now; the function returned says what the conditions have been since."""
    before, load = processor_ticks(), os.getloadavg()[0]
    return lambda: Conditions(load, round(steal_share(before, processor_ticks()) or 0.0, 4), _scheduler())


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage now and not again inside the block."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Version of Python and of those of ``packages`` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _scheduler() -> str:
    return f"{scheduling().text}, nice {os.nice(0)}"
