"""What is told of an exchange of variants, and which variant computed which part of an episode."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from dcqfa_ros.runtime.chunking import Method
from dcqfa_ros.runtime.engines import ONNXRUNTIME
from dcqfa_ros.runtime.parity import Parity
from dcqfa_ros.runtime.variant_targets import Target


class Shortage(str, Enum):
    """What becomes of an exchange whose two variants do not fit in memory together."""

    REFUSE = "refuse"
    STOP = "stop"  # publish nothing, close the old one, load the new one, go on


class Outcome(str, Enum):
    """How an exchange ended."""

    SWITCHED = "switched"
    FAILED = "failed"
    SUPERSEDED = "superseded"  # a newer request, or the end of the policy, came before it was done


@dataclass(frozen=True, slots=True)
class SwapResult:
    """Outcome of one exchange.

    Attributes:
        swap_id: number of the exchange, from 1, in the order of the requests.
        requested: variant that was asked for (``BUNDLE:VARIANT`` for another bundle's).
        active: variant that runs afterwards ("" when none does).
        ok: whether the requested one runs.
        reason: why not.
        load_ms: time the exchange took, milliseconds.
        runtime: runtime that was asked for.
        engine: ``<runtime>/<variant>`` that runs afterwards ("" when none does).
        previous: the same before.
        outcome: switched, failed or superseded.
        gap_ms: time for which no chunk could be begun, milliseconds: microseconds where both fit in memory together.
        held: whether the old variant had to go before the new one was loaded.
        time: UTC time of the end, ISO 8601.
        parity: what the comparison of the new engine with a known one found.
        peak_bytes: largest resident memory of the new worker while it was loaded, 0 where it is unknown.
    """

    swap_id: int
    requested: str
    active: str
    ok: bool
    reason: str
    load_ms: float
    runtime: str = ONNXRUNTIME
    engine: str = ""
    previous: str = ""
    outcome: Outcome = Outcome.SWITCHED
    gap_ms: float = 0.0
    held: bool = False
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="milliseconds"))
    parity: Parity = field(default_factory=Parity)
    peak_bytes: int = 0

    def values(self) -> dict[str, str]:
        """Return the exchange as diagnostics report it; the keys are the attributes, times in milliseconds."""
        return {
            "swap_id": str(self.swap_id),
            "requested": self.requested,
            "active": self.active,
            "runtime": self.runtime,
            "engine": self.engine,
            "previous": self.previous,
            "outcome": self.outcome.value,
            "reason": self.reason,
            "load_ms": f"{self.load_ms:.1f}",
            "gap_ms": f"{self.gap_ms:.3f}",
            "held": str(self.held).lower(),
            "time": self.time,
            "parity_rms": "" if self.parity.rms is None else f"{self.parity.rms:.4g}",
            "parity_allowed": "" if self.parity.allowed is None else f"{self.parity.allowed:.4g}",
            "parity_against": self.parity.against,
            "peak_mb": str(self.peak_bytes >> 20) if self.peak_bytes else "",
        }


@dataclass(frozen=True, slots=True)
class HostOptions:
    """How variants are loaded; asked for at every exchange, so that parameters count from the next one on.

    Attributes:
        memory_limit: bytes a worker may take, 0 for any.
        start_timeout_s: time a worker may take until it is ready; 0: the runtime's own.
        shortage: what to do where two variants do not fit in memory together.
        reserve: bytes of memory to leave free.
        free_memory: bytes that programs can still take, 0 where that is unknown.
        needed_memory: estimate for a variant that was never loaded here: bytes at the peak.
        python: interpreter of the workers, empty for this one's.
        chunking: what a worker is warm for when it takes over.
    """

    memory_limit: int = 0
    start_timeout_s: float = 0.0
    shortage: Shortage = Shortage.REFUSE
    reserve: int = 0
    free_memory: Callable[[], int] = lambda: 0
    needed_memory: Callable[[Target], int] = lambda _: 0
    python: str = ""
    chunking: Method = Method.SYNCHRONOUS


class ComputedBy:
    """Which engine computed which chunks of the present episode. Written by one thread, read by any."""

    def __init__(self) -> None:
        """Know no chunk."""
        self._parts: tuple[tuple[int, str], ...] = ()

    def note(self, chunk: int, engine: str) -> None:
        """Note that ``engine`` computed chunk number ``chunk``; chunk 0 begins an episode."""
        parts = () if chunk == 0 else self._parts
        if not parts or parts[-1][1] != engine:
            self._parts = (*parts, (chunk, engine))

    @property
    def last(self) -> str:
        """Engine that computed the last chunk, empty where there is none."""
        parts = self._parts
        return parts[-1][1] if parts else ""

    def text(self) -> str:
        """Return the parts as JSON: ``[[first chunk, "<runtime>/<variant>"], ...]``."""
        return json.dumps(self._parts)

    @staticmethod
    def parse(text: str) -> tuple[tuple[int, str], ...]:
        """Read what :meth:`text` wrote.

        Raises:
            ValueError: it is something else.
        """
        parts: Any = json.loads(text)
        try:
            return tuple((int(first), str(engine)) for first, engine in parts)
        except TypeError as error:
            raise ValueError(f"expected [[first chunk, engine], ...], got {text!r}") from error
