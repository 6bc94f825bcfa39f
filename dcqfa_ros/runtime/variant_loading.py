"""Loading a variant beside the one that runs: does it fit in memory, does it start, does it compute what it should."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

from dcqfa_ros.runtime.engines import runtime_facts
from dcqfa_ros.runtime.parity import Parity, ParityLog
from dcqfa_ros.runtime.swaps import HostOptions
from dcqfa_ros.runtime.variant_targets import Target
from dcqfa_ros.runtime.worker import EngineWorker
from dcqfa_ros.runtime.worker_main import peak_bytes

MIB = 2**20


class Loaded(NamedTuple):
    """A worker that is ready and was compared, and what to tell of it; ``accept`` is called once it runs."""

    worker: EngineWorker
    target: Target
    engine: str
    parity: Parity
    accept: Callable[[], None]


class VariantLoader:
    """Starts, warms and compares workers, one at a time. :meth:`abort` may be called from any thread.

    Attributes:
        starting: the worker that is being loaded, None while there is none.
    """

    def __init__(self, threads: int) -> None:
        """Know nothing; ``threads`` are those of an engine."""
        self.threads = threads
        self.starting: EngineWorker | None = None
        self._lock = threading.Lock()
        self._parity = ParityLog()
        self._peaks: dict[tuple[str, str], int] = {}  # bytes by weights and runtime, as measured here

    def peak(self, target: Target) -> int:
        """Return the largest resident memory that its worker had while it was loaded here, bytes; 0: never loaded."""
        return self._peaks.get((target.weights, target.runtime), 0)

    def shortage(self, target: Target, options: HostOptions) -> str:
        """Say that a worker does not fit beside the one that runs; empty where it does, or where that is unknown."""
        needed = self.peak(target) or options.needed_memory(target)
        free = options.free_memory()
        if not free or needed + options.reserve <= free:
            return ""
        kept = f" and {options.reserve // MIB} MiB are to stay free" if options.reserve else ""
        return f"{target.engine} needs about {needed // MIB} MiB, {free // MIB} MiB are free{kept}"

    def load(self, target: Target, options: HostOptions, unwanted: Callable[[], bool]) -> Loaded:
        """Start a worker, warm it and compare what it computes.

        Args:
            target: what to load.
            options: how.
            unwanted: whether it has become needless; asked once, after which :meth:`abort` ends it.

        Raises:
            PolicyError: why it cannot serve; nothing is left of it.
        """
        worker = EngineWorker(
            target.bundle,
            target.variant,
            threads=self.threads,
            runtime=target.runtime,
            python=options.python or sys.executable,
            memory_limit=options.memory_limit,
            chunking=options.chunking,
        )
        try:
            with self._lock:
                self.starting = worker
            if unwanted():
                worker.abort()
            opened = worker.start(options.start_timeout_s or runtime_facts(target.runtime).start_timeout_s)
            engine = f"{opened.engine.partition('/')[0]}/{target.label}"
            parity, accept = self._parity.check(
                target.bundle,
                target.variant,
                engine,
                lambda seen, seed, chunk: worker.predict(seen, seed=seed, chunk=chunk),
            )
            self._peaks[target.weights, target.runtime] = peak_bytes(opened.pid)
        except BaseException:
            worker.close()
            raise
        finally:
            with self._lock:
                self.starting = None
        return Loaded(worker, target, engine, parity, accept)

    def abort(self) -> None:
        """Kill the worker that is being loaded, if any: :meth:`load` then raises."""
        with self._lock:
            worker = self.starting
        if worker is not None:
            worker.abort()
