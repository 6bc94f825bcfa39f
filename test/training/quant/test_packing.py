from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from training.quant.packing import pack_int4, unpack_int4

codes = hnp.arrays(np.int8, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0), elements=st.integers(-8, 7))


@settings(deadline=None)
@given(array=codes)
def test_packing_is_lossless_and_halves_every_row(array: np.ndarray) -> None:
    packed = pack_int4(array)
    assert packed.dtype == np.uint8
    assert packed.shape == (*array.shape[:-1], (array.shape[-1] + 1) // 2)
    restored = unpack_int4(packed, array.shape[-1])
    assert restored.dtype == np.int8
    np.testing.assert_array_equal(restored, array)


@settings(deadline=None)
@given(array=codes)
def test_tensors_pack_to_the_same_bytes(array: np.ndarray) -> None:
    packed = pack_int4(torch.from_numpy(array))
    np.testing.assert_array_equal(packed.numpy(), pack_int4(array))
    np.testing.assert_array_equal(unpack_int4(packed, array.shape[-1]).numpy(), array)


def test_rows_of_odd_length_end_in_half_a_byte_of_zero() -> None:
    assert pack_int4(np.array([[-8, 7, -1], [1, 2, 3]], np.int8)).tolist() == [[0x78, 0x0F], [0x21, 0x03]]


def test_the_bytes_are_those_of_an_onnx_tensor() -> None:
    array = np.random.default_rng(0).integers(-8, 8, (3, 6)).astype(np.int8)
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, array.shape, pack_int4(array).tobytes(), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), array)


def test_an_even_count_is_assumed() -> None:
    assert unpack_int4(np.array([0x78, 0x0F], np.uint8)).tolist() == [-8, 7, -1, 0]


def test_wrong_types_codes_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="-8 to 7, got 0 to 8"):
        pack_int4(np.array([0, 8], np.int8))
    with pytest.raises(TypeError, match="expected int8, got int32"):
        pack_int4(np.array([0, 1], np.int32))
    with pytest.raises(TypeError, match="expected uint8, got int8"):
        unpack_int4(np.array([0, 1], np.int8))
    with pytest.raises(ValueError, match="2 bytes per row hold 4 codes or one less, got 5"):
        unpack_int4(np.zeros((3, 2), np.uint8), 5)
    for refuse in (lambda: pack_int4(np.array(1, np.int8)), lambda: unpack_int4(np.array(1, np.uint8))):
        with pytest.raises(ValueError, match="at least one dimension"):
            refuse()
