"""What the bench of the loop makes of the arm's reports."""

from __future__ import annotations

from dcqfa_ros.bench.bare_tick import Told
from dcqfa_ros.bench.loop import missed_alone

PERIOD = 10
STILL = Told(2, 20.0, (None,), (((1_095, 1_121),),), True)


def test_what_was_missed_while_the_computer_stood_still_is_left_out() -> None:
    stalls = {(50, 75), (1_100, 1_125), (1_500, 1_512)}  # the first from before
    assert missed_alone(stalls, 3, 1_000, STILL, PERIOD) == 1
    assert missed_alone({(50, 75)}, 0, 1_000, STILL, PERIOD) == 0


def test_it_is_unknown_where_the_arm_has_not_told_every_stall() -> None:
    assert missed_alone({(1_100, 1_125)}, 3, 1_000, STILL, PERIOD) is None
    assert missed_alone({(1_100, 1_125), (1_500, 1_512)}, 2, 1_000, STILL, PERIOD) is None
