"""Pictures of the table: a pure function with everything where the state says."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.sim.render import AGENT, BLOCK, FLOOR, GOAL, TABLE, TARGET, render
from dcqfa_ros.sim.tee import GOAL_POSE, legacy_state, to_table

STATE = np.array([100.0, 120.0, 350.0, 150.0, 0.3])


def pixel(image: np.ndarray, x: float, y: float) -> tuple[int, ...]:
    """Colour at a table position."""
    height, width = image.shape[:2]
    side = min(width, height)
    column = int(x * side / 512 + (width - side) / 2)
    row = int(y * side / 512 + (height - side) / 2)
    return tuple(int(v) for v in image[row, column])


@pytest.mark.parametrize(("width", "height"), [(96, 96), (480, 480), (640, 480), (480, 640)])
def test_agent_block_goal_and_target_are_where_the_state_says(width: int, height: int) -> None:
    image = render(STATE, width, height, target=(60.0, 440.0))
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8
    assert pixel(image, 100, 120) == AGENT
    block = to_table([[0.0, 15.0], [0.0, 100.0]], STATE[2:])
    assert [pixel(image, *point) for point in block] == [BLOCK, BLOCK]
    assert pixel(image, *to_table([[0.0, 15.0]], GOAL_POSE)[0]) == GOAL
    assert pixel(image, 430, 430) == TABLE
    red, green, blue = pixel(image, 60, 440)
    assert red > 180
    assert green < 140
    assert blue < 150
    if width != height:
        assert tuple(int(v) for v in image[2, 2]) == FLOOR


def test_rendering_is_pure() -> None:
    state, target = STATE.copy(), np.array([60.0, 440.0])
    first = render(state, 320, 240, target)
    expected = first.copy()
    first[...] = 0  # the caller owns the picture
    render(legacy_state(3), 320, 240)
    np.testing.assert_array_equal(render(state, 320, 240, target), expected)
    np.testing.assert_array_equal(state, STATE)
    np.testing.assert_array_equal(target, [60.0, 440.0])


def test_without_a_target_there_is_no_cross() -> None:
    image = render(STATE, 480, 480)
    assert not (np.abs(image.astype(int) - TARGET).sum(axis=2) < 60).any()


def test_pictures_of_different_sizes_show_the_same_scene() -> None:
    large = render(legacy_state(5), 480, 480)
    small = render(legacy_state(5), 240, 240)
    shrunk = cv2.resize(large, (240, 240), interpolation=cv2.INTER_AREA)
    assert np.abs(shrunk.astype(int) - small).mean() < 2.5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e12, 1e12), min_size=5, max_size=5), st.sampled_from([16, 97, 200]))
def test_any_finite_state_can_be_drawn(state: list[float], size: int) -> None:
    assert render(state, size, 100, target=state[:2]).shape == (100, size, 3)


def test_what_cannot_be_drawn_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="width"):
        render(STATE, 8, 100)
    with pytest.raises(ValueError, match="height"):
        render(STATE, 100, 10_000)
    with pytest.raises(ValueError, match="state"):
        render([np.nan] * 5, 100, 100)
    with pytest.raises(ValueError, match="target"):
        render(STATE, 100, 100, target=(1.0, np.inf))
