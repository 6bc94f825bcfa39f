"""The raw image path: equal to rclpy's own conversion, zero copy, and nothing but ImageError on bad input."""

from __future__ import annotations

import contextlib
import struct
from array import array as byte_array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage, Image

from dcqfa_ros.ros.images import (
    ENCODINGS,
    ImageError,
    ImageView,
    decode_image,
    encode_compressed_image,
    encode_image,
)


def picture(encoding: str, height: int, width: int, seed: int = 0) -> np.ndarray:
    form = ENCODINGS[encoding]
    shape = (height, width) if form.channels == 1 else (height, width, form.channels)
    raw = np.random.default_rng(seed).integers(0, 256, size=(*shape, form.dtype.itemsize), dtype=np.uint8)
    return raw.view(form.dtype).reshape(shape)


def message(encoding: str, pixels: np.ndarray, frame_id: str, stamp: tuple[int, int]) -> Image:
    image = Image()
    image.header.stamp.sec, image.header.stamp.nanosec = stamp
    image.header.frame_id = frame_id
    image.height, image.width = pixels.shape[:2]
    image.encoding = encoding
    image.step = pixels.nbytes // pixels.shape[0]
    data = byte_array("B")
    data.frombytes(pixels.tobytes())
    image.data = data
    return image


images = st.tuples(
    st.sampled_from(sorted(ENCODINGS)),
    st.integers(1, 9),
    st.integers(1, 9),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20),
    st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(0, 999_999_999)),
)


@given(images)
@settings(max_examples=80, deadline=None)
def test_encoded_bytes_are_the_message_rclpy_reads(spec) -> None:
    encoding, height, width, frame_id, stamp = spec
    pixels = picture(encoding, height, width)
    expected = message(encoding, pixels, frame_id, stamp)
    data = encode_image(stamp, frame_id, pixels, encoding)
    assert deserialize_message(data, Image) == expected
    assert len(data) == len(serialize_message(expected))


@given(images)
@settings(max_examples=80, deadline=None)
def test_decodes_what_rclpy_writes(spec) -> None:
    encoding, height, width, frame_id, stamp = spec
    pixels = picture(encoding, height, width)
    view = decode_image(serialize_message(message(encoding, pixels, frame_id, stamp)))
    assert (view.stamp, view.frame_id, view.encoding) == (stamp, frame_id, encoding)
    assert view.array.shape == pixels.shape
    assert view.array.tobytes() == pixels.tobytes()


@given(images, st.binary(max_size=40))
@settings(max_examples=50, deadline=None)
def test_compressed_bytes_are_the_message_rclpy_reads(spec, data: bytes) -> None:
    _, _, _, frame_id, stamp = spec
    expected = CompressedImage()
    expected.header.stamp.sec, expected.header.stamp.nanosec = stamp
    expected.header.frame_id, expected.format = frame_id, "jpeg"
    expected.data = byte_array("B", data)
    written = encode_compressed_image(stamp, frame_id, "jpeg", data)
    assert deserialize_message(written, CompressedImage) == expected
    assert len(written) == len(serialize_message(expected))


def test_decoding_copies_no_pixels() -> None:
    data = encode_image((1, 2), "front", picture("rgb8", 480, 640), "rgb8")
    view = decode_image(data)
    start = view.array.__array_interface__["data"][0]
    whole = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    assert whole < start < whole + len(data)
    assert view.array.flags.c_contiguous
    assert not view.array.flags.writeable
    assert view.stamp_ns == 1_000_000_002


@pytest.mark.parametrize("encoding", ["16UC1", "32FC1"])
def test_depth_is_aligned_whatever_the_length_of_the_frame_name(encoding: str) -> None:
    for n in range(8):
        data = encode_image((0, 0), "f" * n, picture(encoding, 3, 5), encoding)
        view = decode_image(data)
        assert (len(data) - view.array.nbytes) % 4 == 0
        np.testing.assert_array_equal(view.array.view(np.uint8), picture(encoding, 3, 5).view(np.uint8))


def test_pixels_of_either_byte_order_keep_their_values() -> None:
    depth = np.arange(12, dtype=np.uint16).reshape(3, 4) * 257 + 1
    for order in ("<", ">"):
        data = encode_image((0, 0), "d", depth.astype(depth.dtype.newbyteorder(order)), "16UC1")
        assert deserialize_message(data, Image).is_bigendian == (order == ">")
        np.testing.assert_array_equal(decode_image(data).array, depth)


