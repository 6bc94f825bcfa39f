"""Arrays survive the way through ROS messages bit for bit; messages that break their promise are refused."""

from __future__ import annotations

import time

import numpy as np
import pytest
from geometry_msgs.msg import PoseStamped
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rclpy.clock import Clock, ClockType, ROSClock
from rclpy.serialization import deserialize_message, serialize_message
from rclpy.time import Time
from trajectory_msgs.msg import MultiDOFJointTrajectory

from dcqfa_ros.ros import conversions as c
from dcqfa_ros.runtime.consumption import Report

PIXELS = st.floats(-600, 600, width=32)
UNITS = 1024.0  # px per metre: a power of two, so that the conversion is exact


def through_the_wire(message):
    return deserialize_message(serialize_message(message), type(message))


@given(st.integers(0, 2**31 * c.NS - 1))
def test_stamps_keep_every_nanosecond(stamp):
    assert c.from_time(c.to_time(stamp)) == stamp


@pytest.mark.parametrize("clock", [ROSClock(), Clock(clock_type=ClockType.SYSTEM_TIME)])
def test_an_instant_on_the_clock_is_its_time_less_what_has_passed(clock):
    begin = clock.now().nanoseconds
    second_ago = time.monotonic_ns() - c.NS
    told = c.at_monotonic(clock, second_ago)
    # A process that is halted between two clocks is told a little too early.
    assert begin - 50_000_000 <= told + c.NS <= clock.now().nanoseconds


def test_simulated_time_stands_still():
    clock = ROSClock()
    clock._set_ros_time_is_active(True)
    clock.set_ros_time_override(Time(nanoseconds=5 * c.NS, clock_type=ClockType.ROS_TIME))
    assert c.at_monotonic(clock, time.monotonic_ns() - c.NS) == 5 * c.NS


@given(arrays(np.float32, (9, 2), elements=PIXELS))
def test_key_points_come_back_bit_for_bit(points):
    message = through_the_wire(c.points_message(5, "table", points, UNITS))
    assert (c.observation_array(message, (9, 2), UNITS).astype(np.float32) == points).all()


@given(arrays(np.float32, (2,), elements=PIXELS))
def test_the_tool_position_comes_back_bit_for_bit(xy):
    message = through_the_wire(c.planar_pose_message(5, "table", xy, UNITS))
    assert (c.observation_array(message, (2,), UNITS).astype(np.float32) == xy).all()
    assert message.header.frame_id == "table"


@given(arrays(np.float32, st.tuples(st.integers(1, 16), st.just(2)), elements=PIXELS), st.integers(1, 10**9))
def test_a_chunk_comes_back_bit_for_bit_with_its_period(actions, period):
    message = through_the_wire(c.planar_chunk_message(7, "table", actions, period, UNITS))
    back, back_period = c.planar_chunk_actions(message, "table", UNITS)
    assert (back == actions).all() and c.from_time(message.header.stamp) == 7
    assert back_period == (period if len(actions) > 1 else 0)


def chunk() -> MultiDOFJointTrajectory:
    return c.planar_chunk_message(7, "table", np.zeros((3, 2)), 10, UNITS)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda m: setattr(m.header, "frame_id", "world"), "frame_id is 'world', expected 'table'"),
        (lambda m: setattr(m, "joint_names", ["elbow"]), "joint_names"),
        (lambda m: setattr(m, "points", []), "at least one point"),
        (lambda m: setattr(m.points[1], "transforms", []), "exactly one transform"),
        (lambda m: setattr(m.points[2].time_from_start, "nanosec", 25), "rise evenly"),
        (lambda m: setattr(m.points[0].time_from_start, "nanosec", 5), "begin at 0"),
    ],
)
def test_a_malformed_chunk_is_refused_by_field(spoil, text):
    message = chunk()
    spoil(message)
    with pytest.raises(c.MessageError, match=text):
        c.planar_chunk_actions(message, "table", UNITS)


def test_an_observation_of_another_size_or_type_is_refused():
    with pytest.raises(c.MessageError, match=r"\(2,\).*\(9, 2\)"):
        c.observation_array(PoseStamped(), (9, 2), UNITS)
    with pytest.raises(c.MessageError, match="cannot be read"):
        c.observation_array(chunk(), (2,), UNITS)


def test_status_values_are_text_that_reads_back_as_the_same_number():
    message = through_the_wire(c.status_message(1, "cell", 0, "text", {"score": 0.1 + 0.2, "step": 3, "done": False}))
    values = c.status_values(message)
    assert float(values["score"]) == 0.1 + 0.2 and values["step"] == "3" and values["done"] == "False"


def test_a_status_message_without_a_status_is_refused():
    message = c.status_message(1, "cell", 0, "", {})
    message.status = []
    with pytest.raises(c.MessageError, match="without a status"):
        c.status_values(message)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=6, max_size=6), st.none() | st.integers(0, 2**62))
def test_what_the_arm_consumed_comes_back_as_it_was(numbers, following):
    report = Report(*numbers, following)
    assert c.consumption_report(c.consumption_message(report)) == report


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"consumed": "-1"}, "negative"),
        ({"next": "-1"}, "negative"),
        ({"begun": "x"}, "invalid literal"),
        ({"buffered": None}, "KeyError"),
    ],
)
def test_a_malformed_word_on_consumption_is_refused(change, text):
    message = c.consumption_message(Report(1, 2, 3, 4, 5, 6))
    values = c.status_values(message) | change
    kept = {key: value for key, value in values.items() if value is not None}
    with pytest.raises(c.MessageError, match=text):
        c.consumption_report(c.status_message(2, "consumption", 0, "", kept))
