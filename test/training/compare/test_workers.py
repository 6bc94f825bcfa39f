"""The command with two processes, and signals to all of them at once: what a terminal or ``timeout`` sends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHORT = {"name": "short", "seeds": ["some"], "stress": {"episode_steps": 16}}
MAIN = """
import os, signal, sys, time
from importlib.metadata import EntryPoint
from pathlib import Path

MARKS = Path(os.environ["MARKS"])
if __name__ == "__mp_main__":
    (MARKS / f"imports-{os.getpid()}").touch()

from dcqfa_ros import cli
from training.compare import workers

original = workers.play


def play(policy, block):
    played = original(policy, block)
    (MARKS / f"plays-{block.entry}-{block.seeds[0]}").touch()
    while not (MARKS / "go").exists():
        time.sleep(0.02)
    if (MARKS / "fail").exists():
        raise RuntimeError("what went wrong")
    return played


workers.play = play
if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    cli.entry_points = lambda group: [EntryPoint("compare", "training.commands_compare:compare", group)]
    sys.exit(cli.main())
"""


class Comparison:
    """A comparison of four blocks in a process group of its own; none is played to its end before :meth:`go`."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.out, self.marks = folder / "out", folder / "marks"
        self.marks.mkdir()
        main = folder / "main.py"
        main.write_text(MAIN)
        self.process = subprocess.Popen(
            [sys.executable, main, "compare", "--config", config, "--workers", "2", "--out", self.out],
            cwd=folder,
            env=os.environ | {"MARKS": str(self.marks), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def marked(self, what: str) -> list[Path]:
        return list(self.marks.glob(f"{what}-*"))

    def wait_for(self, what: str) -> None:
        """Wait until both processes import, or both play."""
        deadline = time.monotonic() + 60
        while len(self.marked(what)) < 2:
            assert self.process.poll() is None and time.monotonic() < deadline, what
            time.sleep(0.01)

    def strike(self, number: signal.Signals) -> None:
        """Send a signal to all processes."""
        os.killpg(self.process.pid, number)

    def go(self) -> None:
        (self.marks / "go").touch()

    def end(self) -> tuple[int, str]:
        """Wait until no process holds standard error any more; exit code and errors."""
        _, errors = self.process.communicate(timeout=60)
        assert not any(alive(int(mark.name.partition("-")[2])) for mark in self.marked("imports"))
        return self.process.returncode, errors

    def kept(self) -> int:
        """Blocks in the folder."""
        return sum(file.read_text().count('"scores"') for file in self.out.glob("cells/short/*.jsonl"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def comparison(tiny_comparison: Callable[..., Path], tmp_path: Path) -> Iterator[Comparison]:
    """A comparison that has begun."""
    comparison = Comparison(tiny_comparison(tasks=[SHORT], claims=[]), tmp_path)
    yield comparison
    with suppress(ProcessLookupError):
        comparison.strike(signal.SIGKILL)
    comparison.process.communicate()


def quiet(errors: str) -> bool:
    """Whether nothing is told of but the comparison itself."""
    return not any(word in errors for word in ("Traceback", "error", "ended early", "leaked", "Warning", "resource_tr"))


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("imports", signal.SIGINT),
        ("plays", signal.SIGTERM),
        *(pytest.param("imports", n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGHUP)),
        *(pytest.param("plays", n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_signal_to_all_processes_keeps_what_they_are_playing(
    comparison: Comparison, when: str, number: signal.Signals
) -> None:
    comparison.wait_for(when)
    comparison.strike(number)
    if when == "plays":
        time.sleep(0.2)  # for those that would die of it
    comparison.go()
    code, errors = comparison.end()
    assert code == 130 and quiet(errors) and "run the same command again" in errors, errors
    assert comparison.kept() == len(comparison.marked("plays")) <= 2
    assert when == "imports" or comparison.kept() == 2


def test_a_second_ctrl_c_ends_all_processes_at_once(comparison: Comparison) -> None:
    comparison.wait_for("plays")
    comparison.strike(signal.SIGINT)
    time.sleep(1.0)  # two that come together are one
    assert comparison.process.poll() is None
    comparison.strike(signal.SIGINT)
    code, errors = comparison.end()
    assert code == 130 and quiet(errors) and comparison.kept() == 0, errors


def test_processes_whose_parent_is_killed_end(comparison: Comparison) -> None:
    comparison.wait_for("plays")
    comparison.process.kill()
    code, errors = comparison.end()
    assert code == -signal.SIGKILL and quiet(errors), errors


def test_what_fails_in_a_process_is_told_of_as_what_it_is(comparison: Comparison) -> None:
    (comparison.marks / "fail").touch()
    comparison.go()
    code, errors = comparison.end()
    assert code == 2
    told = errors.splitlines()[-1]
    assert "entry full: playing it on short failed with RuntimeError: what went wrong" in told and "kept" in told
    assert "Traceback" in errors and 'raise RuntimeError("what went wrong")' in errors
    assert not any(word in errors for word in ("ended early", "memory", "leaked"))
