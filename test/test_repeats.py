"""What is repeated after a failure, and a test process that dies."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test import repeats

CRASHES = """
import os
from pathlib import Path
import pytest

def test_before(): pass

@pytest.mark.flaky(reruns=1)
def test_crashes():
    first = Path(__file__).with_suffix(".crashed")
    if ALWAYS or not first.exists():
        first.touch()
        os.abort()

def test_after(): pass
"""
OTHERS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_other(number): pass
"""


def run(folder: Path, always: bool) -> str:
    plugin = f"import sys\nsys.path.insert(0, {str(Path(repeats.__file__).parent)!r})\n"
    (folder / "conftest.py").write_text(plugin + "from repeats import pytest_xdist_make_scheduler\n")
    (folder / "test_a.py").write_text(CRASHES.replace("ALWAYS", str(always)))
    for name in "bcd":
        (folder / f"test_{name}.py").write_text(OTHERS)
    options = ["-n2", "--dist", "loadfile", "--no-loadscope-reorder", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90).stdout.splitlines()[-1]


def test_a_test_process_that_dies_costs_the_test_that_killed_it_and_the_run_ends(tmp_path: Path) -> None:
    assert re.search(r"\b1 failed, 11 passed, 1 rerun in", run(tmp_path, always=True))


def test_a_test_that_killed_its_process_once_is_repeated_in_another(tmp_path: Path) -> None:
    assert re.search(r" 12 passed, 1 rerun in", run(tmp_path, always=False))


@given(st.none())
def of_properties(nothing: None) -> None:
    """A property test."""


def plain() -> None:
    """Any other test."""


@pytest.mark.parametrize(
    ("name", "function", "repeated"),
    [
        ("test/drivers/test_ft300s.py::test_x[1/2]", plain, True),
        ("test/nodes/deeper/test_y.py::test_y", plain, True),
        ("test/drivers/test_modbus.py::test_x", of_properties, False),
        ("test/training/test_quant.py::test_x", plain, False),
        ("test/test_drivers.py::test_x", plain, False),
        ("elsewhere/drivers/test_x.py::test_x", plain, False),
    ],
)
def test_only_what_meets_the_wall_clock_is_repeated_and_once(name: str, function: Any, repeated: bool) -> None:
    marks: list[pytest.MarkDecorator] = []
    repeats.mark([SimpleNamespace(nodeid=name, obj=function, add_marker=marks.append)])  # type: ignore[list-item]
    assert [(m.name, m.kwargs) for m in marks] == [("flaky", {"reruns": 1})] * repeated


def test_every_folder_of_the_wall_clock_is_there() -> None:
    assert all((Path(__file__).parent / folder).is_dir() for folder in repeats.WALL_CLOCK)
