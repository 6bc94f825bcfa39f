"""How GPUs are now, through NVML (Python package nvidia-ml-py): temperature, throttling, free memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NO_PACKAGE = "no figures of the GPU: the Python package nvidia-ml-py is not installed"

THROTTLE_REASONS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
"""Bits of ``nvmlDeviceGetCurrentClocksThrottleReasons`` that are not of the user's own making (nvml.h)."""


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """One GPU; ``limit_c`` is where it slows down, ``throttling`` empty where it does not; None: it does not say."""

    name: str
    temperature_c: float | None
    limit_c: float | None
    throttling: tuple[str, ...] | None
    memory_available_bytes: int | None


class NvmlProbe:
    """Keeps NVML open between looks, because opening it takes long; a driver without the package is told as absent."""

    def __init__(self, nvml: Any = None, driver: Path = Path("/proc/driver/nvidia/version")) -> None:
        """Open NVML where it is.

        Args:
            nvml: module to use instead of ``pynvml``; for tests.
            driver: exists where an NVIDIA driver is loaded.
        """
        self._nvml, self._absent = nvml, ""
        if nvml is None:
            try:
                import pynvml
            except ImportError:
                self._absent = _NO_PACKAGE if driver.exists() else ""
                return
            self._nvml = pynvml
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            self._nvml = None  # the package without a driver: a computer without such a GPU
            self._absent = f"no figures of the GPU: NVML does not start ({error})" if driver.exists() else ""

    def __call__(self) -> tuple[Sequence[GpuHealth], Sequence[str]]:
        """Return what is known of GPUs, and what is not."""
        nvml = self._nvml
        if nvml is None:
            return (), (self._absent,) if self._absent else ()
        try:
            return tuple(_gpu(nvml, i) for i in range(nvml.nvmlDeviceGetCount())), ()
        except nvml.NVMLError as error:
            return (), (f"no figures of the GPU: NVML failed ({error})",)

    def close(self) -> None:
        """Shut NVML down. May be called twice."""
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError as error:
                self._absent = f"no figures of the GPU: NVML failed ({error})"


def _gpu(nvml: Any, index: int) -> GpuHealth:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    temperature = _ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
    limit = _ask(nvml, nvml.nvmlDeviceGetTemperatureThreshold, handle, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
    # Renamed in NVML 12: which of the two names there is depends on the package's version.
    named = (f"nvmlDeviceGetCurrentClocks{what}Reasons" for what in ("Throttle", "Event"))
    reasons_of = next((getattr(nvml, name) for name in named if hasattr(nvml, name)), None)
    bits = None if reasons_of is None else _ask(nvml, reasons_of, handle)
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    reasons = None if bits is None else tuple(what for bit, what in THROTTLE_REASONS.items() if bits & bit)
    return GpuHealth(
        text,
        None if temperature is None else float(temperature),
        None if limit is None else float(limit),
        reasons,
        None if memory is None else int(memory.free),
    )


def _ask(nvml: Any, function: Any, *arguments: Any) -> Any:
    """Return an answer, None where this GPU has none to this question."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None
