"""An engine in its own process, so that loading and crashing never touch the process that controls a robot.

Loading an engine can hold the interpreter lock for hundreds of milliseconds and may exhaust memory. A worker is a fresh
Python interpreter that imports neither ROS nor the parent's main module; observations and actions travel through shared
memory, requests through a socket (round trip tens of microseconds). This module imports no engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dcqfa_ros
from dcqfa_ros.bundle.load import Bundle, load_bundle
from dcqfa_ros.runtime.chunking import Continuation, Method
from dcqfa_ros.runtime.engine import Float32
from dcqfa_ros.runtime.engines import ONNXRUNTIME, runtime_facts
from dcqfa_ros.runtime.errors import PolicyError, WorkerDiedError
from dcqfa_ros.runtime.huge_pages import with_huge_heap
from dcqfa_ros.runtime.observations import Observation, ObservationLayout
from dcqfa_ros.runtime.worker_main import MAX_MESSAGE, resident_bytes
from dcqfa_ros.runtime.worker_memory import ChunkMemory

_CLOSE_TIMEOUT_S = 1.0
_BOOTSTRAP = "_ROS_WHEELS_BOOTSTRAP_COMPLETE"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a started worker is.

    Attributes:
        pid: process id.
        engine: runtime and variant, as ``Engine.name``.
        variant: the bundle's variant.
        load_ms: imports, reading, checking and building the engine, milliseconds.
        warm_up_ms: the first chunks, milliseconds.
        start_ms: from :meth:`EngineWorker.start` to ready, milliseconds.
        rss_bytes: resident memory when it became ready.
    """

    pid: int
    engine: str
    variant: str
    load_ms: float
    warm_up_ms: float
    start_ms: float
    rss_bytes: int


