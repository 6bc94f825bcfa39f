"""The runtimes that can execute a variant, by name, and the one place that opens an engine of any of them.

Nothing is imported before it is needed: neither an engine's module nor the package it stands on. What a runtime is
called here is what bundles write in ``executed`` and latency records in ``runtime``.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from dcqfa_ros.runtime.engine import Engine
from dcqfa_ros.runtime.errors import EngineError

ONNXRUNTIME = "onnxruntime"
OPENVINO = "openvino"
TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt_rtx"
TORCH_CUDA = "torch_cuda"
AUTO = "auto"

_SECONDS_TO_LOAD = 60.0
_SECONDS_TO_BUILD = 900.0
_NEVER_EXECUTED = "compiled, never executed by its authors"


@dataclass(frozen=True, slots=True)
class RuntimeFacts:
    """One runtime of this software.

    Attributes:
        name: as in bundles and records.
        runs_on: ``cpu`` or ``gpu``.
        module: Python module of the engine.
        engine: class in it.
        package: Python package the engine stands on.
        distributions: names under which that package may be installed; the first one found tells the version.
        install: what to do where the package is missing.
        start_timeout_s: time a worker may take until it is ready, seconds; a first start may build the engine.
        caveat: what was never checked, empty where the engine has been executed by its authors.
        oldest: the least version, major and minor, that the engine takes; None where none is known to be too old.
    """

    name: str
    runs_on: Literal["cpu", "gpu"]
    module: str
    engine: str
    package: str
    distributions: tuple[str, ...]
    install: str
    start_timeout_s: float = _SECONDS_TO_LOAD
    caveat: str = ""
    oldest: tuple[int, int] | None = None


RUNTIMES: Mapping[str, RuntimeFacts] = {
    facts.name: facts
    for facts in (
        RuntimeFacts(
            ONNXRUNTIME,
            "cpu",
            "dcqfa_ros.runtime.ort_engine",
            "OnnxRuntimeEngine",
            "onnxruntime",
            ("onnxruntime", "onnxruntime-gpu"),
            "pip install onnxruntime",
        ),
        RuntimeFacts(
            OPENVINO,
            "cpu",
            "dcqfa_ros.runtime.openvino_engine",
            "OpenVinoEngine",
            "openvino",
            ("openvino",),
            "pip install --no-deps -r requirements/openvino.txt",
        ),
        RuntimeFacts(
            TENSORRT,
            "gpu",
            "dcqfa_ros.runtime.tensorrt_engine",
            "TensorRtEngine",
            "tensorrt",
            ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
            "on a Jetson install python3-libnvinfer of JetPack 6.1 or later, elsewhere NVIDIA's TensorRT 10.3 or later",
            _SECONDS_TO_BUILD,
            f"{_NEVER_EXECUTED} (graphs are built by TensorRT-RTX, whose interface is nearly the same)",
            (10, 3),
        ),
        RuntimeFacts(
            TENSORRT_RTX,
            "gpu",
            "dcqfa_ros.runtime.tensorrt_engine",
            "TensorRtEngine",
            "tensorrt_rtx_bindings",
            ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx"),
            "pip install --no-deps -r requirements/tensorrt_rtx.txt",
            _SECONDS_TO_BUILD,
            f"{_NEVER_EXECUTED} (engines are built for desktop GPUs on machines without one)",
        ),
        RuntimeFacts(
            TORCH_CUDA,
            "gpu",
            "dcqfa_ros.runtime.torch_engine",
            "TorchCudaEngine",
            "torch",
            ("torch",),
            "install a build of torch with CUDA (pytorch.org/get-started, on a Jetson NVIDIA's wheel for its JetPack)",
            180.0,
            _NEVER_EXECUTED,
        ),
    )
}
"""Runtime by name, in the order in which equal ones are preferred."""


def runtime_facts(runtime: str) -> RuntimeFacts:
    """Return what is known of a runtime.

    Raises:
        EngineError: there is no such runtime; the message lists those there are.
    """
    try:
        return RUNTIMES[runtime]
    except KeyError:
        raise EngineError(f"runtime {runtime!r} is unknown; there are {', '.join(RUNTIMES)}") from None


def installed_version(facts: RuntimeFacts, version: Callable[[str], str | None] | None = None) -> str | None:
    """Return the version of a runtime's package without importing it, or None where it is not installed.

    Args:
        facts: the runtime.
        version: distribution -> version or None; for tests.
    """
    find = version or distribution_version
    return next((found for name in facts.distributions if (found := find(name)) is not None), None)


def distribution_version(name: str) -> str | None:
    """Return the version of an installed Python distribution without importing it, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def version_refusal(facts: RuntimeFacts, version: str) -> str | None:
    """Return why an installed version of a runtime's package is too old, or None."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?", version)
    if facts.oldest is None or numbers is None or (int(numbers[1]), int(numbers[2] or 0)) >= facts.oldest:
        return None
    oldest = ".".join(map(str, facts.oldest))
    return f"expected {facts.package} {oldest} or newer, found {version}: {facts.install}"


def torch_without_cuda() -> bool:
    """Tell, without importing it, whether the installed torch says of itself that it was built without CUDA.

    A build for processors may carry a plain version (PyPI's for ARM and macOS do), but every build writes the CUDA it
    is for to ``torch/version.py``. Where that file cannot be read or does not say, the build may have CUDA.
    """
    try:
        text = Path(str(metadata.distribution("torch").locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError, UnicodeDecodeError):
        return False
    return re.search(r"^cuda\b[^=\n]*=\s*None\s*$", text, re.MULTILINE) is not None


def open_engine(
    runtime: str, files: Mapping[str, bytes], *, threads: int = 1, name: str, cache: Path | None = None
) -> Engine:
    """Open a variant on a runtime.

    Args:
        runtime: one of :data:`RUNTIMES`; never ``auto``, which is the selector's to resolve.
        files: role -> canonical ONNX bytes.
        threads: threads of one operator, at least 1; runtimes on a GPU do not use it.
        name: the variant, for reports.
        cache: folder for engines built on this device, default: the user's; runtimes that build none do not use it.

    Raises:
        EngineError: the runtime is unknown or its package is missing (the message says what to install), or the engine
            cannot load the files.
    """
    facts = runtime_facts(runtime)
    if not _is_present(facts.package):
        raise EngineError(f"runtime {runtime}: the Python package {facts.package} is not installed: {facts.install}")
    try:
        engine_class = getattr(importlib.import_module(facts.module), facts.engine)
    except ImportError as error:
        raise EngineError(f"runtime {runtime}: {facts.module} cannot be imported ({error}): {facts.install}") from error
    engine: Engine = engine_class(files, **_options(facts, threads, name, cache))
    return engine


def _options(facts: RuntimeFacts, threads: int, name: str, cache: Path | None) -> dict[str, Any]:
    if facts.runs_on == "cpu":
        return {"threads": threads, "name": name}
    if facts.name == TORCH_CUDA:
        return {"name": name, "device": "cuda"}
    return {"name": name, "cache": cache, "flavour": facts.name}


def _is_present(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None
