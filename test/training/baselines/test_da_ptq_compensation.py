"""Compensation: which moments are matched exactly, and what stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.baselines.da_ptq_compensation import Compensation, CompensationError, Moments, compensation

WIDE = (1e-6, 1e6)  # bounds that no gain meets


def moments(rows: np.ndarray) -> Moments:
    """Moments of rows, observed in two batches."""
    result = Moments(rows.shape[1])
    result.observe(rows[:7])
    result.observe(rows[7:])
    return result


def outputs(seed: int, channels: int = 5, rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Correlated outputs of a layer, and what is left of them after coarse rounding, a gain and a shift."""
    generator = np.random.default_rng(seed)
    exact = generator.normal(size=(rows, channels)) @ generator.normal(size=(channels, channels)) + 3.0
    rounded = np.round(exact / 1.5) * 1.5 * generator.uniform(0.8, 1.2, channels)
    return exact, rounded + generator.normal(size=channels) + 0.3 * generator.normal(size=(rows, channels))


def fitted(exact: np.ndarray, rounded: np.ndarray, rank: int, gains: tuple[float, float] = WIDE) -> Compensation:
    """The compensation of two sets of outputs."""
    return compensation(moments(exact), moments(rounded), rank=rank, gains=gains)


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=8, deadline=None)
@given(seeds)
def test_moments_of_batches_are_those_of_all_rows(seed: int) -> None:
    exact, _ = outputs(seed)
    np.testing.assert_allclose(moments(exact).mean, exact.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(moments(exact).covariance, np.cov(exact.T, ddof=0), rtol=1e-9, atol=1e-12)


@settings(max_examples=8, deadline=None)
@given(seeds)
def test_gains_and_shifts_match_mean_and_deviation_of_every_channel_exactly(seed: int) -> None:
    exact, rounded = outputs(seed)
    result = fitted(exact, rounded, rank=0)(rounded)
    np.testing.assert_allclose(result.mean(axis=0), exact.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(result.std(axis=0), exact.std(axis=0), rtol=1e-9)


@settings(max_examples=8, deadline=None)
@given(seeds)
def test_full_rank_matches_mean_and_covariance_exactly(seed: int) -> None:
    exact, rounded = outputs(seed)
    found = fitted(exact, rounded, rank=5)
    np.testing.assert_allclose(found(rounded).mean(axis=0), exact.mean(axis=0), rtol=1e-8)
    np.testing.assert_allclose(np.cov(found(rounded).T, ddof=0), np.cov(exact.T, ddof=0), rtol=1e-6, atol=1e-8)


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(1, 4))
def test_a_lower_rank_matches_the_covariance_in_that_many_directions_and_every_mean(seed: int, rank: int) -> None:
    exact, rounded = outputs(seed)
    found = fitted(exact, rounded, rank)
    assert found.u.shape == found.v.shape == (5, rank)
    result = found(rounded)
    np.testing.assert_allclose(result.mean(axis=0), exact.mean(axis=0), rtol=1e-8)
    np.testing.assert_allclose(
        found.v.T @ np.cov(result.T, ddof=0) @ found.v,
        found.v.T @ np.cov(exact.T, ddof=0) @ found.v,
        rtol=1e-6,
        atol=1e-8,
    )


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(0, 5))
def test_nothing_quantized_needs_no_compensation(seed: int, rank: int) -> None:
    exact, _ = outputs(seed)
    found = fitted(exact, exact.copy(), rank)
    np.testing.assert_array_equal(found.matrix(), np.eye(5))
    np.testing.assert_array_equal(found.shift, np.zeros(5))
    assert found.clipped == 0


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(0, 5))
def test_gains_stay_within_their_bounds(seed: int, rank: int) -> None:
    exact, rounded = outputs(seed)
    found = fitted(100.0 * exact, rounded, rank, gains=(0.5, 2.0))
    np.testing.assert_array_equal(found.gain, np.full(5, 2.0))
    # Every channel, and every direction but one that has too little variance to be matched.
    assert 5 + max(0, rank - 1) <= found.clipped <= 5 + rank
    assert np.isfinite(found.shift).all()


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(0, 5))
def test_folded_weights_compute_the_compensated_outputs(seed: int, rank: int) -> None:
    generator = np.random.default_rng(seed)
    inputs, weight, bias = generator.normal(size=(50, 3)), generator.normal(size=(5, 3)), generator.normal(size=5)
    exact, rounded = outputs(seed)
    found = fitted(exact, rounded, rank)
    folded, offset = found.folded(weight, bias)
    np.testing.assert_allclose(inputs @ folded.T + offset, found(inputs @ weight.T + bias), rtol=1e-8, atol=1e-8)


def test_constant_and_dependent_channels_are_left_alone() -> None:
    exact, rounded = outputs(1)
    exact[:, 0], rounded[:, 0] = 2.0, 5.0
    exact[:, 4], rounded[:, 4] = exact[:, 3], rounded[:, 3]  # the covariance is singular
    found = fitted(exact, rounded, rank=5)
    assert found.gain[0] == 1.0
    np.testing.assert_allclose(found(rounded).mean(axis=0), exact.mean(axis=0), rtol=1e-8)
    np.testing.assert_allclose(np.cov(found(rounded).T, ddof=0), np.cov(exact.T, ddof=0), rtol=1e-5, atol=1e-6)


def test_bad_input_is_refused_by_name() -> None:
    exact, rounded = outputs(0)
    with pytest.raises(CompensationError, match="same calibration inputs"):
        compensation(moments(exact), moments(rounded[:-1]))
    with pytest.raises(CompensationError, match="rank"):
        fitted(exact, rounded, rank=-1)
    with pytest.raises(CompensationError, match="gains"):
        fitted(exact, rounded, rank=1, gains=(1.5, 2.0))
    with pytest.raises(CompensationError, match="rows"):
        Moments(3).observe(exact)
    with pytest.raises(CompensationError, match="finite"):
        Moments(5).observe(np.full((4, 5), np.nan))
    with pytest.raises(CompensationError, match="never ran"):
        compensation(Moments(5), Moments(5))
