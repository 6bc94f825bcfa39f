"""What the watch is fed with and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from dcqfa_ros.devices.ladder import Rung


class Action(str, Enum):
    """What to do."""

    STAY = "stay"
    CHEAPER = "cheaper"
    BACK = "back"


class Cause(str, Enum):
    """Why."""

    LATENCY = "latency"
    STARVED = "starved"
    MISSES = "misses"
    TEMPERATURE = "temperature"
    THROTTLING = "throttling"
    MEMORY = "memory"
    RELIEF = "relief"
    NONE = "none"
    BLOCKED = "blocked"


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known at one moment; None: not known.

    Attributes:
        time_s: seconds of a monotonic clock.
        engine: ``<runtime>/<variant>`` that runs, "" where none does or nothing is heard of the policy.
        steps: its denoising steps.
        latencies_ms: of the chunks since the sample before, computed by this engine with these steps.
        pinned: why the policy takes no choice, or "".
        steps_pinned: whether the number of steps is given by hand.
        ticks, missed, starved: counters of the arm's control ticks, of those that began a period late, and of those
            without an action.
        temperature_c, temperature_limit_c: of the sensor closest to its limit.
        throttled: whether the device slows itself down.
        memory_free_bytes, gpu_memory_free_bytes: what can still be taken.
    """

    time_s: float
    engine: str = ""
    steps: int | None = None
    latencies_ms: tuple[float, ...] = ()
    pinned: str = ""
    steps_pinned: bool = False
    ticks: int | None = None
    missed: int | None = None
    starved: int | None = None
    temperature_c: float | None = None
    temperature_limit_c: float | None = None
    throttled: bool | None = None
    memory_free_bytes: int | None = None
    gpu_memory_free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now and why; ``target`` is None for staying. ``figures`` are key-value pairs for diagnostics."""

    action: Action
    target: Rung | None
    cause: Cause
    reason: str
    figures: Mapping[str, str] = field(default_factory=dict)