def big_endian_message(pixels: np.ndarray, step: int) -> bytes:
    """A mono8 message as a big-endian writer lays it out, with padded rows."""
    rows = b"".join(row.tobytes().ljust(step, b"\xee") for row in pixels)
    head = struct.pack(">iI", 3, 4) + struct.pack(">I", 4) + b"cam\0"
    head += struct.pack(">II", *pixels.shape) + struct.pack(">I", 6) + b"mono8\0" + b"\0"
    head += bytes(-len(head) % 4)
    return b"\x00\x00\x00\x00" + head + struct.pack(">II", step, len(rows)) + rows


def test_reads_a_big_endian_message_with_padded_rows() -> None:
    pixels = picture("mono8", 4, 5)
    view = decode_image(big_endian_message(pixels, step=8))
    assert (view.stamp, view.frame_id) == ((3, 4), "cam")
    np.testing.assert_array_equal(view.array, pixels)


def test_non_contiguous_pixels_are_written_in_order() -> None:
    pixels = picture("rgb8", 6, 8)[::2, ::-1]
    np.testing.assert_array_equal(decode_image(encode_image((0, 0), "c", pixels, "rgb8")).array, pixels)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_an_image_error_or_an_image(data: bytes) -> None:
    with contextlib.suppress(ImageError):
        assert isinstance(decode_image(data), ImageView)


@given(st.data(), st.sampled_from(sorted(ENCODINGS)))
@settings(max_examples=300, deadline=None)
def test_damaged_messages_are_an_image_error_or_an_image(data, encoding: str) -> None:
    whole = bytearray(encode_image((1, 2), "cam", picture(encoding, 3, 4), encoding))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        view = decode_image(damaged)
        view.array.sum()  # every pixel can be read
    except ImageError:
        pass


@pytest.mark.parametrize("cut", [0, 3, 4, 10, 17, 30, 50, -1])
def test_a_truncated_message_is_refused(cut: int) -> None:
    data = encode_image((1, 2), "cam", picture("rgb8", 3, 4), "rgb8")
    with pytest.raises(ImageError, match=r"message|encapsulation|ends"):
        decode_image(data[:cut])


def test_unknown_encodings_are_refused_by_name() -> None:
    other = message("mono8", picture("mono8", 2, 2), "c", (0, 0))
    other.encoding = "bayer_rggb8"
    with pytest.raises(ImageError, match="'bayer_rggb8' is not supported, expected one of rgb8"):
        decode_image(serialize_message(other))
    with pytest.raises(ImageError, match="'yuv422'"):
        encode_image((0, 0), "c", picture("mono8", 2, 2), "yuv422")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("step", 5, "step is 5, expected at least 12"),
        ("step", 13, "data has 36 bytes, expected step x height = 39"),
        ("height", 0, "height x width is 0 x 4"),
        ("height", 2**31, "expected step x height"),
        ("width", 2**31, "step is 12"),
        ("is_bigendian", 7, "is_bigendian is 7"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(field: str, value: int, words: str) -> None:
    image = message("rgb8", picture("rgb8", 3, 4), "c", (0, 0))
    setattr(image, field, value)
    with pytest.raises(ImageError, match=words):
        decode_image(serialize_message(image))


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((2, 3), np.uint8), "shape"),
        (np.zeros((2, 3, 4), np.uint8), "shape"),
        (np.zeros((2, 3, 3), np.float32), "dtype float32, expected uint8"),
        (np.zeros((0, 3, 3), np.uint8), "empty"),
    ],
)
def test_arrays_that_do_not_fit_the_encoding_are_refused(pixels: np.ndarray, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        encode_image((0, 0), "c", pixels, "rgb8")


@pytest.mark.parametrize(
    ("stamp", "frame", "words"),
    [
        ((0, 10**9), "c", "stamp"),
        ((2**31, 0), "c", "stamp"),
        ((0, 0), "a\0b", "NUL"),
        ((0, 0), "\ud800", "Unicode"),
        ((0, 0), "x" * 5000, "bytes"),
    ],
)
def test_headers_a_ros_message_cannot_carry_are_refused(stamp, frame: str, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        encode_image(stamp, frame, np.zeros((2, 3, 3), np.uint8), "rgb8")


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_equals_cv_bridge_where_it_is_installed(encoding: str) -> None:
    cv_bridge = pytest.importorskip(
        "cv_bridge", exc_type=ImportError, reason="cv_bridge is not installed: no reference to compare with"
    )
    pixels = picture(encoding, 5, 7)
    data = encode_image((1, 2), "c", pixels, encoding)
    reference = cv_bridge.CvBridge().imgmsg_to_cv2(deserialize_message(data, Image), desired_encoding="passthrough")
    assert decode_image(data).array.tobytes() == np.ascontiguousarray(reference).tobytes()
