"""How many actions the arm had consumed at an observation, as the policy knows it.

The arm tells its count per control period, and where its actions follow a grid of time also when it will begin the
next one: then what it has buffered is known beforehand, and nothing has to be waited for. Where it tells nothing, one
action per period is assumed since the newest count that is known; an arm that ran dry has then consumed fewer, which
shows as soon as more were consumed than published. Stamps are those of observations, nanoseconds.
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
        told: whether the arm said so, or said that it would; else it is an estimate.
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
        next_ns: stamp from which on the next action counts if there is one by then, and every period one more; None
            where the arm does not say.
    """

    episode: int
    stamp_ns: int
    consumed: int
    begun_ns: int
    buffered: int
    starved: int
    next_ns: int | None = None


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

    def at(self, stamp_ns: int, timeout_s: float, most: int | None = None) -> Consumed:
        """Return what was consumed at ``stamp_ns``; waits for the arm's word where it has told its count before.

        Args:
            stamp_ns: of an observation.
            timeout_s: seconds to wait at most; then it is estimated.
            most: actions that the arm was sent; an arm that has told that it has consumed these, and has no others, is
                not waited for.
        """
        deadline = time.monotonic() + timeout_s
        with self._condition:
            known = self._known(stamp_ns, most)
            while known is None and self._newest is not None:
                remaining = deadline - time.monotonic()
                if remaining <= 0.0 or not self._condition.wait(remaining):
                    break
                known = self._known(stamp_ns, most)
            return known or self._estimate(stamp_ns)

    def _known(self, stamp_ns: int, most: int | None) -> Consumed | None:
        """What is known of ``stamp_ns``; None where the arm may have begun an action that it has not told."""
        newest = self._newest
        if newest is None:
            return None
        if newest.stamp_ns < stamp_ns:
            done = newest.consumed == most and not newest.buffered
            coming = 0 if done else self._coming(newest, stamp_ns)
            if coming is None or (coming and most is not None and newest.consumed < most < newest.consumed + coming):
                return None  # the second: a shorter chunk that replaces what is buffered is on its way
            if coming:
                return Consumed(newest.consumed + coming, None, True)
        place = bisect_right(self._stamps, stamp_ns)
        if not place and self._counts[0] != 0:  # before the first word
            return self._estimate(stamp_ns)
        last = place == len(self._counts)
        return Consumed(self._counts[place - 1] if place else 0, newest.buffered if last else None, True)

    def _coming(self, newest: Report, stamp_ns: int) -> int | None:
        """Actions begun from the arm's last word to a later stamp; None where that cannot be told from it."""
        if newest.next_ns is None:
            return None if stamp_ns - newest.begun_ns >= _EARLIEST * self._period_ns else 0
        if stamp_ns < newest.next_ns:
            return 0
        count = 1 + (stamp_ns - newest.next_ns) // self._period_ns
        return count if count <= newest.buffered else None

    def _estimate(self, stamp_ns: int) -> Consumed:
        newest = self._newest
        known_ns, known = self._anchor
        if newest is not None and newest.stamp_ns > known_ns:
            known_ns, known = newest.stamp_ns, newest.consumed
        return Consumed(known + max(0, round((stamp_ns - known_ns) / self._period_ns)), None, False)

    def correct(self, stamp_ns: int, consumed: int) -> None:
        """Let estimates go on from a count at a stamp that is known otherwise."""
        with self._condition:
            self._anchor = stamp_ns, consumed
