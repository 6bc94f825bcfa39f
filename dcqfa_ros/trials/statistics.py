"""Interval estimates for trial scores: Student's t for means, Wilson for rates, paired differences between methods.

Only the standard library is used. The t quantile inverts the exact distribution function, which is a regularised
incomplete beta function (continued fraction: Press et al., Numerical Recipes, section 6.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

_TINY = 1e-300
_EPSILON = 1e-16
_MAX_TERMS = 100_000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: the mean, rate or mean difference.
        low: lower end of the interval; None when one value alone gives no interval.
        high: upper end of the interval; None likewise.
        confidence: coverage of the interval, such as 0.95.
        n: number of values behind it.
    """

    estimate: float
    low: float | None
    high: float | None
    confidence: float
    n: int

    @property
    def half_width(self) -> float | None:
        """Half the interval's width; None when there is no interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def not_below(self, margin: float) -> bool:
        """Whether a difference is shown to be above ``-margin`` (non-inferiority); False without an interval."""
        return self.low is not None and self.low > -margin


def regularized_incomplete_beta(a: float, b: float, x: float) -> float:
    """Return I_x(a, b) for a, b > 0 and 0 <= x <= 1, to about 1e-14.

    Raises:
        ValueError: an argument is out of range.
        ArithmeticError: the continued fraction did not converge (a or b above about 1e9).
    """
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise ValueError(f"incomplete beta: expected a > 0, b > 0 and 0 <= x <= 1, got a={a}, b={b}, x={x}")
    if x in (0.0, 1.0):
        return float(x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    front = math.exp(log_front)
    if x < (a + 1) / (a + b + 2):  # where the fraction converges fast; the other side by symmetry
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, 1.0 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Return the continued fraction of the incomplete beta function by Lentz's method."""
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > _TINY else _TINY)
    value = d
    for m in range(1, _MAX_TERMS):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            c = 1.0 + numerator / c
            d = 1.0 / (d if abs(d) > _TINY else _TINY)
            c = c if abs(c) > _TINY else _TINY
            value *= d * c
        if abs(d * c - 1.0) <= 4 * _EPSILON:
            return value
    raise ArithmeticError(f"incomplete beta: no convergence for a={a}, b={b}, x={x}")


def student_t_cdf(t: float, degrees: float) -> float:
    """Return P(T <= t) of Student's distribution with ``degrees`` > 0 degrees of freedom."""
    if not degrees > 0:
        raise ValueError(f"degrees of freedom: expected a positive number, got {degrees}")
    square = t * t
    if square < degrees:  # measured from the centre: no cancellation for small t
        centre = 0.5 * regularized_incomplete_beta(0.5, degrees / 2, square / (degrees + square))
        return 0.5 - centre if t < 0 else 0.5 + centre
    tail = 0.5 * regularized_incomplete_beta(degrees / 2, 0.5, degrees / (degrees + square))
    return tail if t < 0 else 1.0 - tail


def student_t_quantile(probability: float, degrees: float) -> float:
    """Return t with P(T <= t) = ``probability`` (0 < probability < 1) for ``degrees`` > 0 degrees of freedom.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability: expected above 0 and below 1, got {probability}")
    if not degrees > 0:
        raise ValueError(f"degrees of freedom: expected a positive number, got {degrees}")
    if probability == 0.5:
        return 0.0
    tail = min(probability, 1.0 - probability)
    high = 1.0
    while student_t_cdf(-high, degrees) > tail:
        high *= 2.0
    low = 0.0
    while True:  # bisection: the function is monotone, and this ends at neighbouring floats
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if student_t_cdf(-middle, degrees) > tail:
            low = middle
        else:
            high = middle
    return -high if probability < 0.5 else high


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected above 0 and below 1, got {confidence}")


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of ``values`` with its two-sided Student t interval (none for a single value).

    Raises:
        ValueError: no values, a value is NaN or infinite, or the confidence is not within (0, 1).
    """
    _check_confidence(confidence)
    n = len(values)
    if n == 0:
        raise ValueError("mean: expected at least one value, got none")
    if not all(math.isfinite(value) for value in values):
        raise ValueError("mean: expected finite values, got a NaN or an infinity")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, confidence, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = student_t_quantile(0.5 + confidence / 2, n - 1) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, confidence, n)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the success rate with Wilson's score interval, which stays within [0, 1] and works at 0 and n.

    Raises:
        ValueError: n is below 1, or successes are outside 0..n, or the confidence is not within (0, 1).
    """
    _check_confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"success rate: expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(rate, low, high, confidence, n)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95) -> Interval:
    """Return the mean of ``first - second`` over the seeds of both, with its Student t interval.

    The maps go from seed to score. Pairing by seed takes out how hard a start state is.

    Raises:
        ValueError: the seeds differ (the message names some), there are none, or a value is not finite.
    """
    unpaired = sorted(set(first) ^ set(second))
    if unpaired:
        shown = ", ".join(map(str, unpaired[:5])) + (", ..." if len(unpaired) > 5 else "")
        raise ValueError(f"paired difference: {len(unpaired)} seeds have a score on one side only: {shown}")
    return mean_interval([first[seed] - second[seed] for seed in sorted(first)], confidence)
