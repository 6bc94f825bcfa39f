"""Memory of the engine beyond weights and activations."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path


def resident_growth(build: Callable[[], object]) -> int:
    """Bytes by which this process' resident memory grows while the result of ``build`` is held.

    What ``build`` takes and gives back is not counted, but libraries that it loads for the first time are.
    """
    _release_freed_memory()
    before = resident_bytes()
    held = build()
    _release_freed_memory()
    growth = resident_bytes() - before
    del held
    return growth


def resident_bytes() -> int:
    """Memory of this process that is resident, in bytes."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
