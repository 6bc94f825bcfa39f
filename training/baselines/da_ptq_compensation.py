"""DA-PTQ compensation: what brings the outputs of a quantized layer back to the moments they had (``algorithms.md`` 7).

With outputs y of the full-precision layer and q of the quantized one over the same calibration inputs::

    z = g q + d          g = clip(sigma_y / sigma_q), d = mu_y - g mu_q, per channel
    y^ = M (z - mu_y) + mu_y      M = I + U V^T

``g`` and ``d`` match mean and variance of every channel. ``M`` matches the covariance within the ``rank`` principal
directions of Cov(y) + Cov(z); at full rank it matches all of it, at a lower one the variances of single channels move a
little again. Directions of little variance are left alone: statistics say nothing certain about them, and matching
relative variances there (the generalised eigenvectors) was measured to destroy the policy. Everything is affine, so it
folds into weight and bias of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.errors import UserError

Floats = NDArray[np.float64]

GAINS = (0.5, 2.0)  # bounds of every gain, of channels and of directions
RANK = 16
NO_VARIANCE = 1e-10  # share of the greatest variance below which a channel or direction counts as constant
SAME = 1e-5  # relative difference of variances that counts as none: float32 statistics hold no more


class CompensationError(UserError, ValueError):
    """Statistics or options that no compensation follows from; the message names them."""


class Moments:
    """Mean and variance, or covariance, of rows observed batch by batch; sums of batches are kept in float64.

    Attributes:
        count: rows observed.
    """

    def __init__(self, channels: int, *, full: bool = True) -> None:
        """Begin with nothing observed of rows of ``channels`` values; their covariance is left out unless ``full``."""
        self.count = 0
        self._mean = np.zeros(channels)
        self._full = full
        self._scatter = np.zeros((channels, channels) if full else channels)

    def observe(self, rows: NDArray[np.floating]) -> None:
        """Take rows (N, channels); batches may be of any size (Chan et al. 1979, pairwise update).

        Raises:
            CompensationError: rows of another width, or values that are not finite.
        """
        if rows.ndim != 2 or rows.shape[1] != len(self._mean) or not np.isfinite(rows).all():
            raise CompensationError(f"rows: expected finite values (N, {len(self._mean)}), got shape {rows.shape}")
        if not len(rows):
            return
        mean = rows.mean(axis=0, dtype=np.float64)
        centred, shift, total = rows - mean.astype(rows.dtype), mean - self._mean, self.count + len(rows)
        squares = centred.T @ centred if self._full else np.square(centred).sum(axis=0, dtype=np.float64)
        between = np.outer(shift, shift) if self._full else shift * shift
        self._scatter += squares + between * (self.count * len(rows) / total)
        self._mean += shift * (len(rows) / total)
        self.count = total

    @property
    def mean(self) -> Floats:
        """(channels,)."""
        return self._mean

    @property
    def variance(self) -> Floats:
        """(channels,), divided by the number of rows.

        Raises:
            CompensationError: nothing was observed.
        """
        if not self.count:
            raise CompensationError("moments: calibration never ran this layer")
        result: Floats = (np.diag(self._scatter) if self._full else self._scatter) / self.count
        return result

    @property
    def covariance(self) -> Floats:
        """(channels, channels), divided by the number of rows.

        Raises:
            CompensationError: only variances were kept, or nothing was observed.
        """
        if not self._full or not self.count:
            raise CompensationError("moments: no covariance was observed; directions need full moments of both sides")
        return self._scatter / self.count


@dataclass(frozen=True, slots=True)
class Compensation:
    """An affine map of the outputs of one layer, ``y^ = (I + U V^T)(gain q) + shift``.

    Attributes:
        gain: (C,).
        shift: (C,), constant that puts the mean right, of ``M`` too.
        u: (C, r), r may be 0.
        v: (C, r).
        clipped: gains of channels and of directions that met a bound.
    """

    gain: Floats
    shift: Floats
    u: Floats
    v: Floats
    clipped: int

    def matrix(self) -> Floats:
        """``(I + U V^T) diag(gain)``, (C, C)."""
        return np.diag(self.gain) + self.u @ (self.v.T * self.gain)

    def __call__(self, rows: NDArray[np.floating]) -> Floats:
        """Apply it to outputs (N, C)."""
        scaled = np.asarray(rows, np.float64) * self.gain
        result: Floats = scaled + (scaled @ self.v) @ self.u.T + self.shift
        return result

    def folded(self, weight: NDArray[np.floating], bias: NDArray[np.floating]) -> tuple[Floats, Floats]:
        """Weight (C, in) and bias (C,) of a layer in floating point that computes its compensated outputs by itself."""
        matrix = self.matrix()
        return matrix @ np.asarray(weight, np.float64), matrix @ np.asarray(bias, np.float64) + self.shift


def check_bounds(rank: int, gains: tuple[float, float]) -> None:
    """Refuse a rank or bounds of gains that mean nothing.

    Raises:
        CompensationError: naming them.
    """
    low, high = gains
    if rank < 0 or not 0.0 < low <= 1.0 <= high < np.inf:
        raise CompensationError(f"rank {rank}, gains {gains}: expected rank >= 0 and 0 < least gain <= 1 <= greatest")


def compensation(
    target: Moments, quantized: Moments, *, rank: int = RANK, gains: tuple[float, float] = GAINS
) -> Compensation:
    """The compensation that takes the moments of quantized outputs to those of the full-precision ones.

    Channels without variance on either side keep gain 1 and get the right mean.

    Args:
        target: of the full-precision layer.
        quantized: of the quantized one, over the same inputs.
        rank: most directions of ``M``; 0 for gains and shifts alone, which is all that a layer of integer codes can
            fold (into its scales and bias).
        gains: least and greatest gain.

    Raises:
        CompensationError: the moments are of different widths or samples, or an option is out of range.
    """
    check_bounds(rank, gains)
    if target.mean.shape != quantized.mean.shape or target.count != quantized.count:
        raise CompensationError(
            f"moments: {target.count} rows of {len(target.mean)} channels and {quantized.count} of "
            f"{len(quantized.mean)}; both networks have to run on the same calibration inputs"
        )
    variance, measured = target.variance, quantized.variance
    alive = (measured > NO_VARIANCE * measured.max()) & (variance > NO_VARIANCE * variance.max())
    ratio = np.sqrt(variance / np.where(alive, measured, 1.0), where=alive, out=np.ones_like(variance))
    gain = np.clip(ratio, *gains)
    u = v = np.zeros((len(gain), 0))
    stopped = 0
    if rank:
        scaled = gain[:, None] * quantized.covariance * gain
        u, v, stopped = _directions(target.covariance, scaled, rank, gains)
    centre = gain * quantized.mean
    shift = target.mean - centre - u @ (v.T @ centre)
    return Compensation(gain, shift, u, v, int((gain != ratio).sum()) + stopped)


def _directions(wanted: Floats, found: Floats, rank: int, gains: tuple[float, float]) -> tuple[Floats, Floats, int]:
    """U, V (C, r) and the number of directions whose gain met a bound.

    With orthonormal P (C, r) and the covariances A = P^T found P, B = P^T wanted P there, ``M = I + P (T - I) P^T`` and
    ``T = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2``, the symmetric map of least displacement between normal distributions of
    these covariances (Dowson and Landau 1982): T A T = B. Its eigenvalues are the gains of directions.
    """
    empty = np.zeros((len(found), 0))
    values, vectors = np.linalg.eigh(wanted + found)
    if values[-1] <= 0.0:
        return empty, empty, 0
    p = vectors[:, values > NO_VARIANCE * values[-1]][:, ::-1][:, :rank]
    variances, turned = np.linalg.eigh(p.T @ found @ p)
    root = np.sqrt(np.maximum(variances, NO_VARIANCE * values[-1]))
    half, inverse = (turned * root) @ turned.T, (turned / root) @ turned.T
    squares, middle = np.linalg.eigh(half @ (p.T @ wanted @ p) @ half)
    exact, axes = np.linalg.eigh(inverse @ (middle * np.sqrt(np.maximum(squares, 0.0))) @ middle.T @ inverse)
    bounded = np.clip(exact, *gains)
    changed = np.abs(bounded - 1.0) > SAME
    v = p @ axes[:, changed]
    return v * (bounded[changed] - 1.0), v, int((bounded != exact)[changed].sum())
