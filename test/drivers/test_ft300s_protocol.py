"""The stream parser: every frame found in any chunking, nothing believed that was not sent, recovery in two frames."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.drivers import ft300s_protocol as ft

COUNT = st.integers(-32768, 32767)
READINGS = st.tuples(*[COUNT] * 6)
REST = (10, -20, 900, 5, -5, 1)


def near(seed: int) -> ft.Counts:
    rng = random.Random(seed)
    return tuple(v + rng.randint(-5, 5) for v in REST)  # type: ignore[return-value]


def believed(parser: ft.StreamParser, *parts: bytes) -> list[ft.Counts]:
    return [frame.counts for part in parts for frame in parser.feed(part)]


@given(READINGS)
def test_a_frame_survives_encoding(counts: ft.Counts) -> None:
    frame = ft.encode_frame(counts)
    assert len(frame) == ft.FRAME_BYTES
    assert ft.decode_frame(frame) == counts


@given(st.lists(READINGS, min_size=2, max_size=20), st.data())
def test_on_a_clean_line_every_frame_but_the_first_is_found_however_it_is_cut(
    readings: list[ft.Counts], data: st.DataObject
) -> None:
    stream = b"".join(map(ft.encode_frame, readings))
    parser = ft.StreamParser()
    found = []
    position = 0
    while position < len(stream):
        size = data.draw(st.integers(1, 50))
        chunk = stream[position : position + size]
        position += len(chunk)
        for frame in parser.feed(chunk):
            found.append(frame.counts)
            end = position - frame.trailing
            assert stream[end - 16 : end] == ft.encode_frame(frame.counts), "trailing tells where the frame ended"
    assert found == readings[1:]
    assert (parser.crc_errors, parser.discarded, parser.resyncs) == (0, 0, 0)


@given(st.lists(st.binary(max_size=60), max_size=30))
def test_random_bytes_never_raise_are_never_believed_and_never_pile_up(chunks: list[bytes]) -> None:
    parser = ft.StreamParser()
    for chunk in chunks:
        assert parser.feed(chunk) == []
        assert parser.pending < ft.FRAME_BYTES
    assert parser.believed == 0


@given(st.binary(min_size=1, max_size=60), st.integers(0, 1000))
def test_after_any_garbage_the_second_intact_frame_is_believed(garbage: bytes, seed: int) -> None:
    parser = ft.StreamParser()
    before = [near(seed), near(seed + 1)]
    assert believed(parser, *map(ft.encode_frame, before)) == before[1:]
    parser.feed(garbage)
    first, second = near(seed + 2), near(seed + 3)
    assert second in believed(parser, ft.encode_frame(first), ft.encode_frame(second))


def test_a_header_inside_the_payload_does_not_mis_frame() -> None:
    counts = (0x4E20,) * 6
    parser = ft.StreamParser()
    frame = ft.encode_frame(counts)
    assert believed(parser, frame[5:], frame, frame, frame) == [counts] * 2
    assert (parser.crc_errors, parser.discarded, parser.trust.suspect) == (0, 0, 0), "joining a stream is no damage"


def test_a_frame_that_lost_bytes_costs_no_more_than_the_frame_behind_it() -> None:
    parser = ft.StreamParser()
    frames = [ft.encode_frame(near(i)) for i in range(6)]
    found = believed(parser, frames[0], frames[1], frames[2][:9], frames[3], frames[4], frames[5])
    assert found == [near(1), near(4), near(5)]
    assert parser.crc_errors == 1
    assert parser.discarded == 9


def suspect() -> ft.StreamParser:
    """A parser whose line was damaged a moment ago, in step again."""
    parser = ft.StreamParser()
    parser.feed(bytes(ft.FRAME_BYTES))
    parser.feed(b"".join(ft.encode_frame(REST) for _ in range(3)))
    assert parser.trust.suspect
    return parser


JUMP = (10, -20, 4900, 5, -5, 1)


def test_a_collision_on_a_clean_line_is_believed_at_once() -> None:
    parser = ft.StreamParser()
    parser.feed(ft.encode_frame(REST) * 2)
    assert believed(parser, ft.encode_frame(JUMP)) == [JUMP]


def test_a_damaged_frame_that_meets_the_crc_is_not_believed_on_a_suspect_line() -> None:
    parser = suspect()
    assert believed(parser, ft.encode_frame(JUMP)) == []
    assert believed(parser, ft.encode_frame(REST)) == [REST], "the next one shows that it was false"
    assert parser.withheld == 2, "the first frame of all, and this one"


def test_a_real_jump_on_a_suspect_line_is_believed_with_the_next_frame() -> None:
    assert believed(suspect(), ft.encode_frame(JUMP), ft.encode_frame(JUMP)) == [JUMP]


@given(st.lists(READINGS, min_size=4, max_size=40))
def test_however_the_load_changes_at_most_three_frames_in_a_row_are_withheld(readings: list[ft.Counts]) -> None:
    parser = suspect()
    withheld = 0
    for counts in readings:
        withheld = 0 if believed(parser, ft.encode_frame(counts)) else withheld + 1
        assert withheld <= ft.MAX_WITHHELD


def test_a_line_without_damage_for_ten_seconds_is_trusted_again() -> None:
    parser = suspect()
    parser.feed(ft.encode_frame(REST) * ft.SUSPECT_FRAMES)
    assert not parser.trust.suspect
    assert believed(parser, ft.encode_frame(JUMP)) == [JUMP]


def test_overrange_names_the_axes() -> None:
    assert ft.overrange((0, 0, 30_000, 0, 0, 0)) == ()
    assert ft.overrange((0, -30_001, 0, 0, 0, 32767)) == ("Fy", "Mz")


@given(READINGS)
def test_registers_hold_signed_counts(counts: ft.Counts) -> None:
    assert ft.signed([count & 0xFFFF for count in counts]) == counts


@given(st.integers(1, 2**32 - 1), st.integers(0, 0xFFFF), st.lists(st.integers(0, 255), min_size=3, max_size=3))
def test_sensor_info_survives_the_registers(number: int, year: int, version: list[int]) -> None:
    info = ft.SensorInfo(f"FTS-{number:04d}", year, f"FTS-{'.'.join(map(str, version))}")
    assert ft.sensor_info(*ft.info_registers(info)) == info


def test_a_sensor_info_that_no_sensor_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a firmware like 'FTS-1\.2\.3'"):
        ft.info_registers(ft.SensorInfo("FTS-1", 2024, "1.2"))
