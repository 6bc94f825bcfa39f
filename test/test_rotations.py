"""Rotations as quaternions, matrices and vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcqfa_ros.rotations import (
    interpolate_orientation,
    quaternion_of,
    rotation_from_vector,
    rotation_of,
    rotation_vector,
    transform,
)


def test_a_quaternion_turns_as_its_axis_and_angle_say() -> None:
    quarter = (0.0, 0.0, np.sin(np.pi / 4), np.cos(np.pi / 4))  # about z: x becomes y
    np.testing.assert_allclose(rotation_of(quarter) @ [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(transform((1.0, 2.0, 3.0), quarter) @ [1.0, 0.0, 0.0, 1.0], [1.0, 3.0, 3.0, 1.0])


@given(arrays(np.float64, 4, elements=st.floats(-1, 1)).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_quaternions_survive_the_way_through_matrices(values: np.ndarray) -> None:
    unit = values / np.linalg.norm(values)
    found = quaternion_of(rotation_of(values))
    assert abs(found @ unit) == pytest.approx(1.0, abs=1e-12)
    assert found[3] >= 0.0


@given(arrays(np.float64, 3, elements=st.floats(-1.8, 1.8)))
def test_rotations_survive_the_way_through_vectors_and_quaternions(vector: np.ndarray) -> None:
    rotation = rotation_from_vector(vector)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(rotation_of(quaternion_of(rotation)), rotation, atol=1e-12)
    if np.linalg.norm(vector) < np.pi - 1e-3:
        np.testing.assert_allclose(rotation_vector(rotation), vector, atol=1e-9)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_turns_have_their_quaternions(axis: int) -> None:
    vector = np.pi * np.eye(3)[axis]
    np.testing.assert_allclose(np.abs(quaternion_of(rotation_from_vector(vector))), [*np.eye(3)[axis], 0.0], atol=1e-9)


def test_orientations_are_interpolated_the_short_way() -> None:
    start, end = (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, -np.sin(0.2), -np.cos(0.2))  # the latter is +0.4 rad about z
    middle = interpolate_orientation(start, end, [0.5])[0]
    np.testing.assert_allclose(rotation_vector(middle), [0.0, 0.0, 0.2], atol=1e-12)


@pytest.mark.parametrize("orientation", [(0, 0, 0, 0), (np.nan, 0, 0, 1), (0, 0, 1), (np.inf, 0, 0, 1)])
def test_what_is_no_quaternion_is_refused(orientation: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="quaternion"):
        rotation_of(orientation)
