"""Fronts of measured networks, and the volume they dominate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

REFERENCE = 1.1  # the corner behind the worst of every objective, which are scaled to 0..1


@dataclass(frozen=True, slots=True)
class Point:
    """A network with its measured distance to the teacher and its predicted cost on one device."""

    subnet: str
    distance: float
    latency_ms: float
    memory_bytes: float


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in every objective, by latency; of equal ones the first."""
    if not points:
        return []
    unique = list({_row(point): point for point in reversed(points)}.values())
    rows = np.array([_row(point) for point in unique])
    chosen = NonDominatedSorting().do(rows, only_non_dominated_front=True)
    return sorted((unique[index] for index in chosen), key=lambda point: (point.latency_ms, point.distance))


def hypervolumes(*sets: Sequence[Point]) -> list[float]:
    """Share of the objectives' box that each set of points dominates, all in the same box.

    The box spans all points of all sets, and a tenth more on the far side; distances enter as logarithms, since they
    differ by orders of magnitude.
    """
    rows = [_scaled(points) for points in sets]
    every = np.concatenate(rows)
    if not len(every):
        return [0.0 for _ in sets]
    low, high = every.min(axis=0), every.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    volume = HV(ref_point=np.full(every.shape[1], REFERENCE))
    whole = REFERENCE ** every.shape[1]
    return [float(volume((part - low) / span)) / whole if len(part) else 0.0 for part in rows]


def _row(point: Point) -> tuple[float, float, float]:
    return point.distance, point.latency_ms, point.memory_bytes


def _scaled(points: Sequence[Point]) -> NDArray[np.float64]:
    rows = np.array([_row(point) for point in points], dtype=np.float64).reshape(-1, 3)
    rows[:, 0] = np.log(np.maximum(rows[:, 0], 1e-12))
    return rows
