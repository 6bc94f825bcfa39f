"""What timed networks tell together: times of blocks beyond the cache, what smaller networks save, and memory.

Blocks do not add up where networks of different sizes stay in the processor's cache to different shares: a block takes
longer in a large network than in a small one. So all networks that were timed are explained at once, by least squares
of relative errors: a fixed part, a time for every size of a block (linear in heads and hidden channels, and its own
departure from that, which is kept small), and a time for every byte that comes from beyond the cache
(:class:`training.lut.CacheEffect`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from training.lut import CacheEffect
from training.profile_graphs import BlockSize

Floats = NDArray[np.float64]
LIMITS = 40  # sizes of the cache that are tried, evenly in their logarithm
DEPARTURE = 2.0  # a departure by half of a usual block's time weighs as much as a relative error of 1
OUTLIER = 0.05  # relative error beyond which a network counts less
NEGLIGIBLE = 1e-6  # sum of squared relative errors that is no reason for anything
ROUNDS = 4  # of weighing networks by their errors
WORTH_AN_EFFECT = 0.9  # a cache must cut the relative error by a tenth


@dataclass(frozen=True, slots=True)
class Timed:
    """A network of these blocks took so many milliseconds per denoising step; ``weight`` is that of its error."""

    blocks: tuple[BlockSize, ...]
    step_ms: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Fit:
    """Milliseconds per denoising step: outside the blocks, of each size beyond the cache, and what a cache saves."""

    fixed_ms: float
    block_ms: Mapping[BlockSize, float]
    cache: CacheEffect | None

    def step_ms(self, blocks: Sequence[BlockSize], bytes_of: Callable[[BlockSize], int]) -> float:
        """Milliseconds that a denoising step of a network takes."""
        saved = 0.0 if self.cache is None else self.cache.saved_ms(sum(bytes_of(size) for size in blocks))
        return self.fixed_ms + sum(self.block_ms[size] for size in blocks) - saved


def fit_networks(timed: Sequence[Timed], sizes: Sequence[BlockSize], bytes_of: Callable[[BlockSize], int]) -> Fit:
    """Explain the times of networks.

    Args:
        timed: of one precision of whole networks; at least one.
        sizes: every size that an entry is wanted for.
        bytes_of: weights of a block in memory.
    """
    megabytes = np.array([sum(bytes_of(size) for size in t.blocks) / 1e6 for t in timed])
    limits = np.geomspace(0.5e-6 * min(bytes_of(size) for size in sizes), megabytes.max(), LIMITS)
    caches = [*((0.0, high) for high in limits), *combinations(limits, 2)]
    trust = np.ones(len(timed))
    for _ in range(ROUNDS):
        problem = _Problem([replace(t, weight=t.weight * w) for t, w in zip(timed, trust, strict=True)], sizes)
        found, effect = problem.solve(np.zeros(len(timed))), None
        least = WORTH_AN_EFFECT**2 * found.error - NEGLIGIBLE
        for low, high in caches:
            streamed = np.clip((megabytes - low) / (high - low), 0.0, 1.0) * megabytes
            if problem.error(streamed) < least and (better := problem.solve(streamed)).possible:
                found, least = better, better.error
                effect = CacheEffect(low_bytes=int(1e6 * low), high_bytes=int(1e6 * high), ms_per_mb=better.per_mb)
        # A network that something held up must not bend the others: its weight falls with its error.
        trust = np.sqrt(np.minimum(1.0, OUTLIER / np.maximum(np.abs(found.relative_errors), 1e-9)))
    per_mb = 0.0 if effect is None else effect.ms_per_mb
    times = {
        size: max(0.0, time) + per_mb * bytes_of(size) / 1e6
        for size, time in zip(sizes, found.block_ms.tolist(), strict=True)
    }
    return Fit(max(0.0, found.fixed_ms), times, effect)


@dataclass(frozen=True, slots=True)
class _Solution:
    error: float
    relative_errors: Floats  # (N,)
    fixed_ms: float
    block_ms: Floats  # (S,), from the cache
    per_mb: float

    @property
    def possible(self) -> bool:
        """Whether nothing takes less than no time."""
        return self.per_mb > 0.0 and self.fixed_ms >= 0.0 and bool((self.block_ms >= 0.0).all())


class _Problem:
    """Least squares of relative errors; columns: fixed part, linear parts of each form, departures, bytes streamed."""

    def __init__(self, timed: Sequence[Timed], sizes: Sequence[BlockSize]) -> None:
        forms = list(dict.fromkeys(size.executed for size in sizes))
        place = {size: index for index, size in enumerate(sizes)}
        self._linear: Floats = np.zeros((len(sizes), 3 * len(forms)))
        for index, size in enumerate(sizes):
            begin = 3 * forms.index(size.executed)
            self._linear[index, begin : begin + 3] = 1.0, size.heads, size.mlp / 1024.0
        counts = np.zeros((len(timed), len(sizes)))
        for row, network in enumerate(timed):
            for size in network.blocks:
                counts[row, place[size]] += 1.0
        self._scale: Floats = np.array([t.weight / t.step_ms for t in timed])
        self._weights: Floats = np.array([t.weight for t in timed])
        data = np.concatenate([np.ones((len(timed), 1)), counts @ self._linear, counts], axis=1)
        typical = float(np.median([t.step_ms / len(t.blocks) for t in timed]))
        departures = np.zeros((len(sizes), data.shape[1]))
        departures[:, -len(sizes) :] = np.eye(len(sizes)) * DEPARTURE / typical
        self._rows: Floats = np.concatenate([data * self._scale[:, None], departures])
        self._wanted: Floats = np.concatenate([self._weights, np.zeros(len(sizes))])
        left, values, _ = np.linalg.svd(self._rows, full_matrices=False)
        self._explained: Floats = left[:, values > 1e-10 * values[0]]

    def error(self, streamed: Floats) -> float:
        """Least sum of squares where ``streamed`` (N,) megabytes come from beyond the cache; quicker than solving."""
        wanted, column = (v - self._explained @ (self._explained.T @ v) for v in (self._wanted, self._column(streamed)))
        size = float(column @ column)
        return float(wanted @ wanted) - (float(column @ wanted) ** 2 / size if size > 1e-12 else 0.0)

    def solve(self, streamed: Floats) -> _Solution:
        """The best explanation where ``streamed`` (N,) megabytes come from beyond the cache."""
        rows = np.concatenate([self._rows, self._column(streamed)[:, None]], axis=1)
        found, *_ = np.linalg.lstsq(rows, self._wanted, rcond=None)
        left = self._wanted - rows @ found
        linear, departures = np.split(found[1:-1], [self._linear.shape[1]])
        return _Solution(
            float(left @ left),
            left[: len(streamed)] / self._weights,
            float(found[0]),
            self._linear @ linear + departures,
            float(found[-1]),
        )

    def _column(self, streamed: Floats) -> Floats:
        return np.concatenate([streamed * self._scale, np.zeros(len(self._rows) - len(streamed))])


@dataclass(frozen=True, slots=True)
class Weighed:
    """A network takes ``total`` bytes, of which ``outside`` are known to lie outside the blocks."""

    outside: int
    blocks: int
    depth: int
    total: int


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """How memory follows from weights; fields as in :class:`training.lut.FixedEntry`."""

    workspace_bytes: int
    block_workspace_bytes: int
    weight_copies: float


def fit_memory(weighed: Sequence[Weighed]) -> MemoryFit:
    """Explain the memory of networks of one precision by a workspace, one for each block, and copies of the weights.

    None of them is negative: of all ways to leave some of them out, the one with the least relative errors is taken.
    """
    totals = np.array([float(w.total) for w in weighed])
    columns = np.array([[1.0, w.depth, w.blocks] for w in weighed]) / totals[:, None]
    wanted = 1.0 - np.array([w.outside for w in weighed]) / totals
    best, chosen = float("inf"), np.zeros(3)
    for count in (1, 2, 3):
        for kept in combinations(range(3), count):
            found = np.zeros(3)
            found[list(kept)] = np.linalg.lstsq(columns[:, kept], wanted, rcond=None)[0]
            error = float(((columns @ found - wanted) ** 2).sum())
            if (found >= 0.0).all() and error < best:
                best, chosen = error, found
    workspace, block, copies = chosen.tolist()
    return MemoryFit(int(workspace), int(block), copies)
