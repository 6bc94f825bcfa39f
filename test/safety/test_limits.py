"""The last gate before the arm: nothing outside the box and nothing non-finite passes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.safety.limits import BoxLimit, NotFiniteActionError

ANY = st.floats(allow_nan=True, allow_infinity=True, width=64)


def box() -> BoxLimit:
    return BoxLimit(("x", "y"), (0.0, -5.0), (512.0, 5.0))


@given(st.tuples(ANY, ANY))
def test_every_action_is_either_refused_or_inside_the_box(action):
    limit = box()
    if all(map(math.isfinite, action)):
        bounded = limit.apply(np.array(action))
        assert (bounded >= limit.minimum).all() and (bounded <= limit.maximum).all()
        assert limit.clamped == int(not np.array_equal(bounded, action))
    else:
        with pytest.raises(NotFiniteActionError, match=r"dimension '[xy]'"):
            limit.apply(np.array(action))
        assert limit.clamped == 0


def test_an_action_inside_the_box_is_passed_on_unchanged_and_not_counted():
    limit = box()
    assert limit.apply(np.array([1.5, 2.5])).tolist() == [1.5, 2.5]
    assert limit.clamped == 0


@pytest.mark.parametrize(
    ("minimum", "maximum", "text"),
    [((0, 0), (1,), "1 maximum"), ((0, 1), (1, 1), "'y'"), ((0, float("nan")), (1, 1), "finite")],
)
def test_a_box_that_makes_no_sense_is_refused_by_name(minimum, maximum, text):
    with pytest.raises(ValueError, match=text):
        BoxLimit(("x", "y"), minimum, maximum)


def test_an_action_of_another_length_is_refused():
    with pytest.raises(NotFiniteActionError, match="shape"):
        box().apply(np.zeros(3))
