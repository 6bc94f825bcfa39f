"""Distances that were measured once, kept for every later search of the same network, whatever the device."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcqfa_ros.errors import UserError
from training.lut import write_atomically

FORMAT = 1


class CacheError(UserError):
    """A cache that cannot be written; the message names the file."""


class DistanceCache:
    """Distances by subnet name in a file of JSON lines that only grows, so that an interrupted search loses nothing.

    The first line says what the distances belong to (weights, data, samples); a file of anything else is not read.
    Lines that are damaged are dropped and the file is written anew without them: what is missing is measured again.

    Attributes:
        path: the file.
        dropped: damaged lines that were found.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], stem: str = "distances") -> None:
        """Open the distances that belong to ``key``; every key has a file of its own in ``folder``, ``stem`` its kind.

        Raises:
            CacheError: the file cannot be read or written.
        """
        self.key = dict(key)
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{stem}-{digest[:16]}.jsonl"
        self.dropped = 0
        self._cut = False
        self._values: dict[str, float] = {}
        try:
            self._read()
            folder.mkdir(parents=True, exist_ok=True)
            if not self.path.exists() or self.dropped or self._cut:
                write_atomically(self.path, "".join(self._lines()).encode())
            self._file = self.path.open("a")
        except OSError as error:
            raise CacheError(f"{self.path}: the distances cannot be kept ({error}); give another --out") from error
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

    def get(self, name: str, default: float) -> float:
        """The distance of a subnet, or ``default`` where it is not known."""
        return self._values.get(name, default)

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
        self._values[name] = distance
        try:
            self._file.write(_line(name, distance))
            self._file.flush()
        except OSError as error:
            raise CacheError(f"{self.path}: the distances cannot be kept ({error}); make room and go on") from error

    def close(self) -> None:
        """Write everything to the disk and close the file."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        self._cut = not content.endswith(b"\n")
        lines = content.splitlines()
        if not lines or _header(lines[0]) != self.key:
            self.dropped = max(1, len(lines))
            return
        for line in lines[1:]:
            entry = _entry(line)
            if entry is None:
                self.dropped += 1
            else:
                self._values[entry[0]] = entry[1]

    def _lines(self) -> list[str]:
        head = json.dumps({"format": FORMAT, "key": self.key}, sort_keys=True) + "\n"
        return [head, *(_line(name, distance) for name, distance in self._values.items())]


def _line(name: str, distance: float) -> str:
    """A line with a check of its own: a line that was cut or altered is told from a good one."""
    text = json.dumps([name, distance])
    return json.dumps([name, distance, hashlib.sha256(text.encode()).hexdigest()[:8]]) + "\n"


def _entry(line: bytes) -> tuple[str, float] | None:
    try:
        name, distance, _check = json.loads(line)
        good = isinstance(name, str) and isinstance(distance, float) and _line(name, distance).encode() == line + b"\n"
    except (ValueError, TypeError):
        return None
    return (name, distance) if good and math.isfinite(distance) and distance >= 0.0 else None


def _header(line: bytes) -> Any:
    try:
        document = json.loads(line)
        return document["key"] if document["format"] == FORMAT else None
    except (ValueError, TypeError, KeyError):
        return None
