"""Memory of this process and all its descendants, sampled while a graph runs (Linux)."""

from __future__ import annotations

import os
import time
from pathlib import Path

from dcqfa_ros.runtime.worker_main import resident_bytes

SAMPLE_PERIOD_S = 1.0
_PROC = Path("/proc")


def tree_memory(root: int | None = None) -> int:
    """Sum of the resident memory of process ``root`` (this one if None) and its descendants, bytes.

    Pages that several processes share count once for each, so this is an upper bound. Processes that end meanwhile
    count as 0.
    """
    return sum(resident_bytes(pid) for pid in process_tree(os.getpid() if root is None else root))


def process_tree(root: int) -> list[int]:
    """Return the process ``root`` and all its descendants that there are now, parents before their children."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(after_name[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:  # grows meanwhile
        found += children.get(pid, [])
    return found


class MemoryWatch:
    """Keeps the highest sample; ``sample`` is cheap to call often and looks once per ``SAMPLE_PERIOD_S``."""

    def __init__(self) -> None:
        """Begin at zero; nothing is sampled yet."""
        self.peak_bytes = 0
        self._next = 0.0

    def sample(self) -> None:
        """Take a sample when one is due."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + SAMPLE_PERIOD_S
            self.peak_bytes = max(self.peak_bytes, tree_memory())
