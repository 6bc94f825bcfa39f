"""Which runtimes run on a device now, and how each executes a precision there.

A precision is executed as it is or in other bits, and the latter is said (:mod:`dcqfa_ros.devices.precisions`); one
that is not executed is refused by name. Nothing here imports a runtime: versions come from package metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.devices import modelled
from dcqfa_ros.devices.detect import Device, Gpu
from dcqfa_ros.devices.precisions import (
    PRECISIONS,
    Execution,
    on_onnxruntime,
    on_openvino,
    on_tensorrt,
    on_torch_cuda,
    rtx_refusal,
)
from dcqfa_ros.runtime.capability import GPU_CAPABILITY, dotted
from dcqfa_ros.runtime.engines import (
    ONNXRUNTIME,
    OPENVINO,
    RUNTIMES,
    TENSORRT,
    TENSORRT_RTX,
    TORCH_CUDA,
    RuntimeFacts,
    installed_version,
    torch_without_cuda,
    version_refusal,
)

_CPU_ONLY_BUILD = "+cpu"


class Executes(Protocol):
    """How a runtime executes some bits on a device."""

    def __call__(self, bits: Bits, reduced: bool = False) -> Execution:
        """Return what it makes of ``bits``; ``reduced``: in a variant some layer of which is below FP32."""
        ...


@dataclass(frozen=True, slots=True)
class Runtime:
    """One runtime on one device.

    Attributes:
        name: as bundles write it in ``executed`` and ``LatencyRecord.runtime``.
        version: of the installed package, None where it is not installed.
        runs_on: ``cpu`` or ``gpu``.
        unavailable: why no variant can run on it now, or None.
        caveat: what was never checked about it, or empty.
        time_source: where the modelled times come from.
        executes: bits, and whether the variant reduces any layer -> how they are executed here.
        relative_time: executed bits -> modelled time of one layer, FP32 on ONNX Runtime = 1.
    """

    name: str
    version: str | None
    runs_on: Literal["cpu", "gpu"]
    unavailable: str | None
    caveat: str
    time_source: str
    executes: Executes
    relative_time: Callable[[Bits], float]

    @property
    def title(self) -> str:
        """Name and version, as latency records write them."""
        return f"{self.name} {self.version or '(not installed)'}"

    def refuses(self, bits: Bits) -> str | None:
        """Return why some bits are not executed here, or None."""
        execution = self.executes(bits)
        return execution.note if execution.bits is None else None

    def precisions(self) -> dict[str, str]:
        """Return precision name -> ``yes``, ``as <precision>: <why>``, or why it is refused."""
        return {name: self._answer(bits) for name, bits in PRECISIONS.items()}

    def executed_precisions(self) -> tuple[str, ...]:
        """Return the names of the precisions that run here, in whatever bits."""
        return tuple(name for name, bits in PRECISIONS.items() if self.executes(bits).bits is not None)

    def _answer(self, bits: Bits) -> str:
        execution = self.executes(bits)
        if execution.bits is None:
            return execution.note
        if execution.bits == bits:
            return "yes"
        name = next(known for known, other in PRECISIONS.items() if other == execution.bits)
        return f"as {name}: {execution.note}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "version": self.version,
            "runs_on": self.runs_on,
            "unavailable": self.unavailable,
            "caveat": self.caveat,
            "executes": list(self.executed_precisions()),
            "precisions": self.precisions(),
            "modelled_time": {
                name: self.relative_time(execution.bits)
                for name, bits in PRECISIONS.items()
                if (execution := self.executes(bits)).bits is not None
            },
            "time_source": self.time_source,
            "memory_source": modelled.MODELS[self.name].memory_source,
        }


def runtimes(
    device: Device,
    version: Callable[[str], str | None] | None = None,
    without_cuda: Callable[[], bool] = torch_without_cuda,
) -> tuple[Runtime, ...]:
    """Return every runtime of this software as it is on ``device``, in the order in which equal ones are preferred.

    Args:
        device: what was detected.
        version: distribution -> installed version or None; for tests.
        without_cuda: whether the installed torch is a build without CUDA; for tests.
    """
    return tuple(
        _runtime(facts, device, installed_version(facts, version), without_cuda) for facts in RUNTIMES.values()
    )


def _runtime(facts: RuntimeFacts, device: Device, version: str | None, without_cuda: Callable[[], bool]) -> Runtime:
    return Runtime(
        facts.name,
        version,
        facts.runs_on,
        _unavailable(facts, device, version, without_cuda),
        facts.caveat,
        modelled.MODELS[facts.name].source,
        _executes(facts.name, device),
        partial(modelled.relative_time, facts.name, processor=device.processor),
    )


def _executes(name: str, device: Device) -> Executes:
    if name == ONNXRUNTIME:
        return partial(on_onnxruntime, processor=device.processor)
    if name == OPENVINO:
        return partial(on_openvino, processor=device.processor)
    if device.gpu is None:
        return _without_gpu
    capability = device.gpu.compute_capability
    if name == TORCH_CUDA:
        return partial(on_torch_cuda, capability=capability)
    return partial(on_tensorrt, capability=capability, rtx=name == TENSORRT_RTX)


def _without_gpu(bits: Bits, reduced: bool = False) -> Execution:  # noqa: ARG001 - one signature
    return Execution(None, "needs a CUDA device")


def _unavailable(
    facts: RuntimeFacts, device: Device, version: str | None, without_cuda: Callable[[], bool]
) -> str | None:
    if facts.runs_on == "gpu":
        if device.gpu is None:
            return "needs a CUDA device, and none was found"
        refusal = _gpu_refusal(facts.name, device.gpu)
        if refusal:
            return refusal
    if version is None:
        return f"the Python package {facts.distributions[0]} is not installed: {facts.install}"
    if facts.name == TORCH_CUDA and (version.endswith(_CPU_ONLY_BUILD) or without_cuda()):
        return f"torch {version} is a build without CUDA: {facts.install}"
    return version_refusal(facts, version)


def _gpu_refusal(name: str, gpu: Gpu) -> str | None:
    if name == TENSORRT_RTX:
        return rtx_refusal(gpu.compute_capability)
    if gpu.compute_capability < GPU_CAPABILITY:
        title = "TensorRT" if name == TENSORRT else "the torch engine"
        return (
            f"{title} needs compute capability {dotted(GPU_CAPABILITY)}, this GPU has {dotted(gpu.compute_capability)}"
        )
    return None
