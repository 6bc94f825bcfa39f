"""Scores of one entry on one task, kept block by block, so that an interruption loses at most the block it was in."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.compare.config import CompareError
from training.files import write_atomically

FORMAT = 1
UNRECORDED = "not recorded"
Episode = tuple[float, int]  # score 0..1, steps executed


class CellStore:
    """A file of JSON lines that only grows. Its first line says what the scores are of; every line has a check.

    Damaged lines are dropped, and the file is written anew without them: what is missing is played again.

    Attributes:
        path: the file.
        key: what the scores are of.
        seconds: that playing took, all blocks together.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """Open the scores of ``key``, in ``path``.

        Raises:
            CompareError: the file cannot be read, or holds scores of something else; the field that differs is named.
        """
        self.path, self.key = path, json.loads(json.dumps(key))  # as it comes back from the file
        self.seconds = 0.0
        self._digest = digest(self.key)
        self._episodes: dict[int, Episode] = {}
        self._engines: dict[int, Mapping[str, str] | None] = {}
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise CompareError(f"{path}: cannot be read ({error.strerror})") from error
        self._has_head = bool(content)
        if content:
            self._read(content)

    def __contains__(self, seed: int) -> bool:
        """Whether the episode of ``seed`` was played."""
        return seed in self._episodes

    def __getitem__(self, seed: int) -> Episode:
        """The episode of ``seed``."""
        return self._episodes[seed]

    def engines(self, seeds: Iterable[int]) -> dict[str, list[str]] | None:
        """Versions of the engines that these seeds were played with, all that there are of each.

        Of blocks that do not say it there is ``not recorded``; None where none of them does.
        """
        recorded = [self._engines.get(seed) for seed in seeds]
        names = dict.fromkeys(name for versions in recorded if versions is not None for name in versions)
        if not names:
            return None
        return {
            name: list(dict.fromkeys(UNRECORDED if of is None else of.get(name, UNRECORDED) for of in recorded))
            for name in names
        }

    def add(
        self,
        seeds: Sequence[int],
        scores: Sequence[float],
        steps: Sequence[int],
        seconds: float,
        engines: Mapping[str, str] | None = None,
    ) -> None:
        """Keep a block, with the versions of the engines that played it; it is on the disk when this returns.

        Raises:
            CompareError: the disk refuses.
            ValueError: lengths differ, or a score is not within 0 and 1.
        """
        if not len(seeds) == len(scores) == len(steps):
            raise ValueError(f"block: {len(seeds)} seeds, {len(scores)} scores, {len(steps)} numbers of steps")
        if not all(math.isfinite(score) and -1e-9 <= score <= 1.0 + 1e-9 for score in scores):
            raise ValueError(f"block from seed {seeds[0]}: a score is not within 0 and 1")
        row: dict[str, Any] = {"seeds": list(seeds), "scores": list(scores), "steps": list(steps)}
        row["seconds"] = round(seconds, 2)
        if engines is not None:
            row["engines"] = dict(engines)
        line = self._line(row)
        try:
            if not self._has_head or not self.path.exists():  # an empty file has none, either
                write_atomically(self.path, self._head().encode())  # a torn first line would stop every later run
                self._has_head = True
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CompareError(f"{self.path}: cannot be written ({error.strerror}); make room") from error
        self._take(row)

    def _take(self, row: Mapping[str, Any]) -> None:
        for seed, score, steps in zip(row["seeds"], row["scores"], row["steps"], strict=True):
            self._episodes[int(seed)] = (float(score), int(steps))
            self._engines[int(seed)] = row.get("engines")
        self.seconds += float(row["seconds"])

    def _head(self) -> str:
        return json.dumps({"format": FORMAT, "key": self.key}) + "\n"

    def _line(self, row: Mapping[str, Any]) -> str:
        check = hashlib.sha256((self._digest + json.dumps(row)).encode()).hexdigest()[:12]
        return json.dumps({**row, "check": check}) + "\n"

    def _read(self, content: bytes) -> None:
        head, *lines = content.split(b"\n")
        try:
            document = json.loads(head)
            there = document["key"]
            known = document["format"] == FORMAT
        except (ValueError, TypeError, KeyError, RecursionError):
            there, known = None, False
        if not known:
            raise CompareError(f"{self.path}: not a file of scores of this version; delete it, or give another --out")
        refuse_other(f"{self.path}", there, self.key)
        kept, dropped = [self._head()], 0
        for line in filter(None, lines):
            row = self._row(line)
            if row is None:
                dropped += 1
                continue
            kept.append(line.decode() + "\n")
            self._take(row)
        if dropped or not content.endswith(b"\n"):
            write_atomically(self.path, "".join(kept).encode())
        if dropped:
            print(f"{self.path}: {dropped} damaged lines dropped; they are played again", file=sys.stderr)

    def _row(self, line: bytes) -> dict[str, Any] | None:
        try:
            row = json.loads(line)
            row.pop("check")
            return row if self._line(row).encode() == line + b"\n" else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None


def digest(document: Any) -> str:
    """SHA-256 of a JSON document."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def differing(there: Any, here: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Fields in which two JSON documents differ, with both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() | here.keys()):
            where = f"{field}.{name}" if field else name
            yield from differing(there.get(name), here.get(name), where)
    elif there != here:
        yield field, there, here


def refuse_other(what: str, there: Any, here: Any) -> None:
    """Refuse to put results together that are not of the same.

    Raises:
        CompareError: naming the fields that differ.
    """
    fields = list(differing(there, here))
    if not fields:
        return
    named = "; ".join(f"{field}: {shown(old)} there, {shown(new)} here" for field, old, new in fields[:4])
    more = f" and {len(fields) - 4} more" if len(fields) > 4 else ""
    raise CompareError(
        f"{what}: holds results that must not be mixed with these, they differ in {named}{more}; restore that, delete "
        "the file to play anew, or give another --out"
    )


def shown(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
