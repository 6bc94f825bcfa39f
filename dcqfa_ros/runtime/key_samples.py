"""Samples of one observation key, and which of them belong to a frame at a given stamp; without ROS."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import ObservationSpec
from dcqfa_ros.runtime.errors import PolicyError

PICTURES = ("image", "depth")


@dataclass(slots=True)
class Sample:
    """One value of a key; of a window also all of its rows, stamped as the last of them."""

    stamp_ns: int
    value: NDArray[Any]


@dataclass
class KeySamples:
    """The newest samples of one key, by stamp, and what a frame takes of them.

    Attributes:
        name: of the key.
        spec: what the bundle says of it.
        tolerance_ns: how far a sample may lie from a frame's stamp.
        samples: rising stamps.
        arrival_ns: when the last one came, ``time.monotonic_ns``; None where none has.
        stamp_ns: of the one that came last.
    """

    name: str
    spec: ObservationSpec
    tolerance_ns: int
    samples: deque[Sample] = field(default_factory=deque)
    arrival_ns: int | None = None
    stamp_ns: int = 0

    @property
    def is_window(self) -> bool:
        """Whether a frame takes the last rows of it instead of one."""
        return self.spec.type == "wrench"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of what is added: of a window one row."""
        return self.spec.shape[1:] if self.is_window else self.spec.shape

    def prepared(self, value: NDArray[Any]) -> NDArray[Any]:
        """Check one sample and give it the key's dtype; pictures stay views of their messages.

        Raises:
            PolicyError: wrong shape or dtype, or NaN or infinity.
        """
        name, spec = self.name, self.spec
        if tuple(value.shape) != self.sample_shape:
            raise PolicyError(f"observation {name!r} has shape {tuple(value.shape)}, expected {self.sample_shape}")
        if spec.type in PICTURES:
            if value.dtype != spec.dtype:
                raise PolicyError(f"observation {name!r} is of {value.dtype}, expected {spec.dtype}")
            return value
        if not np.isfinite(value).all():
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
            raise PolicyError(f"observation {name!r} holds {value[index]} at index {index}")
        if spec.type == "wrench":
            value = np.clip(value, np.negative(spec.clip), spec.clip)
        return value.astype(spec.dtype, copy=False)

    def nearest(self, stamp_ns: int) -> Sample | None:
        """The sample whose stamp is nearest, of two as near the older one; None where none has come."""
        found = None
        for sample in reversed(self.samples):  # by stamp; what is asked for is among the newest
            if found is not None and abs(sample.stamp_ns - stamp_ns) > abs(found.stamp_ns - stamp_ns):
                break
            found = sample
        return found

    def keep(self, sample: Sample) -> None:
        """Put a sample where its stamp belongs; one of the same stamp is replaced."""
        later: list[Sample] = []
        while self.samples and self.samples[-1].stamp_ns > sample.stamp_ns:
            later.append(self.samples.pop())
        if self.samples and self.samples[-1].stamp_ns == sample.stamp_ns:
            self.samples.pop()
        self.samples.append(sample)
        self.samples.extend(reversed(later))

    def at(self, stamp_ns: int) -> tuple[Sample | None, str]:
        """Sample for a frame at ``stamp_ns``; or None, and what is missing."""
        if self.is_window:
            return self._window(stamp_ns)
        limit, found = self.tolerance_ns, self.nearest(stamp_ns)
        if found is None:
            return None, "has not come yet"
        apart = abs(found.stamp_ns - stamp_ns)
        if apart <= limit:
            return found, ""
        return None, f"is {apart / 1e6:.1f} ms from it at the nearest, its tolerance is {limit / 1e6:g} ms"

    def has_before(self, stamp_ns: int) -> bool:
        """Whether a frame at ``stamp_ns`` could have been made of a sample that is not newer."""
        return any(0 <= stamp_ns - sample.stamp_ns <= self.tolerance_ns for sample in self.samples)

    def _window(self, stamp_ns: int) -> tuple[Sample | None, str]:
        count, limit = self.spec.shape[0], self.tolerance_ns
        before = (s for s in reversed(self.samples) if s.stamp_ns <= stamp_ns)
        chosen = list(islice(before, count))[::-1]
        if len(chosen) < count:
            return None, f"has {len(chosen)} of {count} samples before it"
        behind = stamp_ns - chosen[-1].stamp_ns
        if behind > limit:
            return None, f"ends {behind / 1e6:.1f} ms before it, its tolerance is {limit / 1e6:g} ms"
        gap = max((b.stamp_ns - a.stamp_ns for a, b in pairwise(chosen)), default=0)
        if gap > 1e9 / self.spec.rate_hz + limit:
            return None, f"has a gap of {gap / 1e6:.1f} ms, expected a sample every {1e3 / self.spec.rate_hz:g} ms"
        return Sample(chosen[-1].stamp_ns, stack_rows([s.value for s in chosen])), ""


def stack_rows(values: list[NDArray[Any]]) -> NDArray[Any]:
    """``np.stack`` of arrays of one shape, with less code to run."""
    return np.concatenate(values).reshape(len(values), *values[0].shape)
