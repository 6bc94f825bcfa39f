"""Normalisation is affine, invertible and float32 at its ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.bundle.schema import NormalizerSpec
from dcqfa_ros.runtime.normalize import Normalizer

SCALES = st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3)
VALUES = st.floats(-1e3, 1e3, width=32)


def spec(scale: list[float], offset: list[float]) -> NormalizerSpec:
    return NormalizerSpec(kind="min_max", scale=tuple(scale), offset=tuple(offset))


@given(st.data(), st.integers(1, 6))
def test_denormalize_inverts_normalize(data: st.DataObject, size: int) -> None:
    fixed = [
        data.draw(st.lists(values, min_size=size, max_size=size)) for values in (SCALES, st.floats(-1.0, 1.0), VALUES)
    ]
    scale, offset, raw = fixed
    normalizer = Normalizer(spec(scale, offset), (size,))
    array = np.array(raw, np.float32)
    back = normalizer.denormalize(normalizer.normalize(array))
    # float32 holds the normalised value to 2**-24 of its size; offsets up to 1 may dominate it
    bound = 2.0**-23 * (np.abs(array) + (1.0 + np.abs(offset)) / np.abs(scale)) + 1e-6
    assert back.dtype == np.float32
    assert (np.abs(back - array) <= bound).all()


def test_entries_per_scalar_follow_the_flattened_shape() -> None:
    normalizer = Normalizer(spec([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 10.0]), (2, 2))
    assert normalizer.normalize(np.ones((5, 2, 2), np.float32))[3].tolist() == [[1.0, 2.0], [3.0, 14.0]]


def test_entries_per_last_axis_are_shared_by_the_others() -> None:
    normalizer = Normalizer(spec([1.0, 2.0], [0.5, 0.0]), (9, 2))
    assert normalizer.normalize(np.ones((1, 9, 2), np.float32))[0, 7].tolist() == [1.5, 2.0]


def test_identity_changes_nothing() -> None:
    normalizer = Normalizer(NormalizerSpec(kind="identity"), (2,))
    array = np.array([[1.5, -2.25]], np.float32)
    assert np.array_equal(normalizer.normalize(array), array)
    assert np.array_equal(normalizer.denormalize(array), array)


def test_wrong_number_of_entries_is_refused() -> None:
    with pytest.raises(ValueError, match="3 entries, expected 18"):
        Normalizer(spec([1.0] * 3, [0.0] * 3), (9, 2))
