"""Workspace box: the last look at an action before it reaches the arm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class NotFiniteActionError(ValueError):
    """An action holds NaN or infinity; it must never reach an arm."""


class BoxLimit:
    """Clamp actions to a box per dimension and count how often that was needed."""

    def __init__(self, names: Sequence[str], minimum: Sequence[float], maximum: Sequence[float]) -> None:
        """Set the box; ``minimum`` and ``maximum`` are in the action's own units, one entry per name.

        Raises:
            ValueError: lengths disagree, a bound is not finite, or a minimum is not below its maximum.
        """
        if not len(names) == len(minimum) == len(maximum):
            raise ValueError(
                f"limits: {len(names)} action names but {len(minimum)} minimum and {len(maximum)} maximum entries"
            )
        self.names = tuple(names)
        self.minimum = np.asarray(minimum, dtype=np.float64)
        self.maximum = np.asarray(maximum, dtype=np.float64)
        if not (np.isfinite(self.minimum).all() and np.isfinite(self.maximum).all()):
            raise ValueError("limits: every bound must be finite")
        for name, low, high in zip(self.names, self.minimum, self.maximum, strict=True):
            if low >= high:
                raise ValueError(f"limits: minimum {low} of {name!r} is not below its maximum {high}")
        self.clamped = 0

    def apply(self, action: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return ``action`` (D,) clamped to the box, float64.

        Raises:
            NotFiniteActionError: the action has another length or holds NaN or infinity; it names the dimension.
        """
        values = np.asarray(action, dtype=np.float64)
        if values.shape != self.minimum.shape:
            raise NotFiniteActionError(f"action has shape {values.shape}, expected {self.minimum.shape}")
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise NotFiniteActionError(f"action dimension {self.names[bad[0]]!r} is {values[bad[0]]}")
        bounded = np.clip(values, self.minimum, self.maximum)
        if not np.array_equal(bounded, values):
            self.clamped += 1
        return bounded
