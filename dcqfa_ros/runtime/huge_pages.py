"""Weights in huge pages: an engine on the CPU reads megabytes per step, and small pages make it wait for translations.

Measured on one thread of a server CPU, a chunk on ONNX Runtime takes about a tenth less (``docs/results.md``). On
Linux only, best effort and silent: where the system forbids huge pages, memory simply stays as it is.

A worker on the robot has its heap in huge pages from the start (:func:`with_huge_heap`): the kernel fills one in small
pieces. Moving memory there afterwards (:func:`use_huge_pages`) copies 2 MB at a time, during which a kernel that does
not preempt itself runs nothing else on that processor, a control tick of real-time priority included.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # <asm-generic/mman-common.h>; collapsing needs Linux 6.1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST = 2**30
_TUNABLES, _HUGE_HEAP = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
RESIDENT = 0.9  # pages of a huge one that must be in memory already: what is not there would be taken from the system


def keep_heap_together() -> bool:
    """Let the C library take large blocks from its heap, where neighbours share huge pages, and not map each by itself.

    It changes the whole process, and freed memory stays with it: for processes whose purpose is one engine.

    Returns:
        Whether the C library did so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))


def with_huge_heap(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process whose C library asks for huge pages as its heap grows.

    For processes that are started with it: glibc 2.35 or newer reads this once, others know nothing of it. What the
    environment says of it already stays.
    """
    given = environment.get(_TUNABLES, "")
    if any(entry.startswith(_HUGE_HEAP.split("=")[0] + "=") for entry in given.split(":")):
        return dict(environment)
    return {**environment, _TUNABLES: f"{given}:{_HUGE_HEAP}" if given else _HUGE_HEAP}


def use_huge_pages() -> int:
    """Put the memory of this process that is large and in use into huge pages, now or (before Linux 6.1) soon.

    Takes a fraction of a second per 100 MB and can hold up whatever shares the processor: not on a robot that moves.

    Returns:
        Bytes that were put into huge pages at once.
    """
    size = _huge_page()
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    pages = np.zeros(size // mmap.PAGESIZE, np.uint8)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    collapsed = 0
    for begin in _aligned(size):
        if libc.mincore(begin, size, pages.ctypes.data) != 0 or (pages & 1).mean() < RESIDENT:
            continue
        if libc.madvise(begin, size, _MADV_HUGEPAGE) == 0 and libc.madvise(begin, size, _MADV_COLLAPSE) == 0:
            collapsed += size
    return collapsed


def _aligned(size: int) -> Iterator[int]:
    """Addresses of all aligned ranges of ``size`` bytes in this process' private, writable memory without a file."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if not fields[1].startswith("rw") or not fields[1].endswith("p") or fields[5:] not in ([], ["[heap]"]):
            continue
        low, high = (int(address, 16) for address in fields[0].split("-"))
        yield from range(-(-low // size) * size, high - size + 1, size)


def _huge_page() -> int:
    """Bytes of a huge page where programs may ask for them, else 0."""
    try:
        allowed = (_SYSTEM / "enabled").read_text(encoding="ascii")
        size = int((_SYSTEM / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
    return 0 if "[never]" in allowed else size
