"""Child processes of a benchmark: their last line is a JSON document, and none outlives the measurement."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcqfa_ros.errors import UserError


class BenchError(UserError, RuntimeError):
    """The benchmark's processes did not do their part; says which and what they printed."""


def run_module(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start ``python -m`` with ``arguments`` and text pipes to all of its streams; ``env`` None: this process' own."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str], name: str, timeout_s: float) -> dict[str, Any]:
    """End a process' standard input, wait for it and return the JSON document of its last line.

    Raises:
        BenchError: it did not end in time, or failed; the message holds the end of its stderr.
    """
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise BenchError(f"the {name} did not end within {timeout_s:.0f} s") from None
    lines = out.strip().splitlines()
    if process.returncode or not lines:
        text = " ".join(err.split())[-500:] or "nothing on stderr"
        raise BenchError(f"the {name} ended with code {process.returncode}: {text}")
    document: dict[str, Any] = json.loads(lines[-1])
    return document


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process if it still runs, and close its pipes."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def children(pid: int | None = None) -> set[int]:
    """Process ids of a process' children, zombies among them; ``pid`` None: of this process.

    Read from every process' parent: ``/proc/PID/task/*/children`` misses a child whose thread of origin ends meanwhile,
    and may miss any while children come and go (proc(5)).
    """
    parent = os.getpid() if pid is None else pid
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[1]) == parent:
            found.add(int(file.parent.name))
    return found
