"""Memory that an engine takes, measured in a process of its own: ``python -m training.profile_memory FOLDER``.

Within one process freed memory would be used again and the next network would seem to need none. So every network is
opened in a fresh process, after a small one of the same kind has loaded the libraries.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.engine import ROLES, Engine
from dcqfa_ros.runtime.engines import open_engine
from dcqfa_ros.runtime.huge_pages import keep_heap_together, use_huge_pages

_SECONDS = 1800.0  # engines on GPUs may have to be built
Inputs = Mapping[str, NDArray[np.float32]]
Variant = tuple[Mapping[str, bytes], Inputs]


class MeasurementError(UserError, RuntimeError):
    """The process that measures memory failed; the message holds its last line."""


def engine_growth(runtime: str, threads: int, small: Variant, variant: Variant, on_gpu: bool = False) -> int:
    """Bytes by which memory in use grows when a fresh process opens a variant and runs each of its graphs.

    Args:
        runtime: name of the runtime.
        threads: of one operator.
        small: files and inputs (``observation``, ``noisy``) of a small network of the same kind, opened before.
        variant: of the network in question; its bytes are read before and not counted.
        on_gpu: count the CUDA device's memory (NVML's figure for the whole device, so nothing else may run there)
            where it has its own, and the system's where they share it.

    Raises:
        MeasurementError: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="dcqfa-memory-") as text:
        folder = Path(text)
        for label, (files, inputs) in (("small", small), ("variant", variant)):
            for role in ROLES:
                (folder / f"{label}.{role}").write_bytes(files[role])
            np.savez(folder / f"{label}.npz", observation=inputs["observation"], noisy=inputs["noisy"])
        (folder / "request.json").write_text(json.dumps([runtime, threads, on_gpu]), encoding="utf-8")
        command = [sys.executable, "-m", "training.profile_memory", text]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"{runtime}: a network was not opened within {_SECONDS:.0f} s") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise MeasurementError(f"{runtime}: the memory of a network could not be measured: {said[-1]}")
    return int(done.stdout.split()[-1])


def resident_growth(build: Callable[[], object], used: Callable[[], int] | None = None) -> int:
    """Bytes by which memory in use grows while the result of ``build`` is held, at least 0.

    What ``build`` takes and gives back is not counted, but libraries that it loads for the first time are.

    Args:
        build: makes what is to be measured.
        used: tells memory in use; by default this process' resident memory.
    """
    used = used or resident_bytes
    _release_freed_memory()
    before = used()
    held = build()
    _release_freed_memory()
    growth = used() - before
    del held
    return max(0, growth)


def resident_bytes() -> int:
    """Memory of this process that is resident, in bytes."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def device_bytes() -> int:
    """Memory in use on the first CUDA device, or of the system where the device has none of its own (Jetson)."""
    with contextlib.suppress(ImportError):
        import pynvml

        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
        except pynvml.NVMLError:
            pass
        finally:
            pynvml.nvmlShutdown()
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return found["MemTotal"] - found["MemAvailable"]


def _release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _measure(folder: Path) -> int:
    runtime, threads, on_gpu = json.loads((folder / "request.json").read_text(encoding="utf-8"))

    def read(label: str) -> tuple[dict[str, bytes], dict[str, NDArray[np.float32]]]:
        with np.load(folder / f"{label}.npz") as inputs:
            return {role: (folder / f"{label}.{role}").read_bytes() for role in ROLES}, dict(inputs)

    def opened(files: Mapping[str, bytes], inputs: Inputs) -> Engine:
        engine = open_engine(runtime, files, threads=threads, name="profile")
        observation_kv = engine.observation_kv(inputs["observation"])
        timestep_kv = engine.timestep_kv(np.zeros(1, np.int64))
        for _ in range(2):
            engine.denoise(inputs["noisy"], timestep_kv, observation_kv)
        use_huge_pages()  # the robot's worker process has them from the start
        return engine

    keep_heap_together()  # as the robot's worker process does
    (small, small_inputs), (files, inputs) = read("small"), read("variant")
    held = opened(small, small_inputs)
    growth = resident_growth(lambda: opened(files, inputs), device_bytes if on_gpu else None)
    held.close()
    return growth


if __name__ == "__main__":
    print(_measure(Path(sys.argv[1])))
