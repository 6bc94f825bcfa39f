"""Samples of one key: which of them a frame takes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dcqfa_ros.bundle.schema import LowDimObservation, NormalizerKind, NormalizerSpec, WrenchObservation
from dcqfa_ros.runtime.key_samples import KeySamples, Sample, stack_rows

COMMON = {"dtype": "float32", "frame": "world", "history": 1, "max_age_ms": 100.0}
COMMON |= {"normalizer": NormalizerSpec(kind=NormalizerKind.IDENTITY)}
STAMPS = st.lists(st.integers(0, 1000), min_size=1, max_size=40)


def filled(stamps: list[int]) -> KeySamples:
    spec = LowDimObservation(type="low_dim", shape=(1,), rate_hz=10.0, units="-", **COMMON)
    key = KeySamples("key", spec, 50)
    for stamp in stamps:
        key.keep(Sample(stamp, np.full(1, stamp, np.float32)))
    return key


@given(stamps=STAMPS)
def test_samples_lie_by_stamp_in_whatever_order_they_come_and_one_stamp_has_one(stamps: list[int]) -> None:
    assert [s.stamp_ns for s in filled(stamps).samples] == sorted(set(stamps))


@given(stamps=STAMPS, wanted=st.integers(-100, 1100))
def test_the_nearest_sample_is_taken_and_none_beyond_the_tolerance(stamps: list[int], wanted: int) -> None:
    key = filled(stamps)
    nearest = min(abs(stamp - wanted) for stamp in stamps)
    found = key.nearest(wanted)
    assert found is not None and abs(found.stamp_ns - wanted) == nearest
    taken, told = key.at(wanted)
    assert (taken is found) == (nearest <= 50) and bool(told) == (nearest > 50)


@given(stamps=STAMPS, wanted=st.integers(0, 1000))
def test_what_was_there_before_is_within_the_tolerance_and_not_newer(stamps: list[int], wanted: int) -> None:
    assert filled(stamps).has_before(wanted) == any(0 <= wanted - stamp <= 50 for stamp in stamps)


@given(count=st.integers(1, 8), more=st.integers(0, 8), after=st.integers(0, 4))
def test_a_window_is_the_newest_rows_up_to_the_stamp(count: int, more: int, after: int) -> None:
    period = 10_000_000
    spec = WrenchObservation(
        type="wrench", shape=(count, 6), rate_hz=100.0, units="N", clip=(50.0,) * 6,
        **COMMON,
    )  # fmt: skip
    key = KeySamples("wrench", spec, period)
    for row in range(count + more + after):
        key.keep(Sample(row * period, np.full(6, row, np.float32)))
    last = count + more - 1
    taken, told = key.at(last * period + 1)
    assert told == "" and taken is not None and taken.stamp_ns == last * period
    np.testing.assert_array_equal(taken.value, np.repeat(np.arange(more, last + 1, dtype=np.float32), 6).reshape(-1, 6))


def test_of_two_samples_as_near_the_older_one_is_taken() -> None:
    found = filled([100, 120]).nearest(110)
    assert found is not None and found.stamp_ns == 100


def test_a_window_says_what_it_lacks() -> None:
    spec = WrenchObservation(
        type="wrench", shape=(2, 6), rate_hz=100.0, units="N", clip=(50.0,) * 6, **COMMON
    )  # fmt: skip
    key = KeySamples("wrench", spec, 10_000_000)
    for stamp_ms, told in ((0, "has 1 of 2 samples"), (25, "has a gap of 25.0 ms"), (30, "")):
        key.keep(Sample(stamp_ms * 1_000_000, np.zeros(6, np.float32)))
        assert told in key.at(stamp_ms * 1_000_000)[1], stamp_ms
    assert key.at(41_000_000) == (None, "ends 11.0 ms before it, its tolerance is 10 ms")


@given(rows=st.lists(arrays.arrays(np.float32, (2, 3)), min_size=1, max_size=5))
def test_rows_are_stacked_as_numpy_stacks_them(rows: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(stack_rows(rows), np.stack(rows))
