"""How this computer is now: temperatures, throttling, free memory, load, steal and pressure.

Every file is read below a root folder, so that recorded trees of other devices can stand in for this one. What a device
does not tell is named in ``absent`` and is None: nothing is made up. Sources: the kernel's documents on sysfs-class-
thermal, cpufreq, hwmon, PSI and proc(5); NVIDIA's NVML for GPUs that it describes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcqfa_ros.devices.detect import memory_of
from dcqfa_ros.devices.gpu_health import GpuHealth, NvmlProbe
from dcqfa_ros.devices.sysfs import folders, numbered, read_int, read_text
from dcqfa_ros.devices.throttling import Throttling, ThrottlingReader
from dcqfa_ros.runtime.realtime import processor_ticks, steal_share

_PLAUSIBLE_C = (-40.0, 150.0)  # a zone that is switched off says -256 or so
_SYSTEM_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
"""Names of hwmon devices that measure a processor: desktops often have no thermal zone with trip points."""

GpuProbe = Callable[[], "tuple[Sequence[GpuHealth], Sequence[str]]"]


@dataclass(frozen=True, slots=True)
class Temperature:
    """One sensor, degrees Celsius; ``limit`` is where the device begins to slow down, None where it does not say."""

    sensor: str
    celsius: float
    limit: float | None

    @property
    def margin(self) -> float:
        """Degrees below the limit, infinite without one."""
        return math.inf if self.limit is None else self.limit - self.celsius


@dataclass(frozen=True, slots=True)
class Health:
    """One look at a computer.

    Attributes:
        temperatures: sensors that answer.
        throttled: whether the device slows itself down now, None where nothing tells.
        throttling: by what, for people.
        cpu_frequency_share: present frequency of the processors over their highest, mean; low where they have nothing
            to do.
        memory_available_bytes: what programs can still take within the limits of their control group.
        gpus: what NVML says.
        load_1min: processes that ran or waited to run, mean of a minute.
        processors: logical processors that are switched on.
        steal_share: share of processor time that the hypervisor took since the last look.
        cpu_pressure: share of time for which some process waited for a processor since the last look.
        absent: what this device does not tell.
    """

    temperatures: tuple[Temperature, ...]
    throttled: bool | None
    throttling: tuple[str, ...]
    cpu_frequency_share: float | None
    memory_available_bytes: int | None
    gpus: tuple[GpuHealth, ...]
    load_1min: float | None
    processors: int | None
    steal_share: float | None
    cpu_pressure: float | None
    absent: tuple[str, ...]

    @property
    def hottest(self) -> Temperature | None:
        """The sensor closest to its limit, of those without a limit the hottest; None without sensors."""
        return min(self.temperatures, key=lambda t: (t.margin, -t.celsius), default=None)

    @property
    def gpu_memory_available_bytes(self) -> int | None:
        """Free memory of the first GPU that has its own."""
        return next((g.memory_available_bytes for g in self.gpus if g.memory_available_bytes is not None), None)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def figures(self) -> dict[str, str]:
        """Return key-value pairs for diagnostics; an empty value: the device does not tell."""
        hottest = self.hottest
        memory, gpu_memory = self.memory_available_bytes, self.gpu_memory_available_bytes
        return {
            "temperature_c": "" if hottest is None else f"{hottest.celsius:.1f}",
            "temperature_sensor": "" if hottest is None else hottest.sensor,
            "temperature_limit_c": "" if hottest is None or hottest.limit is None else f"{hottest.limit:.1f}",
            "throttled": "" if self.throttled is None else str(self.throttled).lower(),
            "throttling": "; ".join(self.throttling),
            "cpu_frequency_share": _share(self.cpu_frequency_share),
            "memory_free_mb": "" if memory is None else str(memory >> 20),
            "gpu_memory_free_mb": "" if gpu_memory is None else str(gpu_memory >> 20),
            "load_1min": "" if self.load_1min is None else f"{self.load_1min:.2f}",
            "processors": "" if self.processors is None else str(self.processors),
            "steal_share": _share(self.steal_share),
            "cpu_pressure": _share(self.cpu_pressure),
            "absent": "; ".join(self.absent),
        }


class HealthReader:
    """Looks at a computer again and again; shares and counters are those since the look before."""

    def __init__(self, root: Path = Path("/"), gpus: GpuProbe | None = None) -> None:
        """Take a first look at the counters.

        Args:
            root: ``/``, or a folder with recorded ``proc`` and ``sys``.
            gpus: returns what is known of GPUs and what is not; by default NVML for ``/``, nothing for recorded trees.
        """
        self._root = root
        self._nvml: NvmlProbe | None = None
        if gpus is None and root == Path("/"):
            self._nvml = gpus = NvmlProbe()
        self._gpus: GpuProbe = gpus or (lambda: ((), ()))
        self._throttling = ThrottlingReader(root)
        self._ticks = processor_ticks(self._root / "proc/stat")
        self._waited = self._cpu_waited()

    def close(self) -> None:
        """Let go of NVML. May be called twice."""
        if self._nvml is not None:
            self._nvml.close()

    def read(self, elapsed_s: float | None = None) -> Health:
        """Look now.

        Args:
            elapsed_s: seconds since the look before, for the pressure; None: that of the kernel's last 10 s is told.
        """
        gpus, absent = self._gpus()
        absent = list(absent)
        temperatures = [*self._zones(absent), *self._sensors()]
        temperatures += [Temperature(g.name, g.temperature_c, g.limit_c) for g in gpus if g.temperature_c is not None]
        if not temperatures:
            absent.append("no temperature: neither thermal zones nor sensors")
        throttling = self._throttling.read()
        throttling = Throttling(
            throttling.told or any(g.throttling is not None for g in gpus),
            (*throttling.reasons, *(f"{g.name}: {reason}" for g in gpus for reason in g.throttling or ())),
        )
        if not throttling.told:
            absent.append("no throttling: neither cooling devices nor throttle counters nor frequency limits")
        memory = memory_of(self._root)[1] or None
        if memory is None:
            absent.append("no free memory: /proc/meminfo could not be read")
        frequency = self._frequency_share()
        if frequency is None:
            absent.append("no frequency: the processors have no cpufreq")
        load, steal = self._load(), self._steal()
        if load is None:
            absent.append("no load: /proc/loadavg could not be read")
        pressure = self._pressure(elapsed_s)
        if pressure is None:
            absent.append("no pressure: /proc/pressure/cpu could not be read")
        return Health(
            tuple(temperatures),
            bool(throttling.reasons) if throttling.told else None,
            throttling.reasons,
            frequency,
            memory,
            tuple(gpus),
            load,
            self._processors(),
            steal,
            pressure,
            tuple(absent),
        )

    # temperatures

    def _zones(self, absent: list[str]) -> list[Temperature]:
        found, silent = [], []
        for zone in folders(self._root / "sys/class/thermal", "thermal_zone"):
            name = read_text(zone / "type") or zone.name
            celsius = _plausible(read_int(zone / "temp"))
            if celsius is None:
                silent.append(name)
            else:
                found.append(Temperature(name, celsius, _trip(zone)))
        if silent:
            absent.append(f"no temperature of {', '.join(silent)}: switched off or unreadable")
        return found

    def _sensors(self) -> list[Temperature]:
        """Processor sensors of hwmon, whose ``max`` is where cooling should be at its most."""
        found = []
        for device in folders(self._root / "sys/class/hwmon", "hwmon"):
            name = read_text(device / "name")
            if name not in _SYSTEM_SENSORS:
                continue
            for file in sorted(device.glob("temp*_input"), key=lambda f: numbered(f.name)):
                celsius = _plausible(read_int(file))
                if celsius is not None:
                    stem = file.name.removesuffix("input")
                    label = read_text(device / f"{stem}label") or stem.rstrip("_")
                    limit = _plausible(read_int(device / f"{stem}max"))
                    found.append(Temperature(f"{name} {label}", celsius, limit if limit and limit > 0 else None))
        return found

    # processors

    def _frequency_share(self) -> float | None:
        shares = []
        for policy in folders(self._root / "sys/devices/system/cpu/cpufreq", "policy"):
            now, highest = (read_int(policy / name) for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
            if now is not None and highest:
                shares.append(now / highest)
        return sum(shares) / len(shares) if shares else None

    def _processors(self) -> int | None:
        text = read_text(self._root / "proc/stat") or ""
        return len(re.findall(r"^cpu\d+ ", text, re.MULTILINE)) or None

    def _load(self) -> float | None:
        found = re.match(r"(\d+\.\d+) ", read_text(self._root / "proc/loadavg") or "")
        return float(found[1]) if found else None

    def _steal(self) -> float | None:
        before, self._ticks = self._ticks, processor_ticks(self._root / "proc/stat")
        return steal_share(before, self._ticks)

    def _cpu_waited(self) -> tuple[float, int] | None:
        """Share of the last 10 s and microseconds since boot for which some process waited for a processor."""
        text = read_text(self._root / "proc/pressure/cpu") or ""
        found = re.search(r"^some avg10=(\d+\.\d+) .*total=(\d+)", text, re.MULTILINE)
        return (float(found[1]) / 100.0, int(found[2])) if found else None

    def _pressure(self, elapsed_s: float | None) -> float | None:
        before, self._waited = self._waited, self._cpu_waited()
        if self._waited is None:
            return None
        if before is None or not elapsed_s or elapsed_s <= 0.0:
            return self._waited[0]
        return min(1.0, max(0, self._waited[1] - before[1]) / 1e6 / elapsed_s)


def _plausible(millidegrees: int | None) -> float | None:
    if millidegrees is None or not _PLAUSIBLE_C[0] <= millidegrees / 1e3 <= _PLAUSIBLE_C[1]:
        return None
    return millidegrees / 1e3


def _trip(zone: Path) -> float | None:
    """Lowest trip point above 0 at which the device slows down (``passive``, ``hot``), degrees Celsius."""
    limits = []
    for file in zone.glob("trip_point_*_type"):
        celsius = _plausible(read_int(zone / file.name.replace("_type", "_temp")))
        if read_text(file) in ("passive", "hot") and celsius is not None and celsius > 0.0:
            limits.append(celsius)
    return min(limits, default=None)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
