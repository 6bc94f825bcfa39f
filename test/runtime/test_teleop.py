"""Keys and gamepad messages become twists; whoever lets go stops, and nothing odd moves the arm."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.runtime.teleop import (
    ACTION_KEYS,
    CLOSED,
    MOTION_KEYS,
    OPEN,
    Gamepad,
    JoyMapping,
    KeyAction,
    Keyboard,
    TeleopError,
    Wish,
    bounded_scale,
    twist,
)

MS = 1_000_000
MAPPING = JoyMapping((1, 0, 4, -1, -1, 3), (1.0,) * 6, 0.1, dead_man=4, open_button=1, close_button=0)
CENTRED = [0.0] * 6
FREE = [0] * 6
HELD = [0, 0, 0, 0, 1, 0]


@pytest.fixture
def gamepad() -> Gamepad:
    return Gamepad(MAPPING, timeout_s=0.25)


def forward(value: float = 1.0) -> list[float]:
    return [0.0, value, 0.0, 0.0, 0.0, 0.0]


# gamepad


def test_a_gamepad_moves_only_while_its_dead_man_button_is_held(gamepad: Gamepad) -> None:
    gamepad.receive(forward(), FREE, 0)
    assert not gamepad.wish(1 * MS).engaged
    gamepad.receive(forward(), HELD, 10 * MS)
    assert gamepad.wish(11 * MS).direction.tolist() == [1, 0, 0, 0, 0, 0]
    gamepad.receive(forward(), FREE, 20 * MS)
    assert not gamepad.wish(21 * MS).engaged
    assert not gamepad.wish(21 * MS).direction.any()


def test_a_button_held_since_the_start_moves_nothing_until_it_was_released(gamepad: Gamepad) -> None:
    for i in range(5):
        gamepad.receive(forward(), HELD, i * 10 * MS)
        assert not gamepad.wish(i * 10 * MS).engaged
    gamepad.receive(CENTRED, FREE, 50 * MS)
    gamepad.receive(forward(), HELD, 60 * MS)
    assert gamepad.wish(60 * MS).engaged


def test_a_silent_gamepad_counts_as_let_go_and_must_be_released_when_it_is_back(gamepad: Gamepad) -> None:
    gamepad.receive(CENTRED, FREE, 0)
    gamepad.receive(forward(), HELD, 10 * MS)
    assert gamepad.wish(259 * MS).engaged
    assert not gamepad.wish(261 * MS).engaged
    gamepad.receive(forward(), HELD, 1000 * MS)
    assert not gamepad.wish(1000 * MS).engaged


@pytest.mark.parametrize(
    ("axes", "buttons", "message"),
    [
        ([0.0, 1.0], HELD, "joy: 2 axes, but joy.axes uses number 4"),
        (forward(), [0, 0, 0, 1], "joy: 4 buttons, but number 4 is used"),
        (forward(math.nan), HELD, "not a finite number"),
        (forward(math.inf), HELD, "not a finite number"),
    ],
)
def test_a_message_that_does_not_fit_is_refused_and_lets_go(
    gamepad: Gamepad, axes: list[float], buttons: list[int], message: str
) -> None:
    gamepad.receive(CENTRED, FREE, 0)
    gamepad.receive(forward(), HELD, 10 * MS)
    with pytest.raises(TeleopError, match=message):
        gamepad.receive(axes, buttons, 20 * MS)
    assert gamepad.refused == 1
    gamepad.receive(forward(), HELD, 30 * MS)
    assert not gamepad.wish(30 * MS).engaged


def test_gripper_buttons_count_once_per_press_and_only_with_the_dead_man(gamepad: Gamepad) -> None:
    gamepad.receive(CENTRED, FREE, 0)
    assert gamepad.receive(CENTRED, [1, 0, 0, 0, 0, 0], 5 * MS) is None
    gamepad.receive(CENTRED, FREE, 8 * MS)
    assert gamepad.receive(CENTRED, [1, 0, 0, 0, 1, 0], 10 * MS) == CLOSED
    assert gamepad.receive(CENTRED, [1, 0, 0, 0, 1, 0], 20 * MS) is None
    assert gamepad.receive(CENTRED, [0, 1, 0, 0, 1, 0], 30 * MS) == OPEN


def test_small_deflections_are_none_and_signs_and_unused_axes_count() -> None:
    mapping = dataclasses.replace(MAPPING, signs=(-1.0, 1.0, 0.5, 1.0, 1.0, 1.0))
    gamepad = Gamepad(mapping, 1.0)
    gamepad.receive(CENTRED, FREE, 0)
    gamepad.receive([0.09, 1.0, 0.7, -1.0, 1.0, 0.3], HELD, 0)
    assert gamepad.wish(0).direction.tolist() == [-1.0, 0.0, 0.5, 0.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": (1, 0, 4)}, "joy.axes: expected 6 axis numbers"),
        ({"axes": (-1,) * 6}, "joy.axes: no axis is used"),
        ({"axes": (-2, 0, 0, 0, 0, 0)}, "joy.axes: expected 6"),
        ({"signs": (1.0,) * 5}, "joy.signs: expected 6 factors"),
        ({"signs": (1.0, 1.0, 1.0, 1.0, 1.0, 2.0)}, "joy.signs"),
        ({"signs": (math.nan,) * 6}, "joy.signs"),
        ({"deadzone": 1.0}, "joy.deadzone: expected 0 <= deadzone < 1, got 1.0"),
        ({"dead_man": -1}, "joy.dead_man_button: expected a button number, got -1; it is not optional"),
        ({"open_button": 4}, "joy buttons: expected different numbers"),
    ],
)
def test_a_mapping_that_cannot_work_is_refused_by_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(TeleopError, match=message):
        dataclasses.replace(MAPPING, **change)  # type: ignore[arg-type]


@given(
    st.lists(st.floats(width=32), max_size=8),
    st.lists(st.integers(-1, 2), max_size=8),
    st.floats(0.0, 1.0),
)
def test_whatever_a_gamepad_sends_the_twist_is_finite_and_bounded(
    axes: list[float], buttons: list[int], scale: float
) -> None:
    gamepad = Gamepad(MAPPING, 0.25)
    gamepad.receive(CENTRED, FREE, 0)
    try:
        gamepad.receive(axes, buttons, 1)
    except TeleopError:
        assert not gamepad.wish(2).engaged
    values = twist(gamepad.wish(2), 0.05, 0.2, scale)
    assert np.isfinite(values).all()
    assert np.linalg.norm(values[:3]) <= 0.05 * scale + 1e-12
    assert np.linalg.norm(values[3:]) <= 0.2 * scale + 1e-12


def test_diagonal_motion_is_no_faster_than_straight_motion() -> None:
    values = twist(Wish(np.array([1.0, 1.0, 1.0, 0.5, 0.0, 0.0]), engaged=True), 0.05, 0.2, 0.5)
    assert np.linalg.norm(values[:3]) == pytest.approx(0.025)
    assert values[3] == pytest.approx(0.05)


# keyboard


def test_a_key_moves_while_it_repeats_and_no_longer() -> None:
    keyboard = Keyboard(0.2)
    keyboard.feed(b"w", 0)
    assert keyboard.wish(199 * MS).direction.tolist() == [1, 0, 0, 0, 0, 0]
    assert not keyboard.wish(201 * MS).engaged
    keyboard.feed(b"www", 150 * MS)
    assert keyboard.wish(349 * MS).engaged


@pytest.mark.parametrize("key", sorted(MOTION_KEYS))
def test_every_motion_key_moves_one_axis(key: str) -> None:
    keyboard = Keyboard(0.2)
    assert keyboard.feed(key.encode(), 0) is None
    axis, sign = MOTION_KEYS[key]
    assert keyboard.wish(1).direction[axis] == sign
    assert np.count_nonzero(keyboard.wish(1).direction) == 1


@pytest.mark.parametrize("text", [b"make me", b"wm", b"mw", b"git\n", "w\u00e9".encode()])
def test_pasted_text_neither_moves_nor_arms(text: bytes) -> None:
    keyboard = Keyboard(0.2)
    keyboard.feed(b"w", 0)
    action = keyboard.feed(text, 1)
    assert action in (None, KeyAction.STOP)
    assert not keyboard.wish(2).engaged


@pytest.mark.parametrize("text", [b" ", b"\x1b", b"www ", b"m w", b"d\x1b"])
def test_stop_keys_count_among_any_others(text: bytes) -> None:
    keyboard = Keyboard(0.2)
    keyboard.feed(b"w", 0)
    assert keyboard.feed(text, 1) is KeyAction.STOP
    assert not keyboard.wish(2).engaged


@pytest.mark.parametrize("sequence", [b"\x1b[A", b"\x1bOP", b"\x1b[15~", b"\x1b[1;5C", "ä".encode(), b"z", b"\x00"])
def test_keys_without_meaning_are_ignored(sequence: bytes) -> None:
    keyboard = Keyboard(0.2)
    assert keyboard.feed(sequence, 0) is None
    assert not keyboard.wish(1).engaged


def test_action_keys() -> None:
    for key, action in ACTION_KEYS.items():
        assert Keyboard(0.2).feed(key.encode(), 0) is action


@given(st.lists(st.tuples(st.binary(max_size=12), st.integers(0, 10**9)), max_size=10))
def test_no_bytes_break_the_keyboard_and_motion_always_ends(chunks: list[tuple[bytes, int]]) -> None:
    keyboard, now = Keyboard(0.2), 0
    for data, pause in chunks:
        now += pause
        keyboard.feed(data, now)
        wish = keyboard.wish(now)
        assert np.abs(wish.direction).sum() <= 1.0
    assert not keyboard.wish(now + 200 * MS).engaged


def test_the_scale_stays_within_its_range() -> None:
    assert (bounded_scale(0.0), bounded_scale(0.3), bounded_scale(5.0)) == (0.05, 0.3, 1.0)
