"""Fitting and applying the normalisers that travel in the bundle."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import NormalizerKind, NormalizerSpec

RANGE_EPSILON = 1e-4  # a dimension that hardly moves is centred and not blown up
LOW_QUANTILE, HIGH_QUANTILE = 0.01, 0.99


def fit_normalizer(data: NDArray[np.float32], kind: NormalizerKind) -> NormalizerSpec:
    """Fit ``normalised = raw * scale + offset`` per column of ``data`` (N, D)."""
    x = data.astype(np.float64)
    if kind is NormalizerKind.IDENTITY:
        return NormalizerSpec(kind=kind)
    if kind is NormalizerKind.MEAN_STD:
        deviation = x.std(axis=0)
        scale = 1.0 / np.where(deviation < RANGE_EPSILON, 1.0, deviation)
        offset = -x.mean(axis=0) * scale
    else:
        low, high = (
            (x.min(axis=0), x.max(axis=0))
            if kind is NormalizerKind.MIN_MAX
            else (np.quantile(x, LOW_QUANTILE, axis=0), np.quantile(x, HIGH_QUANTILE, axis=0))
        )
        still = high - low < RANGE_EPSILON
        scale = np.where(still, 1.0, 2.0 / np.where(still, 1.0, high - low))
        offset = np.where(still, -(low + high) / 2, -1.0 - low * scale)
    return NormalizerSpec(kind=kind, scale=tuple(scale.tolist()), offset=tuple(offset.tolist()))


def normalize(data: NDArray[np.float32], spec: NormalizerSpec) -> NDArray[np.float32]:
    """Apply a normaliser to (N, D) data; returns float32."""
    if not spec.scale:
        return data.astype(np.float32)
    return (data * np.asarray(spec.scale) + np.asarray(spec.offset)).astype(np.float32)


def concatenate_normalizers(
    specs: Mapping[str, NormalizerSpec], shapes: Mapping[str, tuple[int, ...]]
) -> NormalizerSpec:
    """One normaliser over the concatenated observation vector, in the order of ``specs``."""
    scale: list[float] = []
    offset: list[float] = []
    for key, spec in specs.items():
        size = int(np.prod(shapes[key]))
        scale += list(spec.scale) or [1.0] * size
        offset += list(spec.offset) or [0.0] * size
    kind = next(iter(specs.values())).kind
    if kind is NormalizerKind.IDENTITY:
        kind = NormalizerKind.MEAN_STD  # the identity written out: scale 1, offset 0
    return NormalizerSpec(kind=kind, scale=tuple(scale), offset=tuple(offset))
