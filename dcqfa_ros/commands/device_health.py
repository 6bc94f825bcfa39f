"""The part of ``dcqfa devices`` about how a computer is now: temperatures, throttling, memory, load."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from dcqfa_ros.devices.detect import Device
from dcqfa_ros.devices.health import Health, HealthReader

PERIOD_S = 1.0


def look(root: Path) -> Health:
    """Look once at the computer below ``root``."""
    reader = HealthReader(root)
    try:
        return reader.read()
    finally:
        reader.close()


def describe(health: Health) -> Iterator[str]:
    """Yield the lines of a description."""
    yield f"  health        {one_line(health)}"
    yield from (f"    slowed by   {reason}" for reason in health.throttling)
    yield from (f"    absent      {what}" for what in health.absent)


def one_line(health: Health) -> str:
    """Return the figures that there are, in one line."""
    parts = []
    hottest = health.hottest
    if hottest is not None:
        limit = "" if hottest.limit is None else f", slows down at {hottest.limit:.0f}"
        parts.append(f"{hottest.celsius:.1f} degrees ({hottest.sensor}{limit})")
    if health.throttled is not None:
        parts.append("throttled" if health.throttled else "not throttled")
    if health.cpu_frequency_share is not None:
        parts.append(f"processors at {health.cpu_frequency_share:.0%} of their highest frequency")
    for what, value in (("", health.memory_available_bytes), (" of the GPU", health.gpu_memory_available_bytes)):
        if value is not None:
            parts.append(f"{value >> 20} MiB{what} free")
    if health.load_1min is not None:
        parts.append(f"load {health.load_1min:.2f} on {health.processors or '?'} processors")
    if health.steal_share:
        parts.append(f"{health.steal_share:.1%} stolen")
    if health.cpu_pressure is not None:
        parts.append(f"waiting for a processor {health.cpu_pressure:.0%} of the time")
    return ", ".join(parts) or "nothing is told"


def watch(root: Path, seconds: float, device: Device, as_json: bool, period_s: float = PERIOD_S) -> int:
    """Print the health every ``period_s`` for ``seconds``, or at the end as JSON; returns the exit code."""
    reader = HealthReader(root)
    looks = []
    try:
        begin = before = time.monotonic()
        if not as_json:
            print(f"{device.name} ({device.kind})", flush=True)
        for i in range(1, max(1, round(seconds / period_s)) + 1):
            time.sleep(max(0.0, begin + i * period_s - time.monotonic()))
            now = time.monotonic()
            health, before = reader.read(now - before), now
            looks.append({"time_s": round(now - begin, 3), **health.as_dict()})
            if not as_json:
                reasons = "".join(f"; {reason}" for reason in health.throttling)
                print(f"{now - begin:7.1f} s  {one_line(health)}{reasons}", flush=True)
    finally:
        reader.close()
    if as_json:
        document = {"device": device.fingerprint, "seconds": seconds, "period_s": period_s, "health": looks}
        print(json.dumps(document, indent=2))
    return 0
