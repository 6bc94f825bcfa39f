"""The allocator keeps blocks of a picture's size, unless the user has tuned it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")

PROGRAM = """
import resource
from dcqfa_ros.ros.image_memory import keep_picture_memory
print(keep_picture_memory())
for _ in range(20):
    block = bytearray(921_600)
    del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(200):
    block = bytearray(921_600)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**environment: str) -> tuple[str, int]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k not in ("GLIBC_TUNABLES",)}
    env.pop("LD_PRELOAD", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**env, **environment}, capture_output=True, text=True, check=True
    )
    answer, faults = done.stdout.split()
    return answer, int(faults)


def test_pictures_reuse_their_memory() -> None:
    answer, faults = run()
    assert answer == "True"
    assert faults < 1000, "200 pictures of 225 pages each"


def test_a_user_who_tuned_the_allocator_is_left_alone() -> None:
    answer, faults = run(MALLOC_MMAP_THRESHOLD_="100000", MALLOC_TRIM_THRESHOLD_="100000")
    assert answer == "False"
    assert faults > 10_000, "each picture is mapped anew, as that user wanted it"
