"""Chunk messages as bytes: the message of one length is serialized once, and only its numbers change afterwards.

A chunk of 16 twists is some eighty Python objects whose fields are checked one by one, between an inference and its
publication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.serialization import serialize_message

from dcqfa_ros.ros.conversions import NS
from dcqfa_ros.ros.images import restamp
from dcqfa_ros.runtime.recent import Recent

_LENGTHS = 8  # that are kept; a policy's chunks have one or two


class ChunkTemplate:
    """Serialized chunks of one kind; not for several threads."""

    def __init__(self, build: Callable[[int, NDArray[np.float64]], Any]) -> None:
        """Bind the kind of message.

        Args:
            build: makes a message that begins with a ``std_msgs/Header`` of a stamp (ns), and that holds all of some
                values (n, k) as float64, as they are, and nothing else that depends on them.
        """
        self._build = build
        self._kept: Recent[tuple[int, ...], tuple[bytes, NDArray[np.intp]]] = Recent(_LENGTHS)

    def serialized(self, stamp_ns: int, values: NDArray[np.floating]) -> bytes:
        """What ``build`` of a stamp and values (n, k) is serialized to."""
        shape = values.shape
        found = self._kept.get(shape)
        if found is None:
            found = self._template(shape)
            self._kept.put(shape, found)
        data, places = found
        message = np.frombuffer(data, np.uint8).copy()
        message[places] = np.ascontiguousarray(values, np.float64).reshape(-1, 1).view(np.uint8)
        return restamp(message.tobytes(), divmod(stamp_ns, NS))

    def _template(self, shape: tuple[int, ...]) -> tuple[bytes, NDArray[np.intp]]:
        """A serialized message, and where in it the bytes (n k, 8) of each value are."""
        # Numbers of 52 random bits: none of them is in the message by chance, and each is there once.
        marks = np.random.default_rng(0).uniform(1.0, 2.0, shape)
        data = bytes(serialize_message(self._build(0, marks)))
        begins = []
        for mark in marks.flat:
            pattern = mark.tobytes()
            if data.count(pattern) != 1:
                raise ValueError("chunk template: a value is not in the message, or not once")
            begins.append(data.index(pattern))
        return data, np.array(begins, np.intp).reshape(-1, 1) + np.arange(8)
