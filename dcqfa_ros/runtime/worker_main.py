"""The engine worker's process: ``python -m dcqfa_ros.runtime.worker_main CONTROL_FD MEMORY_FD PARENT_PID``.

Started by :class:`dcqfa_ros.runtime.worker.EngineWorker`, never by hand. Messages on the control socket
(SOCK_SEQPACKET) are JSON objects. The first one from the parent says what to load and is answered by ``{"ready":
{...}}``; each further one asks for a chunk and is answered by ``{"ok": true}``. A failure is answered by ``{"error":
message}``.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import re
import resource
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcqfa_ros.runtime.huge_pages import keep_heap_together

if TYPE_CHECKING:
    from dcqfa_ros.bundle.load import Bundle
    from dcqfa_ros.runtime.guidance import Pullback

MAX_MESSAGE = 65_536
_PARENT_POLL_MS = 1000


def watch_parent(control: socket.socket, parent: int) -> None:
    """End this process as soon as the parent is gone or has closed the control socket. Never returns.

    Not ``PR_SET_PDEATHSIG``: that fires when the *thread* that started the worker ends, and engines are started from
    short-lived threads. The parent's id is compared too, in case the socket's other end was inherited by a third
    process.
    """
    poller = select.poll()
    poller.register(control, select.POLLRDHUP)
    while os.getppid() == parent:
        if poller.poll(_PARENT_POLL_MS):
            break
    os._exit(0)


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident memory of a process, bytes; 0 where it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(pid: int | str = "self") -> int:
    """Return the largest resident memory that a process has had, bytes; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def limit_memory(limit: int) -> None:
    """Let this process take at most ``limit`` bytes: what goes beyond is refused to it, as where memory is short.

    Private writable memory is what counts (``RLIMIT_DATA``). Address space would not do: engines reserve much of it
    that they never touch.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _serve(control: socket.socket, memory_fd: int) -> None:
    request = json.loads(control.recv(MAX_MESSAGE))
    begin = time.perf_counter()
    keep_heap_together()
    if request["memory_limit"]:
        limit_memory(request["memory_limit"])
    # Imported here, so that a missing or broken package is reported to the parent like any other failure.
    from dcqfa_ros.bundle.load import load_bundle
    from dcqfa_ros.runtime.chunking import Method
    from dcqfa_ros.runtime.engine import ROLES
    from dcqfa_ros.runtime.engines import open_engine
    from dcqfa_ros.runtime.errors import PolicyError
    from dcqfa_ros.runtime.policy import PolicyRuntime
    from dcqfa_ros.runtime.worker_memory import ChunkMemory

    bundle = load_bundle(Path(request["folder"]), verify=False)
    variant = request["variant"]
    if request["weights"] not in [v.weights for v in bundle.spec.variants if v.name == variant]:
        raise PolicyError(f"{bundle.folder}: variant {variant!r} has changed since the bundle was opened")
    files = {role: bundle.read(variant, role) for role in ROLES}
    memory = ChunkMemory(bundle.spec, memory_fd)
    engine = open_engine(request["runtime"], files, threads=request["threads"], name=variant)
    runtime = PolicyRuntime(bundle.spec, engine, functools.partial(_open_pullback, bundle, dict(request)))
    del files
    loaded = time.perf_counter()
    runtime.warm_up(request["steps"], method=Method(request["chunking"]))
    gc.collect()
    gc.freeze()  # what is loaded now stays: later collections need not look at it
    _return_free_memory()
    ready = {
        "engine": runtime.engine.name,
        "load_ms": 1e3 * (loaded - begin),
        "warm_up_ms": 1e3 * (time.perf_counter() - loaded),
        "rss_bytes": resident_bytes(),
    }
    _send(control, {"ready": ready})
    while message := control.recv(MAX_MESSAGE):
        request = json.loads(message)
        try:
            memory.actions[:, : request["actions"]] = runtime.predict(
                memory.observation,
                [request["seed"]],
                [request["chunk"]],
                request["steps"],
                request["tokens"],
                [memory.continuation(request["continuation"])],
                request["actions"],
            )
        except PolicyError as error:
            _send(control, {"error": str(error)})
        else:
            _send(control, {"ok": True})


def _open_pullback(bundle: Bundle, request: dict[str, Any]) -> Pullback:
    """Open the denoiser's derivative; only chunking ``guided`` asks for it."""
    from dcqfa_ros.runtime.ort_pullback import open_pullback

    variant = request["variant"]
    denoiser = bundle.read(variant, "denoiser")
    return open_pullback(request["runtime"], denoiser, threads=request["threads"], name=variant)


def _return_free_memory() -> None:
    """Give the pages back that parsing and converting the graphs took (tens of megabytes), where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    control.send(json.dumps(message).encode()[:MAX_MESSAGE])


def main(argv: list[str]) -> int:
    """Serve until the parent goes; exit codes: 0 parent gone, 1 reported failure."""
    # Ctrl-C, a service manager's TERM and a closed terminal reach every process of a tree at once; when to stop is the
    # parent's decision, and a worker that dies first would look like a crash.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(argv[0]))
    threading.Thread(target=watch_parent, args=(control, int(argv[2])), daemon=True, name="watch_parent").start()
    try:
        _serve(control, int(argv[1]))
    except Exception as error:  # noqa: BLE001  the last boundary: whatever failed is the parent's to report
        from dcqfa_ros.errors import UserError

        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        _send(control, {"error": text[: MAX_MESSAGE // 8]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
