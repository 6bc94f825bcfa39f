"""Plays action chunks of twists at the policy's rate and interpolates them to any higher rate."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.runtime.chunk_buffer import ChunkBuffer
from dcqfa_ros.runtime.errors import PolicyError

Floats = NDArray[np.float64]

REMEMBERED = 512  # actions whose times are kept: how far back an observation can be placed
_ROW = 8  # twist, time of the observation, time of arrival (both s)


@dataclass(frozen=True, slots=True)
class Played:
    """What a chunk asks for at one moment.

    Attributes:
        twist: (6,) interpolated, m/s and rad/s.
        observed_ns: monotonic time of the observation the action rests on.
        received_ns: monotonic time at which its chunk came.
        gripper: opening 0..1 that begins with this action; None where nothing is asked for.
    """

    twist: Floats
    observed_ns: int
    received_ns: int
    gripper: float | None


class ChunkPlayer:
    """Actions of one episode, numbered by the order of execution; see :mod:`dcqfa_ros.runtime.chunk_buffer`.

    A chunk belongs to the observation whose time it carries: its first action takes the number that was due then, so
    what has been executed meanwhile is dropped, and nothing is repeated or left out. An action lasts one period of the
    policy; between two actions the twist is interpolated. All times are monotonic nanoseconds. Not thread-safe.
    """

    def __init__(self) -> None:
        """Begin without actions."""
        self.starved = 0
        self._buffer = ChunkBuffer(_ROW)
        self._epoch = 0  # subtracted from times before they become floats
        self._times: deque[int] = deque(maxlen=REMEMBERED)  # when each action was begun, newest last
        self.clear()

    def clear(self) -> None:
        """Forget everything: a new episode."""
        self._buffer.clear()
        self._times.clear()
        self._current: Floats | None = None
        self._begun_ns = 0
        self._period_ns = 0
        self._grippers: dict[int, float] = {}
        self._new_gripper: float | None = None

    @property
    def consumed(self) -> int:
        """Actions begun in this episode."""
        return self._buffer.consumed

    @property
    def remaining(self) -> int:
        """Actions that have not been begun."""
        return self._buffer.remaining

    @property
    def begun_ns(self) -> int:
        """Time of the last action: of the tick that began it, or one period after the action before; 0: none yet."""
        return self._times[-1] if self._times else 0

    @property
    def next_ns(self) -> int | None:
        """Time of the next action if there is one by then; None where the one to come begins with its chunk."""
        return None if self._current is None else self._begun_ns + self._period_ns

    def first_of(self, observed_ns: int) -> int:
        """Return the number of the first action that belongs to an observation: how many had been begun by then.

        An action whose time has come counts, whether or not the tick that begins it has: every chunk of one observation
        gets the same number, and it is the one that the policy works out for itself.
        """
        times, following = list(self._times), self.next_ns
        begun = self._buffer.consumed - (len(times) - bisect_right(times, observed_ns))
        if following is not None and observed_ns >= following:
            begun += min(self._buffer.remaining, 1 + (observed_ns - following) // self._period_ns)
        return begun

    def offer(self, observed_ns: int, period_ns: int, twists: Floats, now_ns: int) -> str | None:
        """Merge a chunk of twists (n, 6), finite; returns why it was refused, None when it was taken."""
        if self._period_ns and abs(period_ns - self._period_ns) > 0.01 * self._period_ns:
            return "its period is not that of the chunks before it"
        if not self._epoch:
            self._epoch = now_ns
        rows = np.empty((len(twists), _ROW))
        rows[:, :6] = twists
        rows[:, 6], rows[:, 7] = (observed_ns - self._epoch) / 1e9, (now_ns - self._epoch) / 1e9
        try:
            self._buffer.push(self.first_of(observed_ns), rows)
        except PolicyError as error:
            return str(error)
        self._period_ns = period_ns
        return None

    def offer_gripper(self, observed_ns: int, openings: Floats) -> None:
        """Take the gripper's part (n,), finite, of the chunk with the same observation; it may come before or after."""
        first = self.first_of(observed_ns)
        for number in [n for n in self._grippers if n >= first or n < self._buffer.consumed]:
            del self._grippers[number]
        for number, opening in enumerate(openings, first):
            if number >= self._buffer.consumed:
                self._grippers[number] = float(opening)

    def at(self, now_ns: int) -> Played | None:
        """Return what is due at ``now_ns``; None (counted in ``starved`` when it begins) where there is nothing."""
        due = self._current is None or now_ns - self._begun_ns >= self._period_ns
        if due and not self._advance(now_ns):
            return None
        row = self._current
        assert row is not None
        twist, following = row[:6], self._buffer.peek()
        if following is not None:
            share = min(1.0, (now_ns - self._begun_ns) / self._period_ns)
            twist = twist + (following[:6] - twist) * share
        gripper, self._new_gripper = self._new_gripper, None
        observed, received = (self._epoch + round(float(s) * 1e9) for s in row[6:])
        return Played(twist, observed, received, gripper)

    def _advance(self, now_ns: int) -> bool:
        number = self._buffer.consumed
        row = self._buffer.next()
        if row is None:
            self.starved += self._current is not None
            self._current = None
            return False
        late = self._current is None or now_ns - self._begun_ns >= 2 * self._period_ns
        # A late tick shifts what follows: the arm must not leave out an action to catch up.
        self._begun_ns = now_ns if late else self._begun_ns + self._period_ns
        self._current = row
        self._times.append(self._begun_ns)
        self._new_gripper = self._grippers.pop(number, None)
        return True
