"""Memory in use goes to huge pages where the system has them; what is not in use is not taken."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dcqfa_ros.runtime import huge_pages
from dcqfa_ros.runtime.huge_pages import with_huge_heap

PROGRAM = """
import mmap, re
from pathlib import Path
from dcqfa_ros.runtime.huge_pages import keep_heap_together, use_huge_pages
def figure(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/smaps_rollup").read_text()).group(1))
together = keep_heap_together()
used = b"x" * (64 << 20)  # not an array: NumPy asks for huge pages itself
reserved = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
before, huge = figure("Rss"), figure("AnonHugePages")
told = use_huge_pages()
print(int(together), told, figure("AnonHugePages") - huge, figure("Rss") - before, len(used))
"""


def test_memory_in_use_goes_to_huge_pages_and_reserved_memory_is_not_taken() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    together, told, huge, growth, total = (int(word) for word in done.stdout.split())
    assert total == 64 << 20
    assert growth < 16 << 20
    if sys.platform == "linux":
        assert together in (0, 1)  # musl has no mallopt
    if told:  # Linux 6.1 and huge pages allowed
        assert huge >= told >= 32 << 20


@pytest.mark.parametrize("text", [None, "always madvise [never]\n"])
def test_nothing_happens_where_the_system_has_no_huge_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "enabled").write_text(text)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path)
    assert huge_pages.use_huge_pages() == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=1", "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("glibc.malloc.arena_max=1:glibc.malloc.hugetlb=2", "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=2"),
    ],
)
def test_a_worker_asks_for_a_huge_heap_unless_its_environment_says_otherwise(given: str | None, expected: str) -> None:
    before = {"OTHER": "stays"} | ({} if given is None else {"GLIBC_TUNABLES": given})
    assert with_huge_heap(before) == {"OTHER": "stays", "GLIBC_TUNABLES": expected}


HEAP = """
import re
from pathlib import Path
from dcqfa_ros.runtime.huge_pages import keep_heap_together
keep_heap_together()
used = b"x" * (64 << 20)
print(1024 * int(re.search(r"AnonHugePages:\\s+(\\d+) kB", Path("/proc/self/smaps_rollup").read_text()).group(1)))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or [int(n) for n in platform.libc_ver()[1].split(".")[:2]] < [2, 35],
    reason="heaps in huge pages need glibc 2.35",
)
def test_the_heap_of_a_process_started_so_lies_in_huge_pages() -> None:
    if not huge_pages._huge_page():
        pytest.skip("this system allows no huge pages")
    command = [sys.executable, "-c", HEAP]
    environment = with_huge_heap(os.environ)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    assert int(done.stdout) >= 48 << 20
