"""Memory in use goes to huge pages where the system has them; what is not in use is not taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dcqfa_ros.runtime import huge_pages

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
