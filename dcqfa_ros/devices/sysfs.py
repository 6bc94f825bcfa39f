"""Small files of ``/proc`` and ``/sys`` below a root folder: absence is information here, not an error.

Reading one may fail where it exists: the thermal zones of parts that are switched off answer EAGAIN on a Jetson (and a
reader that waits for the answer then waits for ever, node_exporter issue 3071), or -256 degrees.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_LIMIT = 1 << 16  # bytes; files of sysfs hold a page
_NUMBER = re.compile(r"(\d+)")


def read_text(file: Path) -> str | None:
    """Return a file's text without white space around it; None where it is absent or gives nothing now."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        return os.read(descriptor, _LIMIT).decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:
        return None
    finally:
        os.close(descriptor)


def read_int(file: Path) -> int | None:
    """Return the decimal number a file holds; None where it is absent or holds something else."""
    text = read_text(file)
    return int(text) if text and re.fullmatch(r"[+-]?[0-9]{1,20}", text) else None


def folders(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield the entries ``<prefix><number>`` of a folder, by number."""
    found: list[tuple[int, Path]] = []
    with contextlib.suppress(OSError):
        for entry in parent.iterdir():
            number = entry.name.removeprefix(prefix)
            if entry.name.startswith(prefix) and number.isdecimal():
                found.append((int(number), entry))
    return (path for _, path in sorted(found))


def numbered(name: str) -> int:
    """Return the first number in a file's name, 0 where there is none: to sort by."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else 0
