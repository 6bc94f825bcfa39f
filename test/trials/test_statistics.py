"""Quantiles and intervals against published tables and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.trials.statistics import (
    mean_interval,
    paired_difference,
    regularized_incomplete_beta,
    student_t_cdf,
    student_t_quantile,
    wilson_interval,
)

# Two-sided critical values as printed in statistical tables (NIST/SEMATECH e-Handbook, section 1.3.6.7.2).
PUBLISHED_T = [
    (0.975, 1, 12.706),
    (0.975, 2, 4.303),
    (0.975, 4, 2.776),
    (0.975, 9, 2.262),
    (0.975, 29, 2.045),
    (0.975, 49, 2.010),
    (0.975, 100, 1.984),
    (0.90, 5, 1.476),
    (0.95, 5, 2.015),
    (0.99, 20, 2.528),
    (0.995, 10, 3.169),
    (0.999, 3, 10.215),
]


@pytest.mark.parametrize(("probability", "degrees", "value"), PUBLISHED_T)
def test_t_quantiles_are_the_published_ones(probability: float, degrees: int, value: float) -> None:
    assert student_t_quantile(probability, degrees) == pytest.approx(value, abs=6e-4)
    assert student_t_quantile(1 - probability, degrees) == pytest.approx(-value, abs=6e-4)


@given(st.floats(1e-6, 1 - 1e-6))
def test_t_quantiles_have_their_closed_forms_at_one_and_two_degrees(probability: float) -> None:
    cauchy = math.tan(math.pi * (probability - 0.5))
    assert student_t_quantile(probability, 1) == pytest.approx(cauchy, rel=1e-9, abs=1e-9)
    two = (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    assert student_t_quantile(probability, 2) == pytest.approx(two, rel=1e-9, abs=1e-9)


def test_t_quantiles_approach_the_normal_distribution() -> None:
    assert student_t_quantile(0.975, 1e7) == pytest.approx(1.959963984540054, abs=1e-6)


@given(st.floats(-50, 50), st.integers(1, 500))
def test_t_quantile_inverts_the_distribution(t: float, degrees: int) -> None:
    probability = student_t_cdf(t, degrees)
    if 1e-12 < probability < 1 - 1e-9:
        assert student_t_quantile(probability, degrees) == pytest.approx(t, rel=1e-5, abs=1e-9)


@given(st.floats(0.5, 200), st.floats(0.5, 200), st.integers(0, 1024))
def test_incomplete_beta_is_symmetric_and_bounded(a: float, b: float, parts: int) -> None:
    x = parts / 1024  # so that 1 - x is exact
    value = regularized_incomplete_beta(a, b, x)
    assert -1e-12 <= value <= 1 + 1e-12
    assert value + regularized_incomplete_beta(b, a, 1 - x) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "x", "value"), [(1, 1, 0.3, 0.3), (2, 1, 0.3, 0.09), (2, 2, 0.5, 0.5), (1, 3, 0.5, 0.875)]
)
def test_incomplete_beta_has_its_polynomial_values(a: float, b: float, x: float, value: float) -> None:
    assert regularized_incomplete_beta(a, b, x) == pytest.approx(value, abs=1e-14)


def test_mean_interval_of_a_worked_example() -> None:
    interval = mean_interval([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert interval.estimate == 5.0
    assert interval.n == 8
    # standard deviation 2.13809, t(0.975, 7) = 2.36462
    assert interval.half_width == pytest.approx(2.36462 * 2.13809 / math.sqrt(8), abs=1e-4)
    assert interval.low == pytest.approx(5.0 - 1.78748, abs=1e-4)


def test_a_single_value_has_a_mean_and_no_interval() -> None:
    interval = mean_interval([0.25])
    assert (interval.estimate, interval.low, interval.high, interval.half_width) == (0.25, None, None, None)
    assert not interval.not_below(1.0)


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for sample in random.normal(0.7, 0.2, size=(1000, 5)):
        interval = mean_interval(sample.tolist())
        assert interval.low is not None
        assert interval.high is not None
        inside += interval.low <= 0.7 <= interval.high
    assert 0.93 < inside / 1000 < 0.97


# Wilson's interval without continuity correction (Newcombe 1998, table I, method 3).
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, n)
    assert interval.low == pytest.approx(low, abs=6e-5)
    assert interval.high == pytest.approx(high, abs=6e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_intervals_stay_within_zero_and_one_and_around_the_rate(case: tuple[int, int]) -> None:
    interval = wilson_interval(*case)
    assert interval.low is not None
    assert interval.high is not None
    assert 0.0 <= interval.low <= interval.estimate <= interval.high <= 1.0


def test_pairing_by_seed_takes_out_how_hard_a_seed_is() -> None:
    hard = {seed: seed / 100 for seed in range(50)}
    better = {seed: score + 0.1 for seed, score in hard.items()}
    interval = paired_difference(better, dict(reversed(hard.items())))
    assert interval.estimate == pytest.approx(0.1)
    assert interval.half_width == pytest.approx(0.0, abs=1e-12)
    assert interval.not_below(0.03)


def test_a_difference_that_may_be_worse_than_the_margin_is_not_non_inferior() -> None:
    first, second = {0: 0.5, 1: 0.9, 2: 0.1}, {0: 0.6, 1: 0.7, 2: 0.3}
    assert not paired_difference(first, second).not_below(0.03)


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="confidence"):
        mean_interval([1.0, 2.0], confidence=1.0)
    with pytest.raises(ValueError, match="success rate"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="2 seeds have a score on one side only: 1, 3"):
        paired_difference({1: 0.1, 2: 0.2}, {2: 0.1, 3: 0.2})
    with pytest.raises(ValueError, match="probability"):
        student_t_quantile(1.0, 3)
    for call in (student_t_quantile, student_t_cdf):
        with pytest.raises(ValueError, match="degrees"):
            call(0.4, 0)
    with pytest.raises(ValueError, match="incomplete beta"):
        regularized_incomplete_beta(1, 1, 1.5)
