"""Runs the processes of a graph where ROS 2's ``launch`` is not installed: output, deaths, restarts, an orderly end.

Every child leads a session of its own, so Ctrl-C reaches the supervisor only, which then brings the graph down in
order; should the supervisor itself be killed, the kernel ends the children (see :mod:`dcqfa_ros.ros.process`).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from dcqfa_ros.ros.bringup import NodeDescription
from dcqfa_ros.ros.isolation import child_environment
from dcqfa_ros.ros.process import PARENT_VARIABLE, STOP_SIGNALS

ORDERLY_S = 1.4  # for the manager to deactivate the graph in order
INTERRUPT_S = 0.7  # from INT to TERM
TERMINATE_S = 0.4  # from TERM to KILL
RESTARTS, RESTART_WINDOW_S, RESTART_DELAY_S = 3, 60.0, 0.5
_COLORS = (36, 32, 33, 35, 34, 96, 92, 93, 95, 94)
_SUPERVISOR = "dcqfa up"

Show = Callable[[str, str], None]
"""Takes a process' name and one line of its output."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        exit_code: 0 after a signal or an orderly end of a node, else the code of the node that died (128 + signal).
        node: the node that ended the run; empty when a signal or the caller did.
        reason: one sentence.
    """

    exit_code: int
    node: str
    reason: str


@dataclass
class _Child:
    description: NodeDescription
    command: list[str]
    process: subprocess.Popen[bytes]
    rest: bytes = b""
    starts: deque[float] = field(default_factory=deque)


class Supervisor:
    """Starts the described nodes and keeps watch until one ends, a signal comes or :meth:`request_stop` is called."""

    def __init__(
        self,
        nodes: Sequence[NodeDescription],
        *,
        namespace: str = "",
        env: Mapping[str, str] | None = None,
        restart: bool = False,
        show: Show | None = None,
        poll: Callable[[], None] | None = None,
        python: str = sys.executable,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            nodes: what to run, in order.
            namespace: ROS namespace of every node, "" for the root.
            env: environment of the children; this process's own if None.
            restart: start a node again that dies with an error, at most three times a minute.
            show: takes the output line by line; by default it is printed with a coloured prefix.
            poll: called about every 0.1 s from :meth:`run`, for example to watch a time limit.
            python: interpreter of the nodes.
        """
        self._nodes = tuple(nodes)
        self._namespace = "/" + namespace.strip("/")
        self._env = child_environment(os.environ if env is None else env, python)
        self._env[PARENT_VARIABLE] = str(os.getpid())
        self._restart = restart
        self._show = show or _Printer([n.name for n in nodes])
        self._poll = poll
        self._python = python
        self._children: dict[str, _Child] = {}
        self._due: dict[str, float] = {}
        self._selector = selectors.DefaultSelector()
        self._stop: Outcome | None = None

    @property
    def pids(self) -> dict[str, int]:
        """Process id by node name, of what runs now."""
        return {name: c.process.pid for name, c in self._children.items() if c.process.poll() is None}

    def request_stop(self, reason: str, exit_code: int = 0) -> None:
        """End the run in order, for example from ``poll`` or ``show``; the first request counts."""
        if self._stop is None:
            self._stop = Outcome(exit_code, "", reason)

    def run(self) -> Outcome:
        """Run until the end; call from the main thread. Every child is gone when this returns.

        Raises:
            OSError: a process could not be started (the others are ended first).
        """
        with tempfile.TemporaryDirectory(prefix="dcqfa_up_") as folder, self._signals():
            try:
                for node in self._nodes:
                    self._start(node, _command(node, self._namespace, Path(folder), self._python))
                while True:
                    self._wait(0.1)
                    self._look_after_children()
                    if self._poll is not None:
                        self._poll()
                    if self._stop is not None:
                        return self._stop
            finally:
                self._bring_down()
                self._selector.close()

    # Processes -------------------------------------------------------------------------------------------------------

    def _start(self, node: NodeDescription, command: list[str]) -> None:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**self._env, **node.env},
            start_new_session=True,
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        known = self._children.get(node.name)
        child = _Child(node, command, process, starts=known.starts if known else deque())
        child.starts.append(time.monotonic())
        self._children[node.name] = child
        self._selector.register(process.stdout, selectors.EVENT_READ, child)

    def _wait(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            if isinstance(key.data, _Child):
                self._read(key.data)
            else:
                with contextlib.suppress(BlockingIOError):
                    key.data.recv(4096)

    def _read(self, child: _Child) -> None:
        stream = child.process.stdout
        assert stream is not None
        try:
            data = os.read(stream.fileno(), 65536)
        except BlockingIOError:  # nothing there now
            return
        lines = (child.rest + data).split(b"\n")
        child.rest = lines.pop()
        if not data:
            lines, child.rest = ([child.rest] if child.rest else []), b""
            self._selector.unregister(stream)
            stream.close()
        for line in lines:
            self._print(child.description.name, line.decode(errors="replace").rstrip("\r"))

    def _print(self, name: str, line: str) -> None:
        try:
            self._show(name, line)
        except BrokenPipeError:  # the reader of our output left: nobody watches any more
            self._show = lambda _name, _line: None
            self.request_stop("the output was closed", exit_code=1)

    def _look_after_children(self) -> None:
        now = time.monotonic()
        for name, child in list(self._children.items()):
            if name in self._due:
                if now >= self._due[name]:
                    del self._due[name]
                    self._print(_SUPERVISOR, f"restarting {name}")
                    self._start(child.description, child.command)
                continue
            code = child.process.poll()
            if code is not None:
                self._drain(child)
                _kill_group(child.process, signal.SIGKILL)  # what it started must not outlive it
                self._bury(child, code, now)

    def _bury(self, child: _Child, code: int, now: float) -> None:
        name = child.description.name
        text = f"{name} {_describe(code)}"
        while child.starts and now - child.starts[0] > RESTART_WINDOW_S:
            child.starts.popleft()
        if self._restart and code != 0 and len(child.starts) <= RESTARTS:
            self._print(_SUPERVISOR, f"{text}; it will be restarted")
            self._due[name] = now + RESTART_DELAY_S
        else:
            self._end(Outcome(code if code >= 0 else 128 - code, name, text))

    def _end(self, outcome: Outcome) -> None:
        if self._stop is None:
            self._stop = outcome
            self._print(_SUPERVISOR, f"{outcome.reason}: bringing the graph down")

    # The end ---------------------------------------------------------------------------------------------------------

    def _bring_down(self) -> None:
        """INT to those that stop first, then INT, TERM and KILL to all; every child is reaped."""
        first = [c for c in self._alive() if c.description.stops_first]
        for child in first:
            _kill_group(child.process, signal.SIGINT, leader_only=True)
        self._await(first, ORDERLY_S)
        for number, patience in ((signal.SIGINT, INTERRUPT_S), (signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, 1.0)):
            alive = self._alive()
            for child in alive:
                if number is not signal.SIGINT:
                    self._print(_SUPERVISOR, f"{child.description.name} still runs: {number.name}")
                _kill_group(child.process, number, leader_only=number is signal.SIGINT)
            self._await(alive, patience)
        for child in self._children.values():
            child.process.wait()
            _kill_group(child.process, signal.SIGKILL)
            self._drain(child)

    def _alive(self) -> list[_Child]:
        return [c for c in self._children.values() if c.process.poll() is None]

    def _await(self, children: Sequence[_Child], seconds: float) -> None:
        end = time.monotonic() + seconds
        while any(c.process.poll() is None for c in children) and time.monotonic() < end:
            self._wait(0.02)

    def _drain(self, child: _Child) -> None:
        """Show what a dead child said last; its own children may still hold the pipe, so do not wait for its end."""
        stream = child.process.stdout
        if stream is None or stream.closed:
            return
        self._read(child)
        if not stream.closed:
            if child.rest:
                self._print(child.description.name, child.rest.decode(errors="replace"))
                child.rest = b""
            self._selector.unregister(stream)
            stream.close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note INT, TERM and HUP, and wake on them and on the death of a child."""
        receive, send = socket.socketpair()
        receive.setblocking(False)
        send.setblocking(False)
        self._selector.register(receive, selectors.EVENT_READ, receive)
        previous_fd = signal.set_wakeup_fd(send.fileno(), warn_on_full_buffer=False)
        previous: dict[signal.Signals, Any] = {}

        def handle(number: int, _frame: FrameType | None) -> None:
            if number != signal.SIGCHLD:
                self.request_stop(f"signal {signal.Signals(number).name}")

        try:
            for number in (*STOP_SIGNALS, signal.SIGCHLD):
                if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # started with nohup
                previous[number] = signal.signal(number, handle)
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            receive.close()
            send.close()


class _Printer:
    """Prints lines with the process' name before them, coloured on a terminal."""

    def __init__(self, names: Sequence[str]) -> None:
        self._width = max(len(n) for n in [*names, _SUPERVISOR])
        self._colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(names)}
        self._colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def __call__(self, name: str, line: str) -> None:
        prefix = f"[{name}]".ljust(self._width + 2)
        if self._colored:
            prefix = f"\x1b[{self._colors.get(name, 1)}m{prefix}\x1b[0m"
        print(f"{prefix} {line}", flush=True)


def _command(node: NodeDescription, namespace: str, folder: Path, python: str) -> list[str]:
    if node.command:
        return node.command_line(python)
    arguments = [python, "-m", node.module, "--ros-args", "-r", f"__node:={node.name}", "-r", f"__ns:={namespace}"]
    for source, target in node.remappings.items():
        arguments += ["-r", f"{source}:={target}"]
    for file in node.parameter_files:
        arguments += ["--params-file", str(file)]
    if node.parameters:  # as a file: on the command line a text such as "1" would become a number
        own = folder / f"{node.name}.yaml"
        own.write_text(yaml.safe_dump({"/**": {"ros__parameters": _plain(node.parameters)}}), encoding="utf-8")
        arguments += ["--params-file", str(own)]
    return arguments


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``parameters`` as ROS reads them from YAML: it has no type for an empty list, hence a list of one ""."""
    return {k: (list(v) or [""]) if isinstance(v, (list, tuple)) else v for k, v in parameters.items()}


def _describe(code: int) -> str:
    if code == 0:
        return "ended"
    if code > 0:
        return f"died with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def _kill_group(process: subprocess.Popen[bytes], number: signal.Signals, leader_only: bool = False) -> None:
    """Signal a child's whole session, or the child alone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if leader_only:
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)
