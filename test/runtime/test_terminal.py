"""Keys of a pseudo-terminal arrive at once, and the terminal is given back as it was, however the reader ends."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dcqfa_ros.runtime.terminal import KeyTerminal, TerminalError, has_terminal, kept_terminal

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from dcqfa_ros.runtime.terminal import KeyTerminal, kept_terminal
terminal = KeyTerminal()
terminal.open()
print("ready", flush=True)
while True:
    data = terminal.read()
    if data:
        print("got", data.hex(), flush=True)
    if b"x" in data:
        raise RuntimeError("oh")
    if b"q" in data:
        sys.exit(0)
    time.sleep(0.01)
"""


@dataclass
class Session:
    """A process with a terminal of its own, as a shell would start it, and the terminal's other end."""

    pid: int
    master: int
    slave: int
    before: list[object]
    text: str = ""

    def expect(self, text: str, timeout: float = 20.0) -> None:
        end = time.monotonic() + timeout
        os.set_blocking(self.master, False)
        while text not in self.text:
            assert time.monotonic() < end, f"not within {timeout} s: {text!r} in {self.text!r}"
            try:
                self.text += os.read(self.master, 4096).decode(errors="replace")
            except (BlockingIOError, OSError):
                time.sleep(0.01)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait(self, timeout: float = 20.0) -> int:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        raise AssertionError("the process did not end")

    @property
    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before


@pytest.fixture
def session() -> Iterator[Callable[..., Session]]:
    made: list[Session] = []

    def start(code: str) -> Session:
        master, slave = pty.openpty()
        before = termios.tcgetattr(slave)
        pid = os.fork()
        if pid == 0:
            try:
                _login(slave)
                os.execv(sys.executable, [sys.executable, "-c", code])
            finally:
                os._exit(127)
        made.append(Session(pid, master, slave, before))
        return made[-1]

    yield start
    for s in made:
        if s.pid:
            os.kill(s.pid, signal.SIGKILL)
            os.waitpid(s.pid, 0)
        os.close(s.master)
        os.close(s.slave)


def _login(slave: int) -> None:
    """Make ``slave`` this process's terminal (``os.login_tty`` is there from Python 3.11 on only)."""
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for descriptor in (0, 1, 2):
        os.dup2(slave, descriptor)


def test_keys_arrive_one_by_one_and_unechoed(session: Callable[..., Session]) -> None:
    run = session(SCRIPT.format(root=str(ROOT)))
    run.expect("ready")
    assert not run.is_as_before
    run.type(b"w")
    run.expect("got 77")
    assert "w" not in run.text.replace("got 77", "")
    run.type(b"\x1a")  # Ctrl-Z is an ordinary key: a suspended process cannot stop an arm
    run.expect("got 1a")
    run.type(b"q")
    assert run.wait() == 0
    assert run.is_as_before


@pytest.mark.parametrize(("key", "code"), [(b"q", 0), (b"x", 1), (b"\x03", -signal.SIGINT)])
def test_the_terminal_is_given_back(session: Callable[..., Session], key: bytes, code: int) -> None:
    run = session(SCRIPT.format(root=str(ROOT)))
    run.expect("ready")
    run.type(key)
    assert run.wait() == code
    assert run.is_as_before


def test_a_parent_gives_the_terminal_back_when_its_child_is_killed(session: Callable[..., Session]) -> None:
    child = SCRIPT.format(root=str(ROOT)).replace('"got"', "os.getpid(), 'got'")
    parent = (
        f"import sys, subprocess; sys.path.insert(0, {str(ROOT)!r})\n"
        "from dcqfa_ros.runtime.terminal import kept_terminal\n"
        f"with kept_terminal(): code = subprocess.call([sys.executable, '-c', {child!r}])\n"
        "sys.exit(-code)"
    )
    run = session(parent)
    run.expect("ready")
    run.type(b"w")
    run.expect("got 77")
    os.kill(int(run.text.split("got")[0].split()[-1]), signal.SIGKILL)
    assert run.wait() == signal.SIGKILL
    assert run.is_as_before


def test_without_a_terminal_it_says_what_to_use() -> None:
    read, write = os.pipe()
    try:
        assert not has_terminal(read)
        with pytest.raises(TerminalError, match=r"needs a terminal .* use a gamepad"):
            KeyTerminal(read).open()
        with kept_terminal(read):
            pass
    finally:
        os.close(read)
        os.close(write)
