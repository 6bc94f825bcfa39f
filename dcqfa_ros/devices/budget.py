"""Upper limits for one variant: time of a chunk, memory of its worker and on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.devices.detect import Device
from dcqfa_ros.errors import UserError

_FREE_SHARE = 0.5
"""Of the free memory a variant may take half, so that a swap can hold the old and the new one."""


class BudgetError(UserError, ValueError):
    """A budget, rate, margin or step count that makes no sense; names the value and what is expected."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper limits for one variant.

    Attributes:
        latency_ms: time of one chunk, milliseconds.
        memory_bytes: memory of its worker; None where the free memory is unknown.
        latency_reason: where the time limit comes from.
        memory_reason: where the memory limit comes from.
        period_ms: one control period. A chunk is computed when the last action of the one before has been executed and
            its first action is due one period later, so the arm holds still for what a chunk takes beyond that.
        gpu_memory_bytes: memory on a GPU with memory of its own; None where there is none or it is unknown.
    """

    latency_ms: float
    memory_bytes: int | None
    latency_reason: str
    memory_reason: str
    period_ms: float
    gpu_memory_bytes: int | None = None


def budget_for(
    spec: BundleSpec, device: Device, control_rate: float = 0.0, latency_ms: float = 0.0, memory_mb: float = 0.0
) -> Budget:
    """Return the limits; 0 derives one.

    Args:
        spec: the bundle.
        device: where it runs.
        control_rate: actions per second; 0: the bundle's.
        latency_ms: time one chunk may take; 0: the time its executed actions take, beyond which a policy computes for
            longer than it acts.
        memory_mb: MiB its worker may take; 0: half of the free memory.

    Raises:
        BudgetError: a value is negative or not finite.
    """
    for name, value in (("control_rate", control_rate), ("latency_ms", latency_ms), ("memory_mb", memory_mb)):
        if not 0.0 <= value < float("inf"):
            raise BudgetError(f"{name}: expected 0 (derive it) or more, got {value}")
    rate = control_rate or spec.action.rate_hz
    executed = spec.action.executed
    if latency_ms:
        latency, latency_reason = latency_ms, "given"
    else:
        latency, latency_reason = 1e3 * executed / rate, f"{executed} executed actions at {rate:g} Hz"
    free = device.memory_available_bytes
    if memory_mb:
        memory, memory_reason = int(memory_mb * 2**20), "given"
    elif free:
        memory, memory_reason = int(free * _FREE_SHARE), "half of the free memory"
    else:
        memory, memory_reason = None, "the free memory is unknown"
    return Budget(latency, memory, latency_reason, memory_reason, 1e3 / rate, _gpu_memory(device))


def _gpu_memory(device: Device) -> int | None:
    gpu = device.gpu
    if gpu is None or gpu.memory_bytes is None:
        return None
    free = gpu.memory_bytes if gpu.memory_available_bytes is None else gpu.memory_available_bytes
    return int(free * _FREE_SHARE)
