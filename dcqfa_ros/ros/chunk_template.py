"""Chunk messages as bytes: the message of one length is serialized once, and only its numbers change afterwards.

A chunk of 16 twists is some eighty Python objects whose fields are checked one by one, between an inference and its
publication.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.serialization import serialize_message

from dcqfa_ros.ros.conversions import NS
from dcqfa_ros.runtime.recent import Recent

_LENGTHS = 8  # that are kept; a policy's chunks have one or two
_WORD = np.dtype(np.uint32)  # numbers of 64 bits are aligned to 8 bytes behind the encapsulation, which has 4
_STAMP, _STAMP_AT = struct.Struct("=iI"), 4  # of the header, behind the encapsulation
_NATIVE = b"\x00\x01" if sys.byteorder == "little" else b"\x00\x00"  # encapsulation of plain CDR in this byte order
_Template = tuple[bytearray, "NDArray[np.uint32]", "NDArray[np.intp]"]
"""A serialized message, its 32-bit words, and which of them hold the values (n k 2)."""


class ChunkTemplate:
    """Serialized chunks of one kind; not for several threads."""

    def __init__(self, build: Callable[[int, NDArray[np.float64]], Any]) -> None:
        """Bind the kind of message.

        Args:
            build: makes a message that begins with a ``std_msgs/Header`` of a stamp (ns), and that holds all of some
                values (n, k) as float64, as they are, and nothing else that depends on them.
        """
        self._build = build
        self._kept: Recent[tuple[int, ...], _Template] = Recent(_LENGTHS)

    def serialized(self, stamp_ns: int, values: NDArray[np.floating]) -> bytes:
        """What ``build`` of a stamp and values (n, k) is serialized to.

        Raises:
            ValueError: a message of this length does not hold the values as they are, or is no plain CDR.
        """
        shape = values.shape
        found = self._kept.get(shape)
        if found is None:
            found = self._template(shape)
            self._kept.put(shape, found)
        data, words, places = found
        words[places] = np.array(values, np.float64, order="C").reshape(-1).view(_WORD)
        _STAMP.pack_into(data, _STAMP_AT, *divmod(stamp_ns, NS))
        return bytes(data)

    def _template(self, shape: tuple[int, ...]) -> _Template:
        # Numbers of 52 random bits: none of them is in the message by chance, and each is there once.
        marks = np.random.default_rng(0).uniform(1.0, 2.0, shape)
        data = bytes(serialize_message(self._build(0, marks)))
        if data[:2] != _NATIVE:
            raise ValueError(f"chunk template: encapsulation {data[:2].hex(' ')}, expected {_NATIVE.hex(' ')}")
        begins = []
        for mark in marks.flat:
            pattern = mark.tobytes()
            if data.count(pattern) != 1 or data.index(pattern) % _WORD.itemsize:
                raise ValueError("chunk template: a value is not in the message, or not once, or not aligned")
            begins.append(data.index(pattern))
        places = (np.array(begins, np.intp).reshape(-1, 1) // _WORD.itemsize + np.arange(2)).reshape(-1)
        buffer = bytearray(data)
        return buffer, np.frombuffer(buffer, _WORD, len(data) // _WORD.itemsize), places