def worker_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return a worker's environment: this package importable, one thread per numerical library.

    Where ROS comes from wheels, the interpreter re-executes itself once to set the library path and marks that in the
    environment; a mark without the path would break a child, so the mark goes where the path is missing.
    """
    environment = dict(base)
    root = str(Path(dcqfa_ros.__file__).resolve().parents[1])
    inherited = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != root]
    environment["PYTHONPATH"] = os.pathsep.join([root, *inherited])
    environment["PYTHONSAFEPATH"] = "1"  # the working folder must not shadow modules
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment.setdefault(name, "1")
    if _BOOTSTRAP in environment and not environment.get("LD_LIBRARY_PATH"):
        del environment[_BOOTSTRAP]
    return environment


class EngineWorker:
    """One variant of a bundle in a worker process, at batch 1.

    ``predict`` may be called from any thread, one call at a time. The worker ends with :meth:`close`, with the last
    reference to this object, and with this process however that ends.
    """

    def __init__(
        self,
        folder: Path | Bundle,
        variant: str,
        *,
        threads: int = 1,
        steps: int | None = None,
        runtime: str = ONNXRUNTIME,
        python: str = sys.executable,
        memory_limit: int = 0,
        chunking: Method = Method.SYNCHRONOUS,
    ) -> None:
        """Read the bundle's description; nothing is started yet.

        Args:
            folder: the bundle's folder, or the bundle itself where it was read before.
            variant: name of a variant of it.
            threads: threads of the engine.
            steps: denoising steps used when none are given to :meth:`predict`; default: the bundle's.
            runtime: what executes the variant, one of ``dcqfa_ros.runtime.engines.RUNTIMES``.
            python: interpreter of the worker.
            memory_limit: bytes of memory that the worker may take, 0 for any; see ``worker_main.limit_memory``.
            chunking: what to be warm for when it is ready; other methods can be asked for as well.

        Raises:
            BundleError: the bundle cannot be read or has no such variant.
            PolicyError: it has observations that the policy runtime cannot carry.
            EngineError: there is no such runtime.
        """
        self.runtime = runtime_facts(runtime).name
        read = folder if isinstance(folder, Bundle) else load_bundle(Path(folder), verify=False)
        self.bundle = Bundle(read.spec, read.folder.resolve())
        self.bundle.file(variant, "denoiser")  # refuses an unknown variant before a process is started
        self.spec = self.bundle.spec
        self.variant = variant
        self.threads = threads
        self.steps = self.spec.diffusion.steps if steps is None else steps
        self._python, self._memory_limit, self.chunking = python, memory_limit, chunking
        self._layout = ObservationLayout(self.spec)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._memory: ChunkMemory | None = None
        self._info: WorkerInfo | None = None
        self._finalizer: weakref.finalize[Any, EngineWorker] | None = None
        self._death: WorkerDiedError | None = None
        self._aborted = False

    @property
    def info(self) -> WorkerInfo:
        """Facts about the started worker.

        Raises:
            PolicyError: it was not started.
        """
        if self._info is None:
            raise PolicyError(f"engine worker {self.variant}: not started")
        return self._info

    @property
    def alive(self) -> bool:
        """Tell whether the worker runs; cheap enough for a 1 Hz check that notices a death between two chunks."""
        process = self._process
        return self._info is not None and process is not None and process.poll() is None

    def warm_for(self, method: Method) -> bool:
        """Tell whether chunks of ``method`` need nothing that is not loaded yet; of GUIDED, the derivative."""
        return method is not Method.GUIDED or self.chunking is method

    def how_it_ended(self) -> str | None:
        """Say how the worker's process ended; None while it runs or before it was started."""
        code = None if self._process is None else self._process.poll()
        return None if code is None else describe_exit(code)

    def rss_bytes(self) -> int:
        """Return the worker's resident memory now, bytes; 0 where it does not run."""
        return resident_bytes(self._process.pid) if self._process is not None and self.alive else 0

    def start(self, timeout: float = 60.0) -> WorkerInfo:
        """Start the process, load and warm the engine, and wait until it can answer.

        Args:
            timeout: seconds.

        Raises:
            PolicyError: the worker reports why it cannot serve (damaged file, missing runtime, unsupported graph, ...),
                or was started before.
            WorkerDiedError: it ended or did not get ready in time.
        """
        with self._lock:
            if self._process is not None or self._death is not None:
                raise PolicyError(f"engine worker {self.variant}: was started before; make a new one")
            begin = time.monotonic()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._memory, self._control = ChunkMemory(self.spec), ours
                descriptors = (theirs.fileno(), self._memory.fd)
                try:
                    self._process = subprocess.Popen(
                        [self._python, "-m", "dcqfa_ros.runtime.worker_main", *map(str, descriptors), str(os.getpid())],
                        pass_fds=descriptors,
                        stdin=subprocess.DEVNULL,
                        cwd=self.bundle.folder,  # holds no module that could be imported by mistake
                        env=with_huge_heap(worker_environment(os.environ)),
                        start_new_session=True,  # a terminal's Ctrl-C does not reach it, not even while it starts
                    )
                except OSError as error:
                    self._release()
                    raise PolicyError(f"engine worker {self.variant}: cannot start {self._python}: {error}") from error
            self._finalizer = weakref.finalize(self, _end, self._process, ours)
            if self._aborted:  # abort() came before there was a process to kill
                self._process.kill()
            request = {
                "folder": str(self.bundle.folder),
                "variant": self.variant,
                "runtime": self.runtime,
                "threads": self.threads,
                "steps": self.steps,
                "weights": self.spec.variant(self.variant).weights,
                "memory_limit": self._memory_limit,
                "chunking": self.chunking.value,
            }
            try:
                ready = self._ask(request, timeout)["ready"]
            except PolicyError:
                self._stop()
                raise
            start_ms = 1e3 * (time.monotonic() - begin)
            self._info = WorkerInfo(self._process.pid, variant=self.variant, start_ms=start_ms, **ready)
            return self._info

    def predict(
        self,
        observation: Observation,
        seed: int,
        chunk: int,
        steps: int | None = None,
        tokens: int | None = None,
        continuation: Continuation | None = None,
        timeout: float = 5.0,
        actions: int | None = None,
    ) -> Float32:
        """Predict the actions of one chunk; the worker runs :meth:`PolicyRuntime.predict`.

        Args:
            observation: key -> (1, history, *shape), float32, raw units; oldest time step first.
            seed: noise seed of the episode.
            chunk: number of the chunk within it.
            steps: denoising steps; default: the worker's.
            tokens: action tokens computed; default: those the actions need.
            continuation: what the chunk continues; None where it continues nothing.
            timeout: seconds; a worker that takes longer is killed, since it would answer the wrong request later.
            actions: actions returned, 1 to ``horizon - first_executed``; default: the bundle's ``executed``.

        Returns:
            Actions (actions, action_dim), float32, raw units.

        Raises:
            PolicyError: as :meth:`PolicyRuntime.predict`; the worker stays usable.
            WorkerDiedError: the worker ended or was killed for not answering.
        """
        batch = self._layout.check(observation)
        if batch != 1:
            raise PolicyError(f"engine worker {self.variant}: expected a batch of 1, got {batch}")
        with self._lock:
            memory = self._memory
            if self._death is not None:
                raise self._death
            if self._info is None or memory is None:
                raise PolicyError(f"engine worker {self.variant}: not started, or closed")
            request = {
                "seed": int(seed),
                "chunk": int(chunk),
                "steps": self.steps if steps is None else steps,
                "tokens": tokens,
                "actions": self.spec.action.executed if actions is None else actions,
                "continuation": None if continuation is None else memory.put_continuation(continuation),
            }
            memory.put(observation)
            self._ask(request, timeout)
            return memory.actions[0, : request["actions"]].copy()

    def abort(self) -> None:
        """Kill the worker now, from any thread: a ``start`` or ``predict`` under way then raises ``WorkerDiedError``.

        ``close`` is still needed to release everything.
        """
        self._aborted = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the worker and release everything. Closing twice is allowed."""
        with self._lock:
            self._stop()
            self._info = None

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a request and return the answer; the lock is held."""
        control = self._control
        assert control is not None
        try:
            control.send(json.dumps(request).encode())
            poller = select.poll()
            poller.register(control, select.POLLIN)
            if not poller.poll(1e3 * timeout):
                raise self._died(f"did not answer within {timeout:g} s and was killed", kill=True)
            message = control.recv(MAX_MESSAGE)
        except (BrokenPipeError, ConnectionResetError):
            message = b""
        if not message:
            raise self._died("ended", kill=False)
        answer: dict[str, Any] = json.loads(message)
        if "error" in answer:
            raise PolicyError(answer["error"])
        return answer

    def _died(self, what: str, *, kill: bool) -> WorkerDiedError:
        """Reap the worker and describe its end."""
        process = self._process
        assert process is not None
        if kill:
            process.kill()
        try:
            code = process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # closed its socket, yet lives
            process.kill()
            code = process.wait()
        reason = what if kill else describe_exit(code)
        self._death = WorkerDiedError(f"engine worker {self.variant} (pid {process.pid}) {reason}", code)
        self._stop()
        return self._death

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None
        self._release()

    def _release(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def describe_exit(code: int) -> str:
    """Say how a process ended, given ``subprocess``'s return code."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = "; by hand, or by the kernel for lack of memory (see dmesg)" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}){hint}"


def _end(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """End a worker and reap it: closing the socket tells it to go; one that does not is killed."""
    with contextlib.suppress(OSError):  # the other side is gone
        control.shutdown(socket.SHUT_RDWR)
    control.close()
    try:
        process.wait(_CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
