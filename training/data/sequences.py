"""Windows of observations and actions with padding at episode ends (once for all data sets)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.data.episodes import Demonstrations


def window_rows(
    demonstrations: Demonstrations, episodes: NDArray[np.int64], horizon: int, pad_before: int, pad_after: int
) -> NDArray[np.int64]:
    """Row indices (windows, horizon) of every window of the given episodes.

    A window may begin ``pad_before`` rows before its episode and end ``pad_after`` rows after it; rows outside are
    replaced by the episode's first or last row.
    """
    parts = []
    for episode in episodes:
        start, end = int(demonstrations.starts[episode]), int(demonstrations.ends[episode])
        first = np.arange(start - pad_before, end - horizon + pad_after + 1, dtype=np.int64)
        parts.append(np.clip(first[:, None] + np.arange(horizon), start, end - 1))
    return np.concatenate(parts) if parts else np.zeros((0, horizon), dtype=np.int64)
