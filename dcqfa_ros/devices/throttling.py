"""Whether a computer slows itself down, and by what: cooling devices, throttle counters, frequency limits.

Sources: the kernel's documents on sysfs-class-thermal (``cooling_device*``), x86 ``thermal_throttle`` counters and
cpufreq; NVIDIA's Jetson Linux developer guide for over-current events (``soctherm_oc`` in hwmon). A present frequency
below the highest is not counted: processors with nothing to do slow down, too. A *limit* that fell is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dcqfa_ros.devices.sysfs import folders, numbered, read_int, read_text

_SLOWS = re.compile(r"cpufreq|devfreq|throttle|processor|powerclamp|\bgpu|\bcpu", re.IGNORECASE)
"""Types of cooling devices that slow something down that computes: fans, modems and fixed offsets do not."""

_FELL = 0.98  # share of the highest limit seen; limits are rounded to what the clock can do


@dataclass(frozen=True, slots=True)
class Throttling:
    """``told``: whether the device has any source that tells; ``reasons``: what slows it down now, for people."""

    told: bool
    reasons: tuple[str, ...]


class ThrottlingReader:
    """Reads the sources again and again; counters are compared with the look before, limits with the highest seen.

    The highest limit seen is that of the power mode: where this starts on a device that is hot already, it is the
    lowered one, and only the cooling device tells.
    """

    def __init__(self, root: Path) -> None:
        """Look at the counters and limits below ``root`` for the first time."""
        self._root = root
        self._counts = self._read_counts()
        self._highest = self._limits()

    def read(self) -> Throttling:
        """Look now."""
        cooling, counts, limits = self._cooling(), self._read_counts(), self._limits()
        reasons = [f"{name} at {state} of {most}" for name, state, most in cooling if state > 0]
        for name, count in counts.items():
            before = self._counts.get(name, count)
            if count > before:
                reasons.append(f"{name}: {count - before} more")
        self._counts = counts
        fallen = []
        for name, limit in limits.items():
            self._highest[name] = max(limit, self._highest.get(name, 0))
            if limit < _FELL * self._highest[name]:
                fallen.append((limit / self._highest[name], name, limit, self._highest[name]))
        if fallen:
            _, name, limit, highest = min(fallen)
            reasons.append(f"frequency limit of {name} fell to {limit / 1e6:.2f} from {highest / 1e6:.2f} GHz")
        return Throttling(bool(cooling or counts or limits), tuple(reasons))

    def _cooling(self) -> list[tuple[str, int, int]]:
        found = []
        for device in folders(self._root / "sys/class/thermal", "cooling_device"):
            name = read_text(device / "type") or ""
            state, most = read_int(device / "cur_state"), read_int(device / "max_state")
            if _SLOWS.search(name) and "fan" not in name.lower() and state is not None:
                found.append((f"cooling device {name}", state, most or state))
        return found

    def _read_counts(self) -> dict[str, int]:
        """Name -> count of events since boot: thermal throttling on x86, over-current on a Jetson."""
        counts: dict[str, int] = {}
        for cpu in folders(self._root / "sys/devices/system/cpu", "cpu"):
            for kind in ("core", "package"):
                count = read_int(cpu / f"thermal_throttle/{kind}_throttle_count")
                if count is not None:
                    name = f"thermal throttling of a {kind}"
                    counts[name] = max(count, counts.get(name, 0))
        for device in folders(self._root / "sys/class/hwmon", "hwmon"):
            if read_text(device / "name") != "soctherm_oc":
                continue
            for file in sorted(device.glob("oc*_event_cnt"), key=lambda f: numbered(f.name)):
                count = read_int(file)
                # Events that do not throttle are only counted; where it is not said, they are taken to throttle.
                throttles = read_int(device / file.name.replace("_event_cnt", "_throt_en"))
                if count is not None and throttles != 0:
                    counts[f"over-current events oc{numbered(file.name)}"] = count
        return counts

    def _limits(self) -> dict[str, int]:
        """Processors and GPU -> upper frequency limit in kHz; the thermal framework lowers it."""
        limits: dict[str, int] = {}
        for policy in folders(self._root / "sys/devices/system/cpu/cpufreq", "policy"):
            limit = read_int(policy / "scaling_max_freq")
            if limit:
                limits[f"processors {policy.name}"] = limit
        for name in ("17000000.gpu", "17000000.ga10b"):  # Jetson Linux 36 and 35
            hertz = read_int(self._root / "sys/class/devfreq" / name / "max_freq")
            if hertz:
                limits["the GPU"] = hertz // 1000
        return limits
