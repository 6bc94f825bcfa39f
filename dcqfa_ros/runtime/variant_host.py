"""The running variant of a policy, and the exchange for another one at a chunk boundary.

Each variant runs in its own worker process. A new variant is started, loaded, warmed and compared with a known one
(:mod:`dcqfa_ros.runtime.parity`) in the background while the old one goes on; the next ``predict`` after that uses it.
A failed exchange leaves the old variant as it was. Where both do not fit in memory together, the exchange is refused,
or the old variant goes first (``HostOptions.shortage``) and comes back if the new one cannot be loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.chunking import Method
from dcqfa_ros.runtime.engines import ONNXRUNTIME
from dcqfa_ros.runtime.errors import NoVariantError, PolicyError, WorkerDiedError
from dcqfa_ros.runtime.parity import Parity
from dcqfa_ros.runtime.swaps import ComputedBy, HostOptions, Outcome, Shortage, SwapResult
from dcqfa_ros.runtime.variant_loading import MIB, Loaded, VariantLoader
from dcqfa_ros.runtime.variant_targets import Target, Targets
from dcqfa_ros.runtime.worker import EngineWorker

CLOSE_TIMEOUT_S = 5.0
_SHUTTING_DOWN = "the policy is shutting down"


class _Job(NamedTuple):
    swap_id: int
    target: Target


class VariantHost:
    """Owns the worker of the active variant and replaces it on request."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int,
        on_swap: Callable[[SwapResult], None],
        on_active: Callable[[str], None] = lambda _: None,
        on_hold: Callable[[str], None] = lambda _: None,
        options: Callable[[], HostOptions] = HostOptions,
    ) -> None:
        """Hold no worker yet.

        Args:
            bundle: the policy, whose contract any other bundle must share.
            threads: threads of the engines.
            on_swap: told the outcome of every exchange, from a background thread.
            on_active: told the name of the variant that computes the next chunk ("" for none) before any chunk of it is
                begun; called from a background thread or from that of ``predict``, must be quick.
            on_hold: told why nothing is computed while an exchange goes on, from a background thread.
            options: how variants are loaded; asked for at every exchange.
        """
        self.targets = Targets(bundle)
        self.computed_by = ComputedBy()
        self.swaps = 0
        self._on_swap, self._on_active, self._on_hold, self._options = on_swap, on_active, on_hold, options
        self._lock = threading.Lock()  # guards the fields below, never held while a worker computes
        self._turn = threading.Lock()  # who comes first to the next one: an exchange waits for one chunk at most
        self._use = threading.Lock()  # held while a worker computes or is exchanged
        self._worker: EngineWorker | None = None
        self._target: Target | None = None  # what runs, or what last ran while an exchange holds
        self._active = self._engine = ""
        self._closed = False
        self._thread: threading.Thread | None = None
        self._queued: _Job | None = None
        self._doing: _Job | None = None
        self._superseded: deque[_Job] = deque()
        self._warm = Method.SYNCHRONOUS  # what the last worker that ran was loaded for
        self._loader = VariantLoader(threads)
        self._held_ns: int | None = None  # since when (monotonic) nothing runs because a variant had to go for another

    @property
    def active(self) -> str:
        """Variant that computes the next chunk (``BUNDLE:VARIANT`` for another bundle's), or "" while there is none."""
        return self._active

    @property
    def engine(self) -> str:
        """``<runtime>/<variant>`` as the opened engine names itself, or "" while there is none."""
        return self._engine

    @property
    def target(self) -> Target | None:
        """What computes the next chunk, or None while nothing does."""
        return self._target if self._active else None

    @property
    def closed(self) -> bool:
        """Whether no request is taken: after :meth:`abort` until :meth:`reopen`, and after :meth:`close`."""
        return self._closed

    @property
    def busy(self) -> bool:
        """Whether an exchange is under way."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    @property
    def changing(self) -> bool:
        """Whether an exchange for another variant is under way, not for the same one to be warm for another method."""
        with self._lock:
            jobs, running = (self._doing, self._queued), self.target
        return any(job is not None and (running is None or not _same(running, job.target)) for job in jobs)

    def warm_for(self, method: Method) -> bool:
        """Whether the active variant's worker has loaded what chunks of ``method`` need; without one there is none."""
        worker = self._worker
        return worker is not None and worker.warm_for(method)

    # what is asked for

    def validate(self, variant: str, runtime: str = ONNXRUNTIME) -> str | None:
        """Cheap check of requested names; returns why they are refused, or None."""
        try:
            self.targets.resolve(variant, runtime)
        except UserError as error:
            return str(error)
        return None

    def request(self, variant: str, runtime: str = ONNXRUNTIME) -> int:
        """Begin to exchange the active variant for ``variant`` on ``runtime`` and return the exchange's number.

        A newer request ends an exchange that is not done yet; that one is reported as superseded. The variant that runs
        is loaded anew where it is not warm for ``HostOptions.chunking``.

        Raises:
            PolicyError, BundleError: as :meth:`Targets.resolve`, or the host is closed.
        """
        target = self.targets.resolve(variant, runtime)
        with self._lock:
            if self._closed:
                raise PolicyError(_SHUTTING_DOWN)
            self.swaps += 1
            if self._queued is not None:
                self._superseded.append(self._queued)
            self._queued = _Job(self.swaps, target)
            self._loader.abort()
            if not self.busy:
                self._thread = threading.Thread(target=self._work, name="variant-swap", daemon=True)
                self._thread.start()
            return self.swaps

    # the exchange, on the background thread

    def _work(self) -> None:
        while True:
            with self._lock:
                skipped, self._superseded = list(self._superseded), deque()
                job, self._queued = self._queued, None
                reason = "a newer request"
                if job is not None and self._closed:
                    skipped, job, reason = [*skipped, job], None, _SHUTTING_DOWN
                self._doing = job
                if job is None and not skipped:
                    self._thread = None
                    return
            for old in skipped:
                self._on_swap(self._result(old, self._engine, time.monotonic(), reason, superseded=True))
            if job is not None:
                self._on_swap(self._exchange(job))

    def _exchange(self, job: _Job) -> SwapResult:
        begin, previous = time.monotonic(), self._engine
        running = self._target if self._active else None
        limit = 0
        try:
            options = self._options()
            worker, limit = self._worker, options.memory_limit
            # One that died unnoticed is replaced, and so is one that is not warm for how chunks follow each other now.
            ready = worker is not None and worker.alive and worker.warm_for(options.chunking)
            if ready and running is not None and _same(running, job.target):
                return self._result(job, previous, begin)
            shortage = self._loader.shortage(job.target, options)
            if shortage and self._worker is not None:
                if options.shortage is Shortage.REFUSE:
                    raise PolicyError(f"{shortage}; parameter swap_when_memory_is_short is {options.shortage.value}")
                self._hold(f"{shortage}: {previous} is closed before {job.target.engine} is loaded")
            loaded = self._loader.load(job.target, options, self._unwanted)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises while loading is a refused exchange
            return self._failed(job, previous, begin, str(error) or type(error).__name__, limit)
        held = self._held_ns is not None
        gap_ms, reason = self._switch(loaded)
        return self._result(
            job, previous, begin, reason, superseded=bool(reason), gap_ms=gap_ms, held=held, parity=loaded.parity,
            peak=self._loader.peak(job.target),
        )  # fmt: skip

    def _failed(self, job: _Job, previous: str, begin: float, reason: str, memory_limit: int) -> SwapResult:
        """Bring back what had to go, unless a newer request (which would, too) or the end is waiting."""
        if memory_limit:
            reason += f" (engine_memory_limit_mb is {memory_limit // MIB})"
        held_ns, gap_ms = self._held_ns, 0.0
        with self._lock:
            needless = _SHUTTING_DOWN if self._closed else "a newer request" if self._queued is not None else ""
        if needless:
            reason = f"{needless} ({reason})"
        elif held_ns is not None:
            reason += self._bring_back()
            gap_ms = (time.monotonic_ns() - held_ns) / 1e6
        held = held_ns is not None
        return self._result(job, previous, begin, reason, superseded=bool(needless), gap_ms=gap_ms, held=held)

    def _unwanted(self) -> bool:
        with self._lock:
            return self._closed or self._queued is not None

    @contextlib.contextmanager
    def _boundary(self) -> Iterator[None]:
        """Between two chunks: no prediction is under way, and none begins."""
        with self._turn, self._use:
            yield

    def _hold(self, reason: str) -> None:
        """Let the running variant go: from here on nothing is computed."""
        with self._boundary():
            self._held_ns, old = time.monotonic_ns(), self._worker
            self._forget()
        try:
            self._on_hold(reason)
        finally:
            if old is not None:
                old.close()

    def _bring_back(self) -> str:
        """Load the variant again that had to go; returns what to add to the reason."""
        target = self._target
        if target is None:
            return ""
        try:
            options = dataclasses.replace(self._options(), chunking=self._warm)  # another method may be what failed
            _, problem = self._switch(self._loader.load(target, options, self._unwanted))
        except Exception as error:  # noqa: BLE001 - as above
            problem = "a newer request" if self._unwanted() else str(error) or type(error).__name__
        return f"; {target.engine} could not be brought back: {problem}" if problem else f"; {target.engine} is back"

    def _switch(self, loaded: Loaded) -> tuple[float, str]:
        """Put a worker in the place of the running one; returns the gap in milliseconds, and why it was not done."""
        old: EngineWorker | None = loaded.worker
        reason = _SHUTTING_DOWN
        try:
            with self._boundary():
                begin = time.monotonic_ns() if self._held_ns is None else self._held_ns
                with self._lock:
                    if not self._closed:
                        old, self._worker, reason = self._worker, loaded.worker, ""
                        self._target, self._active, self._engine = loaded.target, loaded.target.label, loaded.engine
                        self._warm = loaded.worker.chunking
                        self._held_ns = None
                if not reason:
                    loaded.accept()
                    self._on_active(self._active)
                gap_ms = (time.monotonic_ns() - begin) / 1e6
        finally:
            if old is not None:
                old.close()
        return gap_ms, reason

    def _result(
        self,
        job: _Job,
        previous: str,
        begin: float,
        reason: str = "",
        *,
        superseded: bool = False,
        gap_ms: float = 0.0,
        held: bool = False,
        parity: Parity | None = None,
        peak: int = 0,
    ) -> SwapResult:
        return SwapResult(
            job.swap_id,
            job.target.label,
            self._active,
            not reason,
            reason,
            (time.monotonic() - begin) * 1e3,
            job.target.runtime,
            self._engine,
            previous,
            Outcome.SUPERSEDED if superseded else Outcome.FAILED if reason else Outcome.SWITCHED,
            gap_ms,
            held,
            parity=parity or Parity(),
            peak_bytes=peak,
        )

    # computing

    def _forget(self) -> None:
        """Have no worker; the boundary is held."""
        told = bool(self._active)
        self._worker, self._active, self._engine = None, "", ""
        if told:
            self._on_active("")

    def lost(self) -> str | None:
        """Look whether the active worker still runs; where it died on its own, forget it and return what happened."""
        if not self._use.acquire(blocking=False):
            return None  # a prediction is under way and will notice by itself
        try:
            worker, variant = self._worker, self._active
            if worker is None or worker.alive:
                return None
            ended = worker.how_it_ended() or "ended"
            self._forget()
            worker.close()
            return f"engine worker {variant!r} {ended}"
        finally:
            self._use.release()

    def predict(
        self, observation: Mapping[str, NDArray], seed: int, chunk: int, steps: int | None, **more: Any
    ) -> tuple[NDArray[np.float32], str]:
        """One chunk (n, Da), raw units, and the variant that computed it; ``more`` goes to ``EngineWorker.predict``.

        Raises:
            NoVariantError: none is loaded, for the time being or for good.
            PolicyError: the input is refused, or the worker died (``WorkerDiedError``).
        """
        with self._turn:  # given back at once: an exchange that waits for this chunk comes before the next one
            self._use.acquire()
        try:
            worker, variant, engine = self._worker, self._active, self._engine
            if worker is None:
                raise NoVariantError("no variant is loaded yet")
            try:
                actions = worker.predict(observation, seed=seed, chunk=chunk, steps=steps, **more)
            except WorkerDiedError:
                self._forget()
                worker.close()
                raise
            self.computed_by.note(chunk, engine)
            return actions, variant
        finally:
            self._use.release()

    # ending

    def abort(self) -> None:
        """Kill the workers, so that whoever waits for one goes on; no request is taken until :meth:`reopen`."""
        with self._lock:
            self._closed = True
            worker = self._worker
        self._loader.abort()
        if worker is not None:
            worker.abort()

    def reopen(self) -> None:
        """Take requests again after :meth:`abort`, once the exchange that it ended is over.

        Raises:
            PolicyError: that exchange is still under way.
        """
        if not self._closed:
            return
        self._join()
        if self.busy:
            raise PolicyError("the exchange of variants that was ended is still under way; try again")
        self._drop()
        with self._lock:
            self._closed, self._queued = False, None

    def close(self) -> None:
        """End the workers at once, also one that still loads. May be called twice."""
        self.abort()
        self._join()
        self._drop()

    def _drop(self) -> None:
        with self._boundary():
            worker, self._held_ns = self._worker, None
            self._forget()
        if worker is not None:
            worker.close()

    def _join(self) -> None:
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_TIMEOUT_S)


def _same(one: Target, other: Target) -> bool:
    """Whether two names mean the same weights on the same runtime."""
    return (one.engine, one.weights) == (other.engine, other.weights)
