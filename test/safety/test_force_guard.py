"""Contact slows the arm down, stops it, and lets it back away a little; every threshold has hysteresis."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.safety.cartesian_limits import LimitError
from dcqfa_ros.safety.force_guard import FORCE_RANGES, Contact, ForceGuard, ForceLimits
from dcqfa_ros.safety.stops import StopCode

LIMITS = ForceLimits(
    slow_force=15.0,
    slow_force_below=10.0,
    stop_force=30.0,
    stop_force_below=8.0,
    slow_torque=1.5,
    slow_torque_below=1.0,
    stop_torque=3.0,
    stop_torque_below=0.8,
    slow_factor=0.3,
    retreat_distance=0.02,
    retreat_speed=0.01,
)
NONE = np.zeros(3)


def push(newtons: float) -> np.ndarray:
    return np.array([0.0, 0.0, newtons])


def test_slowing_down_has_hysteresis() -> None:
    guard = ForceGuard(LIMITS)
    factors = []
    for newtons in (0, 14, 15, 12, 10, 9.9, 12, 15):
        assert guard.feed(push(newtons), NONE) is None
        factors.append(guard.factor)
    assert factors == [1.0, 1.0, 0.3, 0.3, 0.3, 1.0, 1.0, 0.3]
    assert guard.slowed == 2


@pytest.mark.parametrize(("force", "torque", "code"), [(30.0, 0.0, StopCode.FORCE), (0.0, 3.0, StopCode.TORQUE)])
def test_one_crossing_wrench_stops_and_the_stop_stays(force: float, torque: float, code: StopCode) -> None:
    guard = ForceGuard(LIMITS)
    stop = guard.feed(push(force), push(torque))
    assert stop is not None and stop.code is code and "limit" in stop.text
    assert guard.feed(push(100.0), NONE) is None, "one stop, not one per wrench"
    assert "100.0 N" in str(guard.obstacle())
    guard.feed(push(1.0), NONE)
    assert guard.factor == 0.0 and guard.obstacle() is None
    guard.reset()
    assert guard.factor == 1.0


def test_retreat_goes_along_the_contact_normal_until_the_force_is_gone() -> None:
    guard = ForceGuard(LIMITS)
    guard.feed(np.array([0.0, 24.0, 32.0]), NONE)
    assert guard.wants_retreat
    guard.begin_retreat(NONE, 0)
    assert guard.contact is Contact.RETREAT
    assert guard.retreat(NONE, 1) == pytest.approx([0.0, 0.006, 0.008])
    guard.feed(push(7.9), NONE)
    assert guard.retreat(NONE, 1) is None
    assert guard.contact is Contact.STOPPED and not guard.wants_retreat


@given(st.lists(st.floats(-0.03, 0.03), min_size=3, max_size=3))
def test_retreat_ends_at_its_distance_in_any_direction(offset: list[float]) -> None:
    guard = ForceGuard(LIMITS)
    guard.feed(push(40.0), NONE)
    guard.begin_retreat(NONE, 0)
    velocity = guard.retreat(np.array(offset), 1)
    assert (velocity is None) == (np.linalg.norm(offset) >= LIMITS.retreat_distance)


def test_no_retreat_from_a_torque_or_without_a_distance_or_into_nowhere() -> None:
    guard = ForceGuard(LIMITS)
    guard.feed(NONE, push(5.0))
    assert not guard.wants_retreat
    still = ForceGuard(replace(LIMITS, retreat_distance=0.0))
    still.feed(push(40.0), NONE)
    still.begin_retreat(NONE, 0)
    assert still.contact is Contact.STOPPED and still.retreat(NONE, 1) is None
    lost = ForceGuard(LIMITS)
    lost.feed(push(40.0), NONE)
    lost.begin_retreat(NONE, 0)
    assert lost.retreat(np.full(3, np.nan), 1) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_wrench_that_is_not_finite_stops_even_while_retreating(value: float) -> None:
    guard = ForceGuard(LIMITS)
    stop = guard.feed(push(value), NONE)
    assert stop is not None and stop.code is StopCode.WRENCH_NOT_FINITE
    guard = ForceGuard(LIMITS)
    guard.feed(push(40.0), NONE)
    guard.begin_retreat(NONE, 0)
    stop = guard.feed(NONE, push(value))
    assert stop is not None and stop.code is StopCode.WRENCH_NOT_FINITE
    assert guard.retreat(NONE, 1) is None and not guard.wants_retreat
    assert guard.feed(NONE, push(value)) is None, "one stop, not one per wrench"


def test_a_wrench_that_is_not_finite_takes_back_the_wish_to_retreat() -> None:
    guard = ForceGuard(LIMITS)
    guard.feed(push(40.0), NONE)
    guard.feed(push(np.nan), NONE)
    guard.begin_retreat(NONE, 0)
    assert guard.contact is Contact.STOPPED and guard.retreat(NONE, 1) is None


def test_a_retreat_that_is_pushed_back_ends_at_once() -> None:
    guard = ForceGuard(LIMITS)
    guard.feed(push(40.0), NONE)
    guard.begin_retreat(NONE, 0)
    assert guard.feed(push(50.0), NONE) is None, "the contact it backs away from"
    stop = guard.feed(push(-15.0), NONE)
    assert stop is not None and stop.code is StopCode.FORCE and "against the retreat" in stop.text
    assert guard.retreat(NONE, 1) is None and not guard.wants_retreat


def test_a_retreat_that_leads_deeper_into_the_contact_ends_at_once() -> None:
    guard = ForceGuard(LIMITS)
    guard.feed(push(40.0), NONE)
    guard.begin_retreat(NONE, 0)
    stop = guard.feed(push(54.0), NONE)
    assert stop is not None and stop.code is StopCode.FORCE and guard.retreat(NONE, 1) is None


def test_a_retreat_that_gets_nowhere_ends_after_twice_its_time() -> None:
    guard = ForceGuard(LIMITS)
    guard.feed(push(40.0), NONE)
    guard.begin_retreat(NONE, 0)
    assert guard.retreat(NONE, 4_900_000_000) is not None
    assert guard.retreat(NONE, 5_100_000_000) is None and guard.contact is Contact.STOPPED


def test_a_force_beyond_all_measure_stops_as_well() -> None:
    guard = ForceGuard(LIMITS)
    stop = guard.feed(push(1e300), NONE)
    assert stop is not None and stop.code is StopCode.FORCE


@pytest.mark.parametrize("name", list(FORCE_RANGES))
def test_thresholds_that_are_absent_or_out_of_range_are_refused(name: str) -> None:
    for value in (float("nan"), FORCE_RANGES[name][1] * 1.01, -1.0):
        with pytest.raises(LimitError, match=name):
            ForceLimits(**{**asdict(LIMITS), name: value})


def test_thresholds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(LimitError, match="slow_force_below < slow_force"):
        replace(LIMITS, slow_force_below=20.0)
    with pytest.raises(LimitError, match="stop_torque_below"):
        replace(LIMITS, stop_torque_below=3.0)
