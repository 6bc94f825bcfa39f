"""Synchronisation of observation keys into the history a policy reads, without ROS.

A *frame* holds one value per key, all with the same stamp (within a tolerance). The policy reads the newest
``history`` frames; at the start of an episode the first frame is repeated, as in training.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import ObservationSpec
from dcqfa_ros.runtime.errors import PolicyError

KEPT = 64  # frames, and partly filled frames, kept while keys arrive in any order


@dataclass(frozen=True, slots=True)
class Frame:
    """One complete time step: stamp (ns) and an array per key."""

    stamp_ns: int
    values: Mapping[str, NDArray[Any]]


class ObservationSynchronizer:
    """Collects values per key and yields the history of complete frames, in order of their stamps. Thread-safe."""

    def __init__(self, specs: Mapping[str, ObservationSpec], tolerance_ns: int = 0) -> None:
        """Set the keys (from the bundle) and how far stamps of one frame may lie apart."""
        self.specs = dict(specs)
        self.tolerance_ns = tolerance_ns
        self.history = max(spec.history for spec in self.specs.values())
        self.dropped = 0
        self._condition = threading.Condition()
        self._pending: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()
        self._frames: deque[Frame] = deque(maxlen=KEPT)
        self._start_ns: int | None = None
        self._arrivals: dict[str, int] = {}
        self._stamps: dict[str, int] = {}

    def begin(self, start_ns: int) -> None:
        """Begin an episode: frames stamped before ``start_ns`` are never used again."""
        with self._condition:
            self._start_ns = start_ns
            self._condition.notify_all()

    def end(self) -> None:
        """End the episode: ``wait_for`` yields nothing until the next ``begin``."""
        with self._condition:
            self._start_ns = None
            self._condition.notify_all()

    def add(self, key: str, stamp_ns: int, value: NDArray[Any], arrival_ns: int) -> None:
        """Add one value, in the bundle's units.

        Raises:
            PolicyError: unknown key, wrong shape, or NaN or infinity; nothing is stored.
        """
        spec = self.specs.get(key)
        if spec is None:
            raise PolicyError(f"observation {key!r} is not one of {', '.join(self.specs)}")
        if tuple(value.shape) != spec.shape:
            raise PolicyError(f"observation {key!r} has shape {tuple(value.shape)}, expected {spec.shape}")
        if not np.isfinite(value).all():
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
            raise PolicyError(f"observation {key!r} holds {value[index]} at index {index}")
        with self._condition:
            self._arrivals[key], self._stamps[key] = arrival_ns, stamp_ns
            newest = self._frames[-1].stamp_ns if self._frames else None
            if newest == stamp_ns:
                return  # the same time step, measured again
            slot = self._slot(stamp_ns)
            parts = self._pending.setdefault(slot, {})
            parts[key] = value.astype(spec.dtype, copy=False)
            if len(parts) == len(self.specs):
                del self._pending[slot]
                self._complete(Frame(slot, parts))
            while len(self._pending) > KEPT:
                self._pending.popitem(last=False)
                self.dropped += 1

    def _slot(self, stamp_ns: int) -> int:
        if stamp_ns in self._pending or not self.tolerance_ns:
            return stamp_ns
        near = [s for s in self._pending if abs(s - stamp_ns) <= self.tolerance_ns]
        return min(near, key=lambda s: abs(s - stamp_ns)) if near else stamp_ns

    def _complete(self, frame: Frame) -> None:
        if self._frames and frame.stamp_ns < self._frames[-1].stamp_ns:
            self._frames.clear()  # the source's clock began anew
        self._frames.append(frame)
        self._condition.notify_all()

    def wait_for(self, due_ns: int, timeout_s: float) -> list[Frame] | None:
        """The history that ends at the newest frame, once one of this episode is stamped ``due_ns`` or later.

        Returns:
            ``history`` frames, oldest first (the episode's first frame repeated where there are fewer), or None when
            none came within ``timeout_s`` seconds or no episode is under way.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self._ready(due_ns), timeout_s):
                return None
            frames = [f for f in self._frames if f.stamp_ns >= (self._start_ns or 0)]
            window = frames[-self.history :]
            return [window[0]] * (self.history - len(window)) + window

    def _ready(self, due_ns: int) -> bool:
        start = self._start_ns
        return bool(self._frames) and start is not None and self._frames[-1].stamp_ns >= max(due_ns, start)

    def ages_ms(self, now_ns: int, used_ns: int | None = None) -> dict[str, float | None]:
        """Age per key in milliseconds; None where nothing has come.

        Args:
            now_ns: monotonic time.
            used_ns: stamp of the frame that is about to be used. Its age is the monotonic age of what came last plus by
                how much its stamp lies behind the newest stamp of any key; without it, only the former is told.
        """
        with self._condition:
            behind = max(0, max(self._stamps.values(), default=0) - used_ns) if used_ns is not None else 0
            return {
                key: (now_ns - self._arrivals[key] + behind) / 1e6 if key in self._arrivals else None
                for key in self.specs
            }


def stack_history(frames: list[Frame], specs: Mapping[str, ObservationSpec]) -> dict[str, NDArray[Any]]:
    """Batch-1 observation per key, shape (1, history, *shape), from frames oldest first."""
    return {
        key: np.stack([frame.values[key] for frame in frames[-spec.history :]])[None] for key, spec in specs.items()
    }
