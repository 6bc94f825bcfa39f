"""The arm's buffer of actions: chunks are merged by actions consumed, never by estimated time.

Actions of an episode are numbered from 0 in the order of execution. A chunk says which number its first action has;
what the arm has already consumed of it is dropped, the rest replaces what is buffered from there on. A slow or
jittering policy can so never make the arm repeat or skip an action.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.runtime.errors import PolicyError


class ChunkBuffer:
    """Actions waiting for execution. Not thread-safe: it belongs to the control tick's thread.

    Attributes:
        consumed: actions handed out so far; also the number of the next action.
        starved: times :meth:`next` had nothing to give after the first chunk had come.
        dropped: actions that came too late or were replaced before they were consumed.
    """

    def __init__(self, action_dim: int, capacity: int = 256) -> None:
        """Prepare for actions (action_dim,); ``capacity`` bounds how far ahead of the next action a chunk may reach.

        Raises:
            ValueError: action_dim or capacity is below 1.
        """
        for label, value in (("action_dim", action_dim), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"{label}: expected at least 1, got {value}")
        self._actions = np.zeros((capacity, action_dim), np.float64)  # ring: action n sits at n % capacity
        self._end = 0  # number of the action after the last one buffered
        self._fed = False
        self.consumed = 0
        self.starved = 0
        self.dropped = 0

    @property
    def remaining(self) -> int:
        """Actions that can be executed before the buffer runs dry."""
        return self._end - self.consumed

    def push(self, first: int, actions: NDArray[Any]) -> int:
        """Merge a chunk and return how many of its actions are new to the buffer (not yet consumed).

        Args:
            first: number of the chunk's first action: ``consumed`` at the time of the chunk's observation.
            actions: (n, action_dim), finite.

        Raises:
            PolicyError: wrong shape, NaN or infinity (named), a chunk whose actions have all been consumed, one that
                leaves a gap after the buffered actions, or one that reaches beyond the capacity. The buffer is then
                unchanged.
        """
        actions = np.asarray(actions, np.float64)
        capacity, dim = self._actions.shape
        if actions.ndim != 2 or actions.shape[1] != dim or not len(actions):
            raise PolicyError(f"chunk: expected actions of shape ('n', {dim}), got {actions.shape}")
        if not np.isfinite(actions).all():
            row, column = (int(i) for i in np.argwhere(~np.isfinite(actions))[0])
            raise PolicyError(
                f"chunk: action {first + row} is {actions[row, column]} in dimension {column}; expected finite"
            )
        end = first + len(actions)
        if first < 0 or end <= self.consumed:
            raise PolicyError(
                f"chunk: actions {first} to {end - 1} are older than the {self.consumed} already consumed"
            )
        if first > self._end:
            raise PolicyError(
                f"chunk: starts at action {first}, but the buffer ends before {self._end}: actions are missing"
            )
        if end - self.consumed > capacity:
            raise PolicyError(f"chunk: reaches {end - self.consumed} actions ahead; the buffer holds {capacity}")
        start = max(first, self.consumed)
        self.dropped += (start - first) + max(0, self._end - start)
        for number in range(start, end):
            self._actions[number % capacity] = actions[number - first]
        self._end = end
        self._fed = True
        return end - start

    def next(self) -> NDArray[np.float64] | None:
        """Consume and return the next action (action_dim,), or None (counted in ``starved``) where there is none."""
        if self.consumed == self._end:
            self.starved += self._fed
            return None
        action = self._actions[self.consumed % len(self._actions)].copy()
        self.consumed += 1
        return action

    def peek(self) -> NDArray[np.float64] | None:
        """Return the action that :meth:`next` would give, without consuming it; None where there is none."""
        return None if self.consumed == self._end else self._actions[self.consumed % len(self._actions)].copy()

    def clear(self) -> None:
        """Drop everything and start again at action 0, for a new episode or after a stop."""
        self._end = self.consumed = self.starved = self.dropped = 0
        self._fed = False
