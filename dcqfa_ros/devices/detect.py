"""Detect this computer: Jetson module, GPU, processor, memory. Reads files only (and NVML where it is installed).

Every file is read below a root folder, so recorded trees of other devices can stand in for this one. Jetson facts: the
model name in the device tree says the family but not the memory; the module number in ``compatible`` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dcqfa_ros.runtime.processor import Processor, processor_of

Kind = Literal["jetson", "gpu", "cpu"]

JETSON_MODULES = {
    "p3767-0000": ("Jetson Orin NX", 16),
    "p3767-0001": ("Jetson Orin NX", 8),
    "p3767-0003": ("Jetson Orin Nano", 8),
    "p3767-0004": ("Jetson Orin Nano", 4),
    "p3767-0005": ("Jetson Orin Nano developer kit", 8),
    "p3701-0004": ("Jetson AGX Orin", 32),
    "p3701-0005": ("Jetson AGX Orin", 64),
}
"""Module number in the device tree -> (name, memory in GB)."""

_ORIN_COMPUTE_CAPABILITY = (8, 7)
_KIB = 1024
_NOT_RECORDED = "the recorded device has an NVIDIA driver, whose GPU no file describes: only NVML does, on the device"
_NO_NVML = "an NVIDIA driver is loaded but the Python package nvidia-ml-py is not installed: the GPU is not described"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device; memory is None where it shares the system's (Jetson), what is available of it where unknown."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int | None
    driver: str | None
    memory_available_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """What was detected.

    Attributes:
        kind: ``jetson``, ``gpu`` (a computer with a CUDA device) or ``cpu``.
        name: for people.
        fingerprint: equal on computers whose latencies are comparable; ``LatencyRecord.device`` holds it.
        processor: the CPU.
        gpu: the first CUDA device, or None.
        l4t: Jetson Linux release such as ``36.4.3``, or None.
        memory_bytes: system memory, 0 where unknown.
        memory_available_bytes: of it, what programs can still take within the limits of their control group, 0 where
            unknown.
        notes: what could not be determined and what follows from it.
    """

    kind: Kind
    name: str
    fingerprint: str
    processor: Processor
    gpu: Gpu | None
    l4t: str | None
    memory_bytes: int
    memory_available_bytes: int
    notes: tuple[str, ...]


GpuProbe = Callable[[], "tuple[Sequence[Gpu], Sequence[str]]"]


def detect(root: Path = Path("/"), gpus: GpuProbe | None = None) -> Device:
    """Describe the computer whose files lie below ``root``.

    Args:
        root: ``/``, or a folder with recorded ``proc`` and ``etc``.
        gpus: returns CUDA devices and notes; by default NVML for ``/``, and for a recorded tree nothing but a note
            where it holds a driver.
    """
    notes: list[str] = []
    processor = processor_of(_read(root, "proc/cpuinfo"))
    if not processor.cores:
        notes.append("the processor is unknown: /proc/cpuinfo could not be read")
    memory, available = memory_of(root)
    if not memory:
        notes.append("the memory size is unknown: /proc/meminfo could not be read")
    model = _read(root, "proc/device-tree/model").strip("\0 \n")
    compatible = _read(root, "proc/device-tree/compatible").split("\0")
    if re.search(r"\bOrin\b", model) or any(c == "nvidia,tegra234" for c in compatible):
        return _jetson(root, model, compatible, processor, memory, available, notes)
    if gpus is None:
        gpus = nvml_gpus if root == Path("/") else lambda: ((), _recorded_driver(root))
    found, gpu_notes = gpus()
    notes.extend(gpu_notes)
    int8 = processor.features[0] if processor.features else "no 8-bit dot product"
    base = f"{processor.architecture} {processor.model}, {processor.cores} cores, {int8}"
    if found:
        gpu = found[0]
        if len(found) > 1:
            notes.append(f"{len(found)} CUDA devices: the first is described")
        name = f"{gpu.name} with {processor.model}"
        return Device("gpu", name, f"{gpu.name} | {base}", processor, gpu, None, memory, available, tuple(notes))
    return Device("cpu", processor.model, base, processor, None, None, memory, available, tuple(notes))


def _jetson(
    root: Path,
    model: str,
    compatible: Sequence[str],
    processor: Processor,
    memory: int,
    available: int,
    notes: list[str],
) -> Device:
    numbers = re.findall(r"p37(?:67|01)-\d{4}", " ".join(compatible))
    known = next((JETSON_MODULES[n] for n in numbers if n in JETSON_MODULES), None)
    if known is not None:
        name = f"{known[0]} {known[1]} GB"
    else:
        name = f"{model or 'Jetson Orin'}, {round(memory / 2**30)} GB"
        notes.append(f"module {', '.join(numbers) or '(no number)'} is not known: its memory is that of /proc/meminfo")
    if model.endswith(" Super"):
        name += " Super"
    release = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _read(root, "etc/nv_tegra_release"))
    l4t = f"{release[1]}.{release[2]}" if release else None
    if l4t is None:
        notes.append("the Jetson Linux release is unknown: /etc/nv_tegra_release could not be read")
    # The power mode caps clocks and cores: latencies of different modes are not comparable.
    mode = re.search(r"\bpmode:(\d+)", _read(root, "var/lib/nvpmodel/status"))
    if mode is None:
        notes.append("the power mode is unknown: /var/lib/nvpmodel/status could not be read")
    gpu = Gpu("Orin (nvgpu)", _ORIN_COMPUTE_CAPABILITY, None, None)
    power = int(mode[1]) if mode else "unknown"
    fingerprint = f"{name}, L4T {l4t or 'unknown'}, {processor.cores} cores, power mode {power}"
    return Device("jetson", name, fingerprint, processor, gpu, l4t, memory, available, tuple(notes))


def _recorded_driver(root: Path) -> tuple[str, ...]:
    return (_NOT_RECORDED,) if _read(root, "proc/driver/nvidia/version") else ()


def nvml_gpus() -> tuple[Sequence[Gpu], Sequence[str]]:
    """Return the CUDA devices NVML knows, and notes. A driver without nvidia-ml-py is noted, never an error."""
    try:
        import pynvml
    except ImportError:
        if Path("/proc/driver/nvidia/version").exists():
            return (), (_NO_NVML,)
        return (), ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), ()  # the package without a driver: a computer without a CUDA device
    try:
        driver = _decoded(pynvml.nvmlSystemGetDriverVersion())
        return tuple(_nvml_gpu(pynvml, i, driver) for i in range(pynvml.nvmlDeviceGetCount())), ()
    except pynvml.NVMLError as error:
        return (), (f"NVML failed ({error}): the GPU is not described",)
    finally:
        pynvml.nvmlShutdown()


def _nvml_gpu(nvml, index: int, driver: str) -> Gpu:  # type: ignore[no-untyped-def]  # nvidia-ml-py has no types
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        figures = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError:
        figures = None  # shared with the system
    memory, free = (None, None) if figures is None else (int(figures.total), int(figures.free))
    return Gpu(_decoded(nvml.nvmlDeviceGetName(handle)), (int(major), int(minor)), memory, driver, free)


def _decoded(text: str | bytes) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def _read(root: Path, name: str) -> str:
    """Return a file's text, empty where it is not there: absence is information here, not an error."""
    try:
        return (root / name).read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def memory_of(root: Path = Path("/")) -> tuple[int, int]:
    """Return the system's memory and what programs can still take of it within the limits of their control group.

    Bytes; 0 where unknown.
    """
    meminfo = _read(root, "proc/meminfo")
    values = {k: int(v) * _KIB for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", meminfo, re.MULTILINE)}
    available, granted = values.get("MemAvailable", 0), _control_group_memory(root)
    if granted is not None:
        available = min(available, granted) if available else granted
    return values.get("MemTotal", 0), available


def _control_group_memory(root: Path) -> int | None:
    """Return the bytes this process' control group (version 2) and those above it still grant, None without a limit."""
    own = re.search(r"^0::/(.*)$", _read(root, "proc/self/cgroup"), re.MULTILINE)
    names = [name for name in own[1].split("/") if name not in ("", "..")] if own else []
    left = []
    for depth in range(len(names) + 1):
        folder = "/".join(["sys/fs/cgroup", *names[:depth]])
        limit, used = (_read(root, f"{folder}/memory.{kind}").strip() for kind in ("max", "current"))
        if re.fullmatch(r"[0-9]+", limit) and re.fullmatch(r"[0-9]+", used):  # "max": no limit
            # Pages of files that nobody has read for a while count as used, and go as soon as memory is asked for.
            idle = re.search(r"^inactive_file (\d+)$", _read(root, f"{folder}/memory.stat"), re.MULTILINE)
            needed = max(0, int(used) - (int(idle[1]) if idle else 0))
            left.append(max(1, int(limit) - needed))  # 0 would mean unknown
    return min(left, default=None)
