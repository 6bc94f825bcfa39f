"""Device time becomes monotonic host time: jitter of arrival goes, drift is followed, jumps start over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.drivers.device_clock import DeviceClock

MS = 1_000_000
PERIOD = 33 * MS


def test_jitter_of_arrival_does_not_reach_the_stamps() -> None:
    clock = DeviceClock()
    delays = [5, 20, 3, 9, 3, 15, 4, 30, 3]
    stamps = [clock.stamp(n * PERIOD, 10**12 + n * PERIOD + d * MS) for n, d in enumerate(delays)]
    assert stamps[2:] == [10**12 + n * PERIOD + 3 * MS for n in range(2, len(delays))]


def test_drift_of_the_device_is_followed() -> None:
    clock = DeviceClock()
    for n in range(3000):  # 100 s, the device runs 100 ppm slow
        arrival = 10**12 + n * PERIOD
        stamp = clock.stamp(round(n * PERIOD * (1 - 1e-4)), arrival)
    assert abs(arrival - stamp) < 1.1 * MS


def test_a_device_that_counts_anew_starts_over_and_stamps_still_grow() -> None:
    clock = DeviceClock()
    before = [clock.stamp(n * PERIOD, 10**12 + n * PERIOD) for n in range(10)]
    after = [clock.stamp(n * PERIOD, 10**12 + (20 + n) * PERIOD) for n in range(3)]
    assert after == [10**12 + (20 + n) * PERIOD for n in range(3)]
    assert after[0] > before[-1]
    assert clock.resets == 1


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 10**10)), min_size=1, max_size=60))
def test_whatever_the_device_says_stamps_never_run_back_nor_ahead(steps) -> None:
    clock, arrival, last = DeviceClock(), 10**12, 0
    for device, wait in steps:
        arrival += wait
        stamp = clock.stamp(device, arrival)
        assert last <= stamp <= arrival
        last = stamp
