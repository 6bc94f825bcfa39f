"""Affine normalisation of observations and actions, as the bundle declares it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import NormalizerSpec


class Normalizer:
    """``normalised = raw * scale + offset`` over arrays that end in ``shape``.

    The arithmetic is float64, as in training; results are float32 because that is what networks take.
    """

    def __init__(self, spec: NormalizerSpec, shape: Sequence[int]) -> None:
        """Prepare for arrays (..., *shape).

        Raises:
            ValueError: the spec has neither one entry per scalar of ``shape`` nor one per element of its last axis.
        """
        self.shape = tuple(shape)
        size = int(np.prod(self.shape))
        self._scale: NDArray[np.float64] = np.ones(())
        self._offset: NDArray[np.float64] = np.zeros(())
        if not spec.scale:
            return
        if len(spec.scale) not in (size, self.shape[-1]):
            raise ValueError(
                f"normalizer has {len(spec.scale)} entries, expected {size} (one per scalar of shape {self.shape}) "
                f"or {self.shape[-1]} (one per element of its last axis)"
            )
        per_scalar = len(spec.scale) == size
        entry_shape = self.shape if per_scalar else (self.shape[-1],)
        self._scale = np.asarray(spec.scale, np.float64).reshape(entry_shape)
        self._offset = np.asarray(spec.offset, np.float64).reshape(entry_shape)

    def normalize(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """Map raw values (..., *shape) to the policy's range, float32."""
        return np.asarray(raw * self._scale + self._offset, np.float32)

    def denormalize(self, normalised: NDArray[Any]) -> NDArray[np.float32]:
        """Map values in the policy's range (..., *shape) back to raw units, float32."""
        return np.asarray((normalised - self._offset) / self._scale, np.float32)
