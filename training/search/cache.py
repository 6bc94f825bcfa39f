"""Distances that were measured once, kept for every later search of the same network, whatever the device."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dcqfa_ros.errors import UserError
from training.files import write_atomically

FORMAT = 1


class CacheError(UserError):
    """A cache that cannot be written; the message names the file."""


class DistanceCache:
    """Distances by subnet name in a file of JSON lines that only grows, so that an interrupted search loses nothing.

    The first line says what the distances belong to (weights, data, samples); the check of every line depends on it.
    Lines that are damaged are dropped and the file is written anew without them: what is missing is measured again.
    The file belongs to one search at a time.

    Attributes:
        path: the file.
        dropped: damaged lines that were found.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], stem: str = "distances") -> None:
        """Open the distances that belong to ``key``; every key has a file of its own in ``folder``, ``stem`` its kind.

        Raises:
            CacheError: the file cannot be read or written, or another search is using it.
        """
        self.key = dict(key)
        self._digest = _digest(self.key)
        self.path = folder / f"{stem}-{self._digest[:16]}.jsonl"
        self.dropped = 0
        self._values: dict[str, float] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = self.path.with_suffix(".lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise CacheError(
                    f"{self.path}: another search is using it; wait for its end, or give another --out"
                ) from None
            if self._read() or not self.path.exists():
                write_atomically(self.path, "".join(self._lines()).encode())
            self._file = self.path.open("a")
        except OSError as error:
            raise self._refused(error) from error
        if self.dropped:
            print(f"{self.path}: {self.dropped} damaged lines dropped; they are measured again", file=sys.stderr)

    def __len__(self) -> int:
        """Number of subnets whose distance is known."""
        return len(self._values)

    def __contains__(self, name: str) -> bool:
        """Whether the distance of a subnet is known."""
        return name in self._values

    def __getitem__(self, name: str) -> float:
        """The distance of a subnet."""
        return self._values[name]

    def items(self) -> list[tuple[str, float]]:
        """All names and distances, in the order in which they were measured."""
        return list(self._values.items())

    def add(self, name: str, distance: float) -> None:
        """Keep a distance; it is on its way to the disk when this returns.

        Raises:
            CacheError: the disk refuses.
            ValueError: the distance is not a finite number from 0 on.
        """
        if not (math.isfinite(distance) and distance >= 0.0):
            raise ValueError(f"distance of {name}: expected a finite number from 0 on, got {distance}")
        self._values[name] = float(distance)
        try:
            self._file.write(self._line(name, float(distance)))
            self._file.flush()
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Write everything to the disk and let others use the file.

        Raises:
            CacheError: the disk refuses.
        """
        try:
            if not self._file.closed:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error
        finally:
            with suppress(OSError):  # the same again, of what could not be written
                self._file.close()
            self._lock.close()

    def _refused(self, error: OSError) -> CacheError:
        return CacheError(f"{self.path}: cannot be kept ({error}); make room, or give another --out")

    def _read(self) -> bool:
        """Take what is good; returns whether the file has to be written anew."""
        if not self.path.exists():
            return False
        content = self.path.read_bytes()
        head, *lines = content.split(b"\n")
        for line in lines[:-1] if lines and not lines[-1] else lines:
            entry = self._entry(line)
            if entry is None:
                self.dropped += 1
            else:
                self._values[entry[0]] = entry[1]
        damaged = head + b"\n" != self._head().encode()
        self.dropped += damaged
        return bool(self.dropped) or not content.endswith(b"\n")

    def _head(self) -> str:
        return json.dumps({"format": FORMAT, "key": self.key}, sort_keys=True) + "\n"

    def _lines(self) -> list[str]:
        return [self._head(), *(self._line(name, distance) for name, distance in self._values.items())]

    def _line(self, name: str, distance: float) -> str:
        """A line with a check of its own, which tells one that was cut, altered or copied from elsewhere."""
        text = self._digest + json.dumps([name, distance])
        return json.dumps([name, distance, hashlib.sha256(text.encode()).hexdigest()[:8]]) + "\n"

    def _entry(self, line: bytes) -> tuple[str, float] | None:
        try:
            name, distance, _check = json.loads(line)
            good = isinstance(name, str) and isinstance(distance, float) and math.isfinite(distance) and distance >= 0.0
            good = good and self._line(name, distance).encode() == line + b"\n"
        except (ValueError, TypeError):
            return None
        return (name, distance) if good else None


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
