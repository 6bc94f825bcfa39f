"""How smoothly an arm was led: jerk of what was commanded and of what moved, and jumps where one chunk follows another.

All is counted in the bundle's units (px on Push-T) at the arm's control rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(slots=True)
class EpisodeTrack:
    """What one episode did, tick by tick; a tick is one control period after the first chunk has come.

    Attributes:
        targets: what the arm was told at each tick, (Da,) each; a starved tick repeats the target before it.
        positions: where the arm was before the first tick and after each, (Da,) each.
        seams: at each change of chunk: distance between the action that the arm takes first from the new chunk and
            what the chunk before said for that action.
        jumps: likewise, distance between that action and the one executed before it.
        starved: ticks without an action.
        chunks: inferences begun.
        late: chunks of which every action had been consumed when they came.
        score: as ``dcqfa eval``: maximum over the ticks of coverage / 0.95, clipped to 0..1.
    """

    targets: list[Floats] = field(default_factory=list)
    positions: list[Floats] = field(default_factory=list)
    seams: list[float] = field(default_factory=list)
    jumps: list[float] = field(default_factory=list)
    starved: int = 0
    chunks: int = 0
    late: int = 0
    score: float = 0.0

    @property
    def steps(self) -> int:
        """Ticks of the episode."""
        return len(self.targets)


def mean_jerk(track: Sequence[Floats] | Floats, rate_hz: float) -> float | None:
    """Return the mean size of the third difference times ``rate_hz`` cubed, in units per second cubed.

    Args:
        track: (n, D), one row per tick.
        rate_hz: ticks per second.

    Returns:
        The mean over ticks of the Euclidean norm; None with fewer than four rows.
    """
    rows = np.asarray(track, np.float64)
    if len(rows) < 4:
        return None
    return float(np.linalg.norm(np.diff(rows, n=3, axis=0), axis=1).mean() * rate_hz**3)


def mean_and_p95(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and 95th percentile, None without values."""
    if not len(values):
        return None, None
    return float(np.mean(values)), float(np.percentile(values, 95))
