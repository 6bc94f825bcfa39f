"""How many actions the arm had consumed at an observation, as the policy knows it.

The arm tells its count per control period. Where it tells none, one action per period is assumed since the newest count
that is known; an arm that ran dry has then consumed fewer, which shows as soon as more were consumed than published.
Stamps are those of observations, nanoseconds.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from dataclasses import dataclass

KEPT = 512
_EARLIEST = 0.9  # of a period, at least, from one action to the next


@dataclass(frozen=True, slots=True)
class Consumed:
    """What is known of the arm at one stamp.

    Attributes:
        actions: consumed by then.
        buffered: actions that were left, None where that is unknown.
        told: whether the arm said so; else it is an estimate.
    """

    actions: int
    buffered: int | None
    told: bool


@dataclass(frozen=True, slots=True)
class Report:
    """One message of the arm.

    Attributes:
        episode: the arm's number of it.
        stamp_ns: the count holds up to here.
        consumed: actions begun in this episode.
        begun_ns: stamp from which on it holds: when the last of them was begun.
        buffered: actions that are left.
        starved: control periods of the episode without an action.
    """

    episode: int
    stamp_ns: int
    consumed: int
    begun_ns: int
    buffered: int
    starved: int


class ConsumptionLog:
    """Counts of one episode. Thread-safe."""

    def __init__(self, period_ns: int) -> None:
        """Expect one action per ``period_ns`` where the arm tells nothing."""
        self._period_ns = period_ns
        self._condition = threading.Condition()
        self._episode: int | None = None
        self._clear()

    def _clear(self) -> None:
        self._stamps: list[int] = []  # from which on a count holds, rising
        self._counts: list[int] = []
        self._newest: Report | None = None
        self._anchor: tuple[int, int] = (0, 0)  # stamp and count from which estimates go on

    def begin(self, episode: int, start_ns: int) -> None:
        """An episode begins: nothing is consumed at ``start_ns``. What the arm has told of it already stays."""
        with self._condition:
            if self._episode != episode:
                self._episode = episode
                self._clear()
            self._anchor = start_ns, 0

    def note(self, report: Report) -> None:
        """Take a message of the arm; one of an older episode, or older than what is known, says nothing new."""
        with self._condition:
            if self._episode is None or report.episode > self._episode:
                self._episode = report.episode
                self._clear()
            newest = self._newest
            if report.episode < self._episode or (newest is not None and report.stamp_ns < newest.stamp_ns):
                return
            self._newest = report
            if not self._counts or report.consumed != self._counts[-1]:
                self._stamps.append(report.begun_ns)
                self._counts.append(report.consumed)
                del self._stamps[:-KEPT], self._counts[:-KEPT]
            self._condition.notify_all()

    @property
    def tells(self) -> bool:
        """Whether the arm has told its count in this episode."""
        return self._newest is not None

    @property
    def newest(self) -> Report | None:
        """The arm's last message of this episode."""
        return self._newest

    def at(self, stamp_ns: int, timeout_s: float) -> Consumed:
        """Return what was consumed at ``stamp_ns``; waits for the arm's word where it has told its count before.

        Args:
            stamp_ns: of an observation.
            timeout_s: seconds to wait at most; then it is estimated.
        """
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while self._may_be_more(stamp_ns):
                remaining = deadline - time.monotonic()
                if remaining <= 0.0 or not self._condition.wait(remaining):
                    break
            newest = self._newest
            if newest is not None and (newest.stamp_ns >= stamp_ns or not self._may_be_more(stamp_ns)):
                place = bisect_right(self._stamps, stamp_ns)
                if place or self._counts[0] == 0:
                    last = place == len(self._counts)
                    return Consumed(self._counts[place - 1] if place else 0, newest.buffered if last else None, True)
            known_ns, known = self._anchor
            if newest is not None and newest.stamp_ns > known_ns:
                known_ns, known = newest.stamp_ns, newest.consumed
            return Consumed(known + max(0, round((stamp_ns - known_ns) / self._period_ns)), None, False)

    def _may_be_more(self, stamp_ns: int) -> bool:
        """Whether the arm, which has told its count, may have begun an action by ``stamp_ns`` that it has not told."""
        newest = self._newest
        if newest is None or newest.stamp_ns >= stamp_ns:
            return False
        return stamp_ns - newest.begun_ns >= _EARLIEST * self._period_ns

    def correct(self, stamp_ns: int, consumed: int) -> None:
        """Let estimates go on from a count at a stamp that is known otherwise."""
        with self._condition:
            self._anchor = stamp_ns, consumed
