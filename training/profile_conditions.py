"""What decides how fast a computer runs besides its parts: clocks, their governor, and what else runs."""

from __future__ import annotations

import re
from pathlib import Path

_UNKNOWN = "unknown"


def clocks(on_gpu: bool, root: Path = Path("/")) -> str:
    """Describe the clocks of the processor, and of the CUDA device where that executes, for a table's notes.

    Args:
        on_gpu: describe the CUDA device too (by NVML, where nvidia-ml-py is installed).
        root: below which ``proc`` and ``sys`` lie.
    """
    text = f"clocks: {processor_clocks(root)}"
    return f"{text}; {gpu_clocks()}" if on_gpu else text


def processor_clocks(root: Path = Path("/")) -> str:
    """Governor and present frequency of the first core; virtual machines often hide the one, and scale neither."""
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    governor = _read(folder / "scaling_governor") or "governor hidden"
    kilohertz = _read(folder / "scaling_cur_freq")
    if kilohertz.isdigit():
        return f"{governor}, {int(kilohertz) / 1000:.0f} MHz"
    found = re.search(r"^cpu MHz\s*:\s*([\d.]+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return f"{governor}, {float(found[1]):.0f} MHz" if found else f"{governor}, frequency {_UNKNOWN}"


def gpu_clocks() -> str:
    """Present and greatest clock of the first CUDA device, and whether NVML could tell."""
    try:
        import pynvml
    except ImportError:
        return "GPU clocks unknown: nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"GPU clocks unknown: NVML failed ({error})"
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        now = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        most = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
        memory = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)
    except pynvml.NVMLError as error:
        return f"GPU clocks unknown: NVML failed ({error})"
    finally:
        pynvml.nvmlShutdown()
    return f"GPU {now} of at most {most} MHz, its memory {memory} MHz"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
