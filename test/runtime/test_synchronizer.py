"""Observations of several keys become frames with one stamp, and frames become the history that was trained on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from dcqfa_ros.bundle.schema import LowDimObservation, NormalizerKind, NormalizerSpec, ObservationSpec
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


# keys of different kinds and rates

MS = 1_000_000
NORMAL = NormalizerSpec(kind=NormalizerKind.IDENTITY)


def of(kind, shape, rate, **more):
    document = {"type": kind, "shape": shape, "units": "-", "frame": "-", "history": 2, "rate_hz": rate,
                "max_age_ms": 300.0, "normalizer": NORMAL, "dtype": "float32", **more}  # fmt: skip
    return TypeAdapter(ObservationSpec).validate_python(document)


CELL = {
    "joints": of("low_dim", (6,), 50.0),
    "front": of("image", (4, 5, 3), 30.0, dtype="uint8"),
    "wrist": of("image", (4, 5, 3), 30.0, dtype="uint8"),
    "wrench": of("wrench", (4, 6), 100.0, clip=(10.0,) * 6),
}
PICTURE = np.zeros((4, 5, 3), np.uint8)


def cell(step_ms=0, **tolerances_ms):
    sync = ObservationSynchronizer(CELL, {k: round(v * MS) for k, v in tolerances_ms.items()}, step_ms * MS)
    sync.begin(1)
    return sync


def feed(sync, key, *stamps_ms, arrival_ms=0):
    for stamp in stamps_ms:
        value = PICTURE if key in ("front", "wrist") else np.full(6, float(stamp))
        sync.add(key, round(stamp * MS), value, round(arrival_ms * MS))


def newest(sync):
    frames = sync.wait_for(0, 0.0)
    return None if frames is None else frames[-1]


def test_the_first_picture_is_the_clock_and_tolerances_follow_from_the_rates():
    sync = cell(wrist=5.0)
    assert sync.reference == "front"
    assert sync.tolerances_ns == {"joints": 40 * MS, "front": 30 * MS, "wrist": 5 * MS, "wrench": 15 * MS}


def test_a_window_ends_at_the_picture_and_joints_are_the_nearest():
    sync = cell()
    feed(sync, "wrench", *range(1000, 1060, 10))
    feed(sync, "joints", 1010, 1030, 1050)
    feed(sync, "wrist", 1020)
    feed(sync, "front", 1037)
    frame = newest(sync)
    assert frame.stamp_ns == 1037 * MS
    assert frame.values["joints"][0] == 1030
    assert frame.values["wrench"].shape == (4, 6) and frame.values["wrench"].dtype == np.float32
    assert frame.values["front"] is PICTURE, "a picture is not copied"
    assert (frame.values["wrench"] == 10.0).all(), "clipped"


def test_what_a_frame_waits_for_is_named():
    sync = cell()
    feed(sync, "front", 1100)
    assert newest(sync) is None
    told = sync.missing()
    assert "'wrench' has 0 of 4 samples" in told and "'joints' has not come yet" in told and "(to 'front')" in told
    feed(sync, "wrench", 1000, 1010, 1020, 1030)
    feed(sync, "joints", 1059)
    feed(sync, "wrist", 1095)
    assert "'wrench' ends 70.0 ms before it, its tolerance is 15 ms" in sync.missing()
    assert "'joints' is 41.0 ms from it at the nearest, its tolerance is 40 ms" in sync.missing()
    feed(sync, "joints", 1099)
    feed(sync, "wrench", 1090, 1096)
    assert "has a gap of 60.0 ms, expected a sample every 10 ms" in sync.missing()
    feed(sync, "wrench", 1097, 1098)
    assert newest(sync).stamp_ns == 1100 * MS
    assert sync.missing() == ""


def test_a_sample_of_the_same_tick_is_waited_for_and_one_between_two_ticks_is_not():
    sync = cell()
    feed(sync, "wrench", *range(1000, 1120, 10))
    feed(sync, "joints", 1100)
    feed(sync, "wrist", 1066.7)
    feed(sync, "front", 1100)
    assert newest(sync) is None, "the wrist's picture of this tick is on its way"
    feed(sync, "wrist", 1100)
    assert newest(sync).stamp_ns == 1100 * MS
    feed(sync, "joints", 1133)
    feed(sync, "wrench", 1120, 1130)
    feed(sync, "wrist", 1118)
    feed(sync, "front", 1133)
    assert newest(sync).stamp_ns == 1133 * MS


@pytest.mark.parametrize(
    ("wrist", "awaited_ms"),
    [([1102], 1102), ([1069, 1102], 1102), ([1098], 1100), ([1077, 1110], 1100)],
    ids=["the first", "the one before is too old", "of before", "not needed"],
)
def test_a_frame_knows_which_picture_it_had_to_wait_for_and_no_state_counts_as_one(wrist, awaited_ms):
    sync = cell()
    feed(sync, "joints", 1110)
    feed(sync, "wrist", *wrist)
    feed(sync, "front", 1100)
    feed(sync, "wrench", *range(1000, 1120, 10))  # late
    assert (newest(sync).stamp_ns, newest(sync).awaited_ns) == (1100 * MS, awaited_ms * MS)


def test_the_newest_complete_frame_wins_and_nothing_queues():
    sync = cell()
    for stamp in range(1000, 3000, 33):
        feed(sync, "wrench", *range(stamp - 30, stamp + 1, 10))
        feed(sync, "joints", stamp)
        feed(sync, "wrist", stamp)
        feed(sync, "front", stamp)
    assert newest(sync).stamp_ns == 2980 * MS
    assert len(sync._frames) < 16, "frames that no history reaches back to are let go"


def test_the_history_lies_one_step_of_the_policy_apart_and_repeats_the_first_frame_at_the_start():
    sync = cell(step_ms=100)
    seen = []
    for number in range(8):
        stamp = 1000 + round(number * 100 / 3)
        feed(sync, "wrench", *range(stamp - 30, stamp + 1, 10))
        for key in ("joints", "wrist", "front"):
            feed(sync, key, stamp)
        seen.append([f.stamp_ns // MS for f in sync.wait_for(0, 0.0)])
    assert seen[:2] == [[1000, 1000], [1000, 1033]]
    assert seen[3] == [1000, 1100] and seen[6] == [1100, 1200] and seen[7] == [1133, 1233]


def test_keys_that_come_but_never_together_are_named_after_the_reference_is_too_old():
    sync = cell()
    for number in range(20):
        arrival = 33 * number
        feed(sync, "front", 1000 + arrival, arrival_ms=arrival)
        feed(sync, "wrist", 1000 + arrival, arrival_ms=arrival)
        feed(sync, "joints", 500 + arrival, arrival_ms=arrival)  # of a host whose clock is half a second behind
        feed(sync, "wrench", 990 + arrival, arrival_ms=arrival)
        assert bool(sync.stalled(arrival * MS)) == (arrival > 300)
    assert "'joints' is 500.0 ms from it" in sync.stalled(arrival * MS)
    assert sync.dropped > 0


@given(
    st.lists(st.tuples(st.sampled_from(sorted(CELL)), st.integers(0, 400)), max_size=120),
    st.integers(0, 60),
)
def test_whatever_comes_in_whatever_order_frames_hold_every_key_within_its_tolerance(samples, step):
    sync = cell(step_ms=step)
    for key, stamp in samples:
        feed(sync, key, stamp + 1)
        frames = sync.wait_for(0, 0.0)
        if frames is None:
            continue
        assert len(frames) == 2 and frames[0].stamp_ns <= frames[1].stamp_ns
        for frame in frames:
            assert frame.values.keys() == CELL.keys()
            assert abs(float(frame.values["joints"][0]) * MS - frame.stamp_ns) <= sync.tolerances_ns["joints"]
            assert (frame.values["wrench"] <= 10.0).all()


@given(st.lists(st.tuples(st.sampled_from(sorted(CELL)), st.integers(0, 400)), max_size=120))
def test_looking_only_at_what_a_sample_can_complete_leaves_no_frame_out(samples):
    class Thorough(ObservationSynchronizer):
        def _touches(self, entry, stamp_ns, reference_ns):
            return True

    quick, thorough = ObservationSynchronizer(CELL), Thorough(CELL)
    for sync in (quick, thorough):
        sync.begin(0)
    for key, stamp in samples:
        for sync in (quick, thorough):
            feed(sync, key, stamp + 1)
        frames, wanted = (sync.wait_for(0, 0.0) or [] for sync in (quick, thorough))
        assert [frame.stamp_ns for frame in frames] == [frame.stamp_ns for frame in wanted]
        for frame, other in zip(frames, wanted, strict=True):
            assert (frame.values["joints"] == other.values["joints"]).all()
            assert (frame.values["wrench"] == other.values["wrench"]).all()


def test_a_picture_of_another_type_and_a_tolerance_for_no_key_are_refused():
    with pytest.raises(PolicyError, match="'front' is of float32, expected uint8"):
        cell().add("front", 1, PICTURE.astype(np.float32), 0)
    with pytest.raises(PolicyError, match=r"tolerance for rear: the observations are joints, front"):
        cell(rear=1.0)
