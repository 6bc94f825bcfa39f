"""Which bits every channel or layer keeps: greedy demotion under a budget, and a share that stays as it is.

Sources: QVLA (channel-wise allocation by action sensitivity) and DA-PTQ (drift-aware layer allocation), as defined in
``algorithms.md`` section 7. Arrays in, arrays out: nothing here knows of a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcqfa_ros.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CHANNEL_BITS = (16, 8, 4, 2, 0)  # 16: left in floating point, 0: pruned


class AllocationError(UserError, ValueError):
    """Bits that cannot be allotted; the message names the argument and what was expected."""


def mean_bits(bits: ArrayLike, sizes: ArrayLike) -> float:
    """Bits per weight of channels with ``bits`` (C,) and ``sizes`` (C,) weights each."""
    sizes = np.asarray(sizes, np.float64)
    return float(np.asarray(bits, np.float64) @ sizes / sizes.sum())


class Demotions(NamedTuple):
    """Steps in the order of the greedy rule, all of shape (C * (widths - 1),).

    Attributes:
        channel: which channel is demoted.
        level: from ``widths[level]`` to ``widths[level + 1]``.
        cost: how costly it counts, ascending.
    """

    channel: Ints
    level: Ints
    cost: Floats


def demotions(sensitivity: ArrayLike, widths: Sequence[int] = CHANNEL_BITS) -> Demotions:
    """Every demotion there is, in the order in which the greedy rule makes them.

    The rule always demotes the channel whose next step costs the least ``(s_low - s_high) / (b_high - b_low)``. A step
    that is cheaper than the one before it in the same channel follows that one at once, so a step counts as costly as
    the costliest up to it, and the order is a sort. Among equals the step from more bits comes first, then the first
    channel: channels of equal sensitivity are never more than one step apart.

    Args:
        sensitivity: (C, len(widths)), finite, damage done by each width, in the order of ``widths``.
        widths: bits, descending.

    Raises:
        AllocationError: ``widths`` do not descend, or ``sensitivity`` does not fit them or is not finite.
    """
    values, spans = np.asarray(sensitivity, np.float64), -np.diff(np.asarray(widths))
    if len(widths) < 2 or (spans <= 0).any() or min(widths) < 0:
        raise AllocationError(f"widths: expected at least two bit widths, descending, got {tuple(widths)}")
    if values.ndim != 2 or values.shape[1] != len(widths) or not len(values):
        raise AllocationError(f"sensitivity: expected (channels, {len(widths)}), got {values.shape}")
    if not np.isfinite(values).all():
        raise AllocationError(f"sensitivity: {int((~np.isfinite(values)).sum())} of its values are not finite")
    cost = np.maximum.accumulate(np.diff(values, axis=1) / spans, axis=1)
    channel, level = (index.ravel() for index in np.indices(cost.shape, dtype=np.int64))
    order = np.lexsort((channel, level, cost.ravel()))
    return Demotions(channel[order], level[order], cost.ravel()[order])


def demote(sensitivity: ArrayLike, sizes: ArrayLike, budget: float, widths: Sequence[int] = CHANNEL_BITS) -> Ints:
    """Bits (C,) of every channel: all start at ``widths[0]`` and are demoted until the mean budget holds.

    Args:
        sensitivity: as in :func:`demotions`.
        sizes: (C,) weights of every channel, positive: the mean is one over weights, so that it tells the size.
        budget: most bits per weight.
        widths: as in :func:`demotions`.

    Raises:
        AllocationError: as :func:`demotions`; sizes that do not fit, or a budget below the least width.
    """
    steps = demotions(sensitivity, widths)
    count, weights = int(steps.channel.max()) + 1, np.asarray(sizes, np.float64)
    if weights.shape != (count,) or not (np.isfinite(weights) & (weights > 0)).all():
        raise AllocationError(f"sizes: expected {count} positive numbers, one per channel, got shape {weights.shape}")
    if not np.isfinite(budget) or budget < widths[-1]:
        raise AllocationError(f"budget: expected at least {widths[-1]} bits, the least width, got {budget}")
    saved = weights[steps.channel] * -np.diff(np.asarray(widths, np.float64))[steps.level]
    left = widths[0] * weights.sum() - np.concatenate(([0.0], np.cumsum(saved)))
    holds = left <= budget * weights.sum()
    made = int(np.argmax(holds)) if holds.any() else len(saved)  # a rounded sum may miss the least width by an ulp
    demoted = np.bincount(steps.channel[:made], minlength=count)
    return np.asarray(widths, np.int64)[demoted]


def kept(importance: ArrayLike, share: float) -> NDArray[np.bool_]:
    """Which of L layers are kept as they are: the most important ``round(share * L)`` of them, (L,).

    Among equals the first ones are kept.

    Raises:
        AllocationError: ``share`` is not a share, or the importance (L,) is not finite.
    """
    values = np.asarray(importance, np.float64)
    if not 0.0 <= share <= 1.0:
        raise AllocationError(f"share: expected 0 to 1, got {share}")
    if values.ndim != 1 or not np.isfinite(values).all():
        raise AllocationError("importance: expected one finite number per layer")
    result = np.zeros(len(values), np.bool_)
    result[np.argsort(-values, kind="stable")[: round(share * len(values))]] = True
    return result
