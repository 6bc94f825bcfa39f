"""What was used last, by key: for buffers and compiled graphs of shapes, of which only a few are worth their memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """At most ``limit`` values; the one that was not used for longest goes first. Not thread-safe."""

    def __init__(self, limit: int) -> None:
        """Hold nothing yet.

        Args:
            limit: values kept, at least 1.
        """
        self._limit = limit
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        """Number of values held."""
        return len(self._values)

    def __iter__(self) -> Iterator[Value]:
        """Values, the least recently used first."""
        return iter(self._values.values())

    def get(self, key: Key) -> Value | None:
        """Return a value, which counts as its use, or None."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> Value | None:
        """Store a value; returns the one that had to go for it, to be released, or None."""
        self._values[key] = value
        self._values.move_to_end(key)
        return self._values.popitem(last=False)[1] if len(self._values) > self._limit else None

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
