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
    for name in "efg":
        (folder / f"test_{name}.py").write_text("def test_only(): pass\n")
    options = ["-n2", "--dist", "loadfile", "--no-loadscope-reorder", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90).stdout.splitlines()[-1]


def test_a_test_process_that_dies_costs_the_test_that_killed_it_and_the_run_ends(tmp_path: Path) -> None:
    assert re.search(r"\b1 failed, 14 passed, 1 rerun in", run(tmp_path, always=True))


def test_a_test_that_killed_its_process_once_is_repeated_in_another(tmp_path: Path) -> None:
    assert re.search(r" 15 passed, 1 rerun in", run(tmp_path, always=False))


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
    for debugger in (True, False):
        config = SimpleNamespace(option=SimpleNamespace(usepdb=debugger))
        item: Any = SimpleNamespace(nodeid=name, obj=function, add_marker=marks.append, config=config)
        repeats.mark([item])
        assert [(m.name, m.kwargs) for m in marks] == [("flaky", {"reruns": 1})] * (repeated and not debugger)


class Node:
    """A test process as the scheduler sees it: runs a test only once it has another one or knows that none follows."""

    def __init__(self) -> None:
        self.gateway = SimpleNamespace(id="gw")
        self.waiting: list[int] = []
        self.shutting_down = False

    def send_runtest_some(self, indices: list[int]) -> None:
        self.waiting += indices

    def shutdown(self) -> None:
        self.shutting_down = True

    def run(self, scheduler: Any) -> list[int]:
        """Run what it can; returns the tests."""
        done = []
        while len(self.waiting) > 1 or (self.waiting and self.shutting_down):
            done.append(self.waiting.pop(0))
            scheduler.mark_test_complete(self, done[-1])
        return done


def scheduler(names: list[str]) -> tuple[Any, Node, Node]:
    """A scheduler with two processes that have got their first tests."""
    values = {"dist": "loadfile", "tx": ["popen"] * 2}
    option = SimpleNamespace(loadscopereorder=False, maxfail=0, verbose=0, debug=False)
    config: Any = SimpleNamespace(getvalue=values.get, option=option, getoption=values.get)
    made = repeats.pytest_xdist_make_scheduler(config, Log())
    nodes = Node(), Node()
    for node in nodes:
        made.add_node(node)
    for node in nodes:
        made.add_node_collection(node, names)
    made.schedule()
    return made, *nodes


class Log:
    """Swallows what the scheduler tells."""

    def __getattr__(self, name: str) -> Log:
        return self

    def __call__(self, *words: Any) -> None:
        return None


def test_processes_that_die_while_others_are_replaced_lose_only_the_tests_that_killed_them() -> None:
    names = [f"test_{file}.py::test_{number}" for file in "abcdef" for number in range(1 if file in "cf" else 3)]
    made, one, two = scheduler(names)
    killed = [names.index(made.remove_node(one))]
    third, fourth = Node(), Node()
    made.add_node(third)  # it still collects when the other one dies, too
    killed.append(names.index(made.remove_node(two)))
    made.mark_test_pending(names[killed[1]])  # to be repeated
    made.add_node(fourth)
    ran: list[int] = []
    for node in (third, fourth):
        made.add_node_collection(node, names)
        made.schedule()
        ran += node.run(made)
    for _ in range(30):
        ran += third.run(made) + fourth.run(made)
    assert made.tests_finished and not made.workqueue
    assert sorted([*ran, killed[0]]) == list(range(len(names)))


def test_a_process_that_finds_other_tests_than_the_others_is_ended() -> None:
    made, one, _ = scheduler(["test_a.py::test_1", "test_b.py::test_1"])
    made.remove_node(one)
    late = Node()
    made.add_node(late)
    made.add_node_collection(late, ["test_a.py::test_1", "test_a.py::test_2", "test_b.py::test_1"])
    assert late.shutting_down and not late.waiting


def test_the_only_test_of_the_last_file_is_run_by_a_process_that_came_late() -> None:
    made, one, two = scheduler(["test_a.py::test_1", "test_b.py::test_1"])
    two.run(made)
    made.remove_node(one)
    made.mark_test_pending("test_a.py::test_1")
    late = Node()
    made.add_node(late)
    made.add_node_collection(late, ["test_a.py::test_1", "test_b.py::test_1"])
    made.schedule()
    assert late.run(made) + two.run(made) == [0]
    assert made.tests_finished


def test_every_folder_of_the_wall_clock_is_there() -> None:
    assert all((Path(__file__).parent / folder).is_dir() for folder in repeats.WALL_CLOCK)
