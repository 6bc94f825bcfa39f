"""Observations of several keys become frames with one stamp, and frames become the history that was trained on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.bundle.schema import LowDimObservation, NormalizerKind, NormalizerSpec
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.synchronizer import ObservationSynchronizer, stack_history


def spec(*shape: int) -> LowDimObservation:
    return LowDimObservation(
        type="low_dim", shape=shape, dtype="float32", units="px", frame="table", history=2, rate_hz=10.0,
        max_age_ms=300.0, normalizer=NormalizerSpec(kind=NormalizerKind.IDENTITY),
    )  # fmt: skip


SPECS = {"a": spec(2), "b": spec(3, 2)}


def fill(sync: ObservationSynchronizer, stamp: int) -> None:
    sync.add("a", stamp, np.full(2, stamp), 0)
    sync.add("b", stamp, np.full((3, 2), stamp), 0)


def test_the_first_frame_is_repeated_and_the_history_is_oldest_first():
    sync = ObservationSynchronizer(SPECS)
    sync.begin(5)
    fill(sync, 5)
    frames = sync.wait_for(5, 0.0)
    assert [f.stamp_ns for f in frames] == [5, 5]
    fill(sync, 6), fill(sync, 7)
    frames = sync.wait_for(7, 0.0)
    assert [f.stamp_ns for f in frames] == [6, 7]
    stacked = stack_history(frames, SPECS)
    assert stacked["a"].shape == (1, 2, 2) and stacked["b"].shape == (1, 2, 3, 2) and stacked["b"].dtype == np.float32
    assert stacked["a"][0, :, 0].tolist() == [6, 7]


def test_nothing_is_yielded_before_it_is_due_or_outside_an_episode():
    sync = ObservationSynchronizer(SPECS)
    fill(sync, 5)
    assert sync.wait_for(0, 0.0) is None
    sync.begin(6)
    assert sync.wait_for(0, 0.0) is None, "a frame from before the episode must not be used"
    fill(sync, 6)
    assert sync.wait_for(7, 0.0) is None
    assert sync.wait_for(6, 0.0) is not None
    sync.end()
    assert sync.wait_for(0, 0.0) is None


def test_an_incomplete_time_step_is_no_frame():
    sync = ObservationSynchronizer(SPECS)
    sync.begin(0)
    sync.add("a", 1, np.zeros(2), 0)
    assert sync.wait_for(0, 0.0) is None


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("c", np.zeros(2), "not one of a, b"),
        ("a", np.zeros(3), "shape"),
        ("a", np.array([0.0, np.nan]), "nan at index"),
    ],
)
def test_what_must_not_reach_the_policy_is_refused_by_key(key, value, text):
    sync = ObservationSynchronizer(SPECS)
    with pytest.raises(PolicyError, match=text):
        sync.add(key, 1, value, 0)
    assert sync.ages_ms(1) == {"a": None, "b": None}


def test_stamps_within_the_tolerance_form_one_frame():
    sync = ObservationSynchronizer(SPECS, {"b": 3})
    sync.begin(0)
    sync.add("a", 10, np.zeros(2), 0)
    sync.add("b", 12, np.zeros((3, 2)), 0)
    assert sync.wait_for(10, 0.0) is not None


@given(st.permutations([(key, stamp) for key in SPECS for stamp in range(1, 6)]))
def test_any_order_of_arrival_leaves_only_whole_frames_in_rising_order(order):
    sync = ObservationSynchronizer(SPECS, dict.fromkeys(SPECS, 0))
    sync.begin(0)
    for key, stamp in order:
        sync.add(key, stamp, np.full(SPECS[key].shape, stamp), 0)
        frames = sync.wait_for(0, 0.0)
        if frames:
            assert frames[0].stamp_ns <= frames[1].stamp_ns
            for frame in frames:
                assert all((v == frame.stamp_ns).all() for v in frame.values.values())


def test_a_source_whose_clock_began_anew_is_followed():
    sync = ObservationSynchronizer(SPECS)
    sync.begin(0)
    fill(sync, 100)
    fill(sync, 1)
    assert [f.stamp_ns for f in sync.wait_for(0, 0.0)] == [1, 1]


def test_the_age_of_a_frame_counts_how_far_it_lies_behind_the_newest_stamp():
    sync = ObservationSynchronizer(SPECS)
    sync.begin(0)
    fill(sync, 1_000_000)
    sync.add("a", 401_000_000, np.zeros(2), 500_000)  # "b" lags by 400 ms
    ages = sync.ages_ms(2_500_000, 1_000_000)
    assert ages == {"a": 402.0, "b": 402.5}
    assert sync.ages_ms(2_500_000) == {"a": 2.0, "b": 2.5}
