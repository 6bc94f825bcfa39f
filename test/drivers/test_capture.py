"""A capture's record tells drops from outages and counts what came back."""

from __future__ import annotations

import math

from dcqfa_ros.drivers.capture import CaptureRecord

MS = 1_000_000


def test_missing_ticks_are_drops_but_those_of_an_outage_are_not() -> None:
    record = CaptureRecord(10.0)
    assert record.picture(0, MS), "the first picture ends the waiting"
    record.picture(100 * MS, MS)
    record.picture(400 * MS, MS)
    assert (record.frames, record.drops, record.reconnects) == (3, 2, 0)
    assert record.lost("unplugged")
    assert not record.lost("still unplugged")
    assert record.outage == "still unplugged"
    assert record.picture(9000 * MS, MS)
    assert (record.drops, record.reconnects, record.outage) == (2, 1, "")


def test_rate_and_work_are_those_of_the_recent_pictures() -> None:
    record = CaptureRecord(20.0)
    assert all(math.isnan(value) for value in record.figures())
    for number in range(11):
        record.picture(number * 50 * MS, 4 * MS)
    rate, _, work = record.figures()
    assert (round(rate, 6), work) == (20.0, 4.0)
