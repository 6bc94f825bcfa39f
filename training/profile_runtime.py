"""The runtimes that a table can be measured on: what each multiplies, its versions, and how its engine is opened.

Engines are those of the robot (:func:`dcqfa_ros.runtime.engines.open_engine`), so what is timed is what runs there.
What could not be executed by the authors is noted in the table (``RuntimeFacts.caveat``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dcqfa_ros.devices.detect import Device
from dcqfa_ros.runtime.engine import Engine
from dcqfa_ros.runtime.engines import (
    ONNXRUNTIME,
    OPENVINO,
    RUNTIMES,
    distribution_version,
    open_engine,
    runtime_facts,
)
from dcqfa_ros.runtime.errors import EngineError
from training.lut import StoredBits
from training.profile_graphs import FLOAT, FP8, HALF, INTEGER, INTEGER_A4
from training.subnet import Precision

FP8_CAPABILITY = (8, 9)
IntegerWeights = Callable[[bytes, str], set[str]]


@dataclass(frozen=True, slots=True)
class Form:
    """What a runtime makes of a precision.

    Attributes:
        executed: as in ``training.profile_graphs``.
        stored_bits: of a weight.
        narrow: executed instead where a layer's activations have fewer than 8 bits; None for the same.
    """

    executed: str
    stored_bits: StoredBits
    narrow: str | None = None

    def of(self, activation_bits: int) -> str:
        """What is executed for a layer."""
        return self.narrow if self.narrow is not None and activation_bits < 8 else self.executed


@dataclass(frozen=True, slots=True)
class ProfiledRuntime:
    """One runtime on this device.

    Attributes:
        name: as in bundles and records.
        on_gpu: executes on the CUDA device.
        versions: of the packages that decide how fast it is; ``driver`` is the GPU's.
        forms: what is executed for each precision.
        opens: engine from (role -> canonical ONNX, threads).
        integer_weights: reads from the graph that the runtime executes which weights it multiplies as integers; None
            where the runtime cannot tell.
        notes: what a reader of the table should know.
    """

    name: str
    on_gpu: bool
    versions: Mapping[str, str]
    forms: Mapping[Precision, Form]
    opens: Callable[[Mapping[str, bytes], int], Engine]
    integer_weights: IntegerWeights | None
    notes: tuple[str, ...]

    def open(self, files: Mapping[str, bytes], threads: int) -> Engine:
        """Open an engine of the three graphs.

        Raises:
            EngineError: the runtime cannot load them.
        """
        return self.opens(files, threads)


_INTEGERS = Form(INTEGER, 8, INTEGER_A4)
_CPU_FORMS = {
    Precision.INT: _INTEGERS,
    Precision.FP32: Form(FLOAT, 32),
    Precision.FP16: Form(FLOAT, 32),
    Precision.FP8: Form(FLOAT, 32),
}
_FOUR_BITS = (
    "4 bits execute in 8-bit containers: weights take the same time and memory as 8 bits; activations are clipped "
    f"before they are rounded, which takes time of its own, so blocks with them are timed as {INTEGER_A4}"
)
_CPU_NOTES = {
    ONNXRUNTIME: (
        _FOUR_BITS,
        "fp16 and fp8 execute as float32 (a CPU has no kernels for them); the time to round their inputs is left out",
    ),
    OPENVINO: (
        _FOUR_BITS,
        "fp16 executes as float32; fp8 is refused by this engine, its rows are those of float32",
    ),
}


def profiled_runtime(name: str, device: Device) -> ProfiledRuntime:
    """Describe a runtime on this computer.

    Args:
        name: one of :data:`dcqfa_ros.runtime.engines.RUNTIMES`.
        device: this computer.

    Raises:
        EngineError: the runtime is unknown, its package is missing (the message says what to install), or it needs a
            CUDA device and there is none.
    """
    facts = runtime_facts(name)
    found = {package: v for package in facts.distributions if (v := distribution_version(package)) is not None}
    if not found:
        raise EngineError(f"runtime {name}: the Python package {facts.package} is not installed: {facts.install}")
    versions = dict([next(iter(found.items()))]) | {"numpy": distribution_version("numpy") or "unknown"}
    on_gpu = facts.runs_on == "gpu"
    forms: Mapping[Precision, Form] = _CPU_FORMS
    notes: tuple[str, ...] = _CPU_NOTES.get(name, ())
    if on_gpu:
        if device.gpu is None:
            raise EngineError(
                f"runtime {name}: no CUDA device on this computer ({device.name}); measure on a computer with one, "
                "choose onnxruntime or openvino, or model a device with --model"
            )
        if device.gpu.driver is not None:
            versions["driver"] = device.gpu.driver
        fp8 = device.gpu.compute_capability >= FP8_CAPABILITY
        forms = {
            Precision.INT: _INTEGERS,
            Precision.FP32: Form(FLOAT, 32),
            Precision.FP16: Form(HALF, 16),
            Precision.FP8: Form(FP8, 8) if fp8 else Form(HALF, 16),
        }
        notes = (_FOUR_BITS, "which kernels multiply integers was not read back from the engine")
        if not fp8:
            major, minor = device.gpu.compute_capability
            notes += (f"compute capability {major}.{minor} has no fp8: its rows are those of float16",)
    if facts.caveat:
        notes += (f"{name}: {facts.caveat}",)

    def opens(files: Mapping[str, bytes], threads: int) -> Engine:
        return open_engine(name, files, threads=threads, name="profile")

    return ProfiledRuntime(name, on_gpu, versions, forms, opens, _integer_weights(name), notes)


def runtime_names() -> tuple[str, ...]:
    """Names of all runtimes, the default first."""
    return tuple(RUNTIMES)


def _integer_weights(name: str) -> IntegerWeights | None:
    module = {ONNXRUNTIME: "training.export.executed", OPENVINO: "dcqfa_ros.runtime.openvino_engine"}.get(name)
    if module is None:
        return None
    found: IntegerWeights = importlib.import_module(module).integer_weights
    return found
