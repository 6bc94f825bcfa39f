"""Chunks as bytes: read back, they are exactly the messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rclpy.serialization import deserialize_message, serialize_message

from dcqfa_ros.ros import chunk_template
from dcqfa_ros.ros.arm_messages import gripper_chunk_message, twist_chunk_message
from dcqfa_ros.ros.chunk_template import ChunkTemplate
from dcqfa_ros.ros.conversions import planar_chunk_message

PERIOD_NS = 33_333_333
KINDS = {
    "twists": (6, lambda stamp, values: twist_chunk_message(stamp, values, PERIOD_NS)),
    "openings": (1, lambda stamp, values: gripper_chunk_message(stamp, values[:, 0], PERIOD_NS)),
    "planar": (2, lambda stamp, values: planar_chunk_message(stamp, "table", values, PERIOD_NS, 1.0)),
}
TEMPLATES = {kind: ChunkTemplate(build) for kind, (_, build) in KINDS.items()}  # kept from message to message


def check(data: bytes, message: Any) -> None:
    """The bytes are a message's: as many, and read back as it (what pads them to their alignment is undefined)."""
    assert len(data) == len(bytes(serialize_message(message)))
    assert deserialize_message(data, type(message)) == message


@given(
    kind=st.sampled_from(sorted(KINDS)),
    points=st.integers(1, 20),
    stamp=st.integers(0, 2**31 * 10**9 - 1),
    data=st.data(),
)
def test_bytes_hold_the_message(kind: str, points: int, stamp: int, data: st.DataObject) -> None:
    width, build = KINDS[kind]
    numbers = st.floats(allow_nan=False, width=32)
    values = data.draw(arrays.arrays(np.float32, (points, width), elements=numbers))
    check(TEMPLATES[kind].serialized(stamp, values), build(stamp, values))


def test_a_slice_of_an_array_is_read_as_it_is() -> None:
    actions = np.random.default_rng(0).standard_normal((8, 7)).astype(np.float32)
    _, build = KINDS["twists"]
    check(ChunkTemplate(build).serialized(5, actions[:, :6]), build(5, actions[:, :6]))


def test_a_message_without_its_values_is_no_template() -> None:
    template = ChunkTemplate(lambda stamp, values: twist_chunk_message(stamp, values * 2.0, PERIOD_NS))
    with pytest.raises(ValueError, match="not in the message"):
        template.serialized(0, np.zeros((2, 6)))


def test_bytes_stay_as_they_are_when_others_of_the_same_length_follow() -> None:
    values = np.arange(12.0).reshape(2, 6)
    template = ChunkTemplate(KINDS["twists"][1])
    first = template.serialized(5, values)
    kept = bytes(bytearray(first))
    template.serialized(6, values + 1.0)
    assert first == kept


def test_an_encoding_that_is_not_plain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_template, "serialize_message", lambda m: b"\x00\x07" + bytes(serialize_message(m))[2:])
    with pytest.raises(ValueError, match="encapsulation 00 07"):
        ChunkTemplate(KINDS["twists"][1]).serialized(0, np.zeros((2, 6)))
