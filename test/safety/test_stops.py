"""A stop latches with its first reason until it is reset."""

from __future__ import annotations

import pytest

from dcqfa_ros.safety.stops import Stop, StopCode, StopLatch

NORMAL = ("never_armed", "operator", "success", "step_limit", "shutdown")


@pytest.mark.parametrize("code", list(StopCode))
def test_everything_that_is_not_normal_latches_until_reset(code: StopCode) -> None:
    latch = StopLatch()
    assert latch.trip(Stop(code, "first"))
    assert (latch.held is None) == (code.value in NORMAL) == code.normal
    assert latch.last == Stop(code, "first")
    again = latch.trip(Stop(StopCode.FORCE, "second"))
    assert again == code.normal, "the first reason stays"
    assert latch.last.text == ("second" if code.normal else "first")
    assert latch.reset() is not None and latch.held is None
    assert latch.last.code is StopCode.NEVER_ARMED
    assert latch.reset() is None
    assert latch.counts[code.value] == (2 if code is StopCode.FORCE else 1)
