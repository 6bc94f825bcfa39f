"""``sensor_msgs/msg/Image`` as raw CDR bytes: the image path without a message object per frame.

A generated Python message holds its pixels in an ``array.array`` that rclpy fills and empties on every conversion; with
two camera streams that alone moved the control tick by milliseconds. So publishers send the bytes of
:func:`encode_image` with ``publisher.publish(data)`` and subscribers (``raw=True``) read them with
:func:`decode_image`, which copies nothing.

The layout is plain CDR version 1 as every ROS 2 RMW writes it: four bytes of encapsulation (``00 01`` little-endian or
``00 00`` big-endian, then two option bytes), after which every number is aligned to its own size, counted from the end
of those four bytes (OMG CORBA 3.3 part 2, 9.3; DDSI-RTPS 2.5, 10.2)::

    int32 sec, uint32 nanosec, string frame_id, uint32 height, uint32 width,
    string encoding, uint8 is_bigendian, uint32 step, sequence<uint8> data

A string is a uint32 length that counts its closing NUL, then the characters; a sequence is a uint32 length, then bytes.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

_INT32_MIN, _INT32_MAX, _UINT32_MAX = -(2**31), 2**31 - 1, 2**32 - 1
_MAX_STRING = 4096  # no frame or encoding is longer; a damaged length must not be believed


@dataclass(frozen=True, slots=True)
class _Encoding:
    """One pixel format: scalar type and number of channels (1 is stored as a 2-D array)."""

    dtype: np.dtype
    channels: int


ENCODINGS = MappingProxyType(
    {
        "rgb8": _Encoding(np.dtype(np.uint8), 3),
        "bgr8": _Encoding(np.dtype(np.uint8), 3),
        "rgba8": _Encoding(np.dtype(np.uint8), 4),
        "mono8": _Encoding(np.dtype(np.uint8), 1),
        "16UC1": _Encoding(np.dtype(np.uint16), 1),
        "32FC1": _Encoding(np.dtype(np.float32), 1),
    }
)
"""Encodings this path handles. Others are refused by name: cv_bridge converts them where it is installed."""


class ImageError(ValueError):
    """An image that cannot be written or read; the message names the field and what was expected."""


@dataclass(frozen=True, slots=True)
class ImageView:
    """A decoded image whose pixels are still those of the received bytes.

    Attributes:
        stamp: (seconds, nanoseconds) of the header.
        frame_id: frame of the header.
        encoding: one of :data:`ENCODINGS`.
        array: read-only, (height, width, channels) uint8 for ``rgb8``, ``bgr8``, ``rgba8``; (height, width) uint8,
            uint16 or float32 for ``mono8``, ``16UC1`` (by ROS convention millimetres of depth) and ``32FC1``
            (metres). Byte order is that of the sender; rows may be padded (strides).
    """

    stamp: tuple[int, int]
    frame_id: str
    encoding: str
    array: NDArray

    @property
    def stamp_ns(self) -> int:
        """Stamp of the header in nanoseconds."""
        return self.stamp[0] * 1_000_000_000 + self.stamp[1]


def _format(encoding: str) -> _Encoding:
    try:
        return ENCODINGS[encoding]
    except KeyError:
        raise ImageError(
            f"encoding {encoding!r} is not supported, expected one of {', '.join(ENCODINGS)}; convert it at the source "
            "or with cv_bridge"
        ) from None


def _cdr_string(name: str, text: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise ImageError(f"{name} {text!r} is not valid Unicode text") from None
    if b"\0" in data:
        raise ImageError(f"{name} {text!r} holds a NUL character, which a ROS string cannot carry")
    if len(data) >= _MAX_STRING:
        raise ImageError(f"{name} has {len(data)} bytes, expected fewer than {_MAX_STRING}")
    return struct.pack("<I", len(data) + 1) + data + b"\0"


def encode_image(stamp: tuple[int, int], frame_id: str, array: NDArray, encoding: str) -> bytes:
    """Return the serialized message of one image, ready for ``publisher.publish``.

    Args:
        stamp: (seconds, nanoseconds) of the header.
        frame_id: frame of the header, the camera's optical frame.
        array: (height, width, channels) or, for one channel, (height, width); dtype as the encoding says. Any strides
            and byte order; a C-contiguous array is copied once, into the result.
        encoding: one of :data:`ENCODINGS`.

    Raises:
        ImageError: unknown encoding, or shape, dtype, stamp or frame that do not fit it.
    """
    form = _format(encoding)
    if array.dtype.newbyteorder("=") != form.dtype:
        raise ImageError(f"array has dtype {array.dtype}, expected {form.dtype} for encoding {encoding}")
    expected = "(height, width)" if form.channels == 1 else f"(height, width, {form.channels})"
    if array.ndim != (2 if form.channels == 1 else 3) or array.shape[2:] not in ((), (form.channels,)):
        raise ImageError(f"array has shape {array.shape}, expected {expected} for encoding {encoding}")
    if array.size == 0:
        raise ImageError(f"array has shape {array.shape}: the image is empty, expected {expected} with both at least 1")
    if array.nbytes > _UINT32_MAX:
        raise ImageError(f"array has {array.nbytes} bytes, expected at most {_UINT32_MAX}")
    head = _header(stamp, frame_id)
    height, width = array.shape[:2]
    step = width * form.channels * form.dtype.itemsize
    big = array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big")
    head += struct.pack("<II", height, width)
    head += _cdr_string("encoding", encoding)
    head.append(1 if big else 0)
    head += bytes(-len(head) % 4)
    head += struct.pack("<II", step, array.nbytes)
    pixels = np.ascontiguousarray(array)
    return b"".join((head, pixels.reshape(-1).view(np.uint8).data))


def encode_compressed_image(stamp: tuple[int, int], frame_id: str, form: str, data: bytes | memoryview) -> bytes:
    """Return one serialized ``sensor_msgs/msg/CompressedImage``: header, ``string format``, ``sequence<uint8> data``.

    Args:
        stamp: (seconds, nanoseconds) of the header.
        frame_id: frame of the header.
        form: content of ``format``, such as ``jpeg``.
        data: the compressed picture.

    Raises:
        ImageError: stamp, frame or format cannot be written.
    """
    head = _header(stamp, frame_id)
    head += _cdr_string("format", form)
    head += bytes(-len(head) % 4)
    head += struct.pack("<I", len(data))
    return b"".join((head, data))


def _header(stamp: tuple[int, int], frame_id: str) -> bytearray:
    """Return the encapsulation and a ``std_msgs/Header``, padded to 4."""
    sec, nanosec = stamp
    if not (_INT32_MIN <= sec <= _INT32_MAX and 0 <= nanosec < 1_000_000_000):
        raise ImageError(f"stamp {stamp} is not (seconds in 32 bits, nanoseconds below 1e9)")
    head = bytearray(b"\x00\x01\x00\x00")
    head += struct.pack("<iI", sec, nanosec)
    head += _cdr_string("frame_id", frame_id)
    head += bytes(-len(head) % 4)  # the four bytes of encapsulation leave alignment to 4 unchanged
    return head


class _Reader:
    """Reads CDR primitives from a buffer and never past its end."""

    def __init__(self, data: memoryview) -> None:
        if len(data) < 4:
            raise ImageError(f"message has {len(data)} bytes, expected an encapsulation header of 4")
        kind = bytes(data[:2])
        if kind not in (b"\x00\x00", b"\x00\x01"):
            raise ImageError(f"encapsulation {kind.hex(' ')} is not plain CDR (00 00 or 00 01)")
        self.data = data
        self.at = 4
        order = ">" if kind == b"\x00\x00" else "<"
        self._uint32 = struct.Struct(order + "I")
        self._int32 = struct.Struct(order + "i")

    def _number(self, form: struct.Struct, field: str) -> int:
        self.at += -self.at % 4
        if self.at + 4 > len(self.data):
            raise ImageError(f"message ends in {field}: {len(self.data)} bytes, expected at least {self.at + 4}")
        (value,) = form.unpack_from(self.data, self.at)
        self.at += 4
        return int(value)

    def uint32(self, field: str) -> int:
        return self._number(self._uint32, field)

    def int32(self, field: str) -> int:
        return self._number(self._int32, field)

    def uint8(self, field: str) -> int:
        if self.at >= len(self.data):
            raise ImageError(f"message ends in {field}: {len(self.data)} bytes, expected at least {self.at + 1}")
        value = self.data[self.at]
        self.at += 1
        return value

    def string(self, field: str) -> str:
        length = self.uint32(field)
        if not 1 <= length <= _MAX_STRING:
            raise ImageError(f"{field} has length {length}, expected 1 to {_MAX_STRING} (its NUL counts)")
        end = self.at + length
        if end > len(self.data):
            raise ImageError(f"message ends in {field}: {len(self.data)} bytes, expected at least {end}")
        raw = bytes(self.data[self.at : end])
        self.at = end
        if raw[-1] != 0 or 0 in raw[:-1]:
            raise ImageError(f"{field} does not end with its only NUL")
        try:
            return raw[:-1].decode("utf-8")
        except UnicodeDecodeError:
            raise ImageError(f"{field} is not UTF-8: {raw[:-1]!r}") from None


def decode_image(data: bytes | bytearray | memoryview) -> ImageView:
    """Read one serialized ``sensor_msgs/msg/Image`` without copying its pixels.

    Args:
        data: what a subscription with ``raw=True`` hands over, either byte order. It stays alive with the view.

    Raises:
        ImageError: the bytes are not such a message, or its fields contradict each other; never anything else.
    """
    view = memoryview(data)
    if view.format != "B" or view.ndim != 1 or not view.c_contiguous:
        raise ImageError("message is not a flat buffer of bytes")
    read = _Reader(view)
    stamp = (read.int32("header.stamp.sec"), read.uint32("header.stamp.nanosec"))
    frame_id = read.string("header.frame_id")
    height, width = read.uint32("height"), read.uint32("width")
    encoding = read.string("encoding")
    form = _format(encoding)
    big = read.uint8("is_bigendian")
    step, length = read.uint32("step"), read.uint32("data")
    row = width * form.channels * form.dtype.itemsize
    if height < 1 or width < 1:
        raise ImageError(f"height x width is {height} x {width}, expected both at least 1")
    if big > 1:
        raise ImageError(f"is_bigendian is {big}, expected 0 or 1")
    if step < row:
        raise ImageError(f"step is {step}, expected at least {row} for width {width} of {encoding}")
    if length != step * height:
        raise ImageError(f"data has {length} bytes, expected step x height = {step * height}")
    excess = len(view) - (read.at + length)
    if not 0 <= excess < 4:  # some writers pad the whole message to 4
        raise ImageError(f"message has {len(view)} bytes, expected {read.at + length} from its own fields")
    shape: tuple[int, ...] = (height, width) if form.channels == 1 else (height, width, form.channels)
    item = form.dtype.itemsize
    strides: tuple[int, ...] = (step, item) if form.channels == 1 else (step, item * form.channels, item)
    array: NDArray = np.ndarray(shape, form.dtype.newbyteorder(">" if big else "<"), view, read.at, strides)
    array.flags.writeable = False
    return ImageView(stamp, frame_id, encoding, array)


def restamp(data: bytes, stamp: tuple[int, int]) -> bytes:
    """Return a serialized message that begins with a ``std_msgs/Header`` with another stamp.

    For messages that never change but for their stamp, such as ``sensor_msgs/CameraInfo`` beside every picture.

    Raises:
        ImageError: ``data`` is not plain CDR or ends within the stamp.
    """
    view = memoryview(data)
    read = _Reader(view)
    read.int32("header.stamp.sec"), read.uint32("header.stamp.nanosec")
    order = ">" if data[1] == 0 else "<"
    return b"".join((view[:4], struct.pack(order + "iI", *stamp), view[12:]))
