"""The running variant of a policy, and the exchange for another one at a chunk boundary.

Each variant runs in its own worker process. A new variant is started, loaded and warmed in the background while the old
one goes on; the next ``predict`` after that uses it. A failed exchange leaves the old variant as it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.runtime.engines import ONNXRUNTIME, runtime_facts
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.policy import PolicyError
from dcqfa_ros.runtime.worker import EngineWorker, WorkerDiedError

CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class SwapResult:
    """Outcome of one exchange.

    Attributes:
        swap_id: number of the exchange, from 1.
        requested: variant that was asked for.
        active: variant that runs afterwards ("" when none does).
        ok: whether the requested one runs.
        reason: why not.
        load_ms: time the exchange took, milliseconds.
        runtime: runtime that was asked for.
        engine: ``<runtime>/<variant>`` that runs afterwards ("" when none does).
    """

    swap_id: int
    requested: str
    active: str
    ok: bool
    reason: str
    load_ms: float
    runtime: str = ONNXRUNTIME
    engine: str = ""


class VariantHost:
    """Owns the worker of the active variant and replaces it on request."""

    def __init__(self, bundle: Bundle, threads: int, on_swap: Callable[[SwapResult], None]) -> None:
        """Hold no worker yet; ``on_swap`` is called from a background thread after each exchange."""
        self.bundle, self.threads, self._on_swap = bundle, threads, on_swap
        self.swaps = 0
        self._lock = threading.Lock()  # guards the fields below, never held while a worker computes
        self._use = threading.Lock()  # held while a worker computes or is exchanged
        self._worker: EngineWorker | None = None
        self._starting: EngineWorker | None = None
        self._active = self._engine = ""
        self._closed = False
        self._thread: threading.Thread | None = None
        self._queued: tuple[str, str] | None = None  # variant and runtime

    @property
    def active(self) -> str:
        """Name of the variant that computes the next chunk, or "" while there is none."""
        return self._active

    @property
    def engine(self) -> str:
        """``<runtime>/<variant>`` as the opened engine names itself, or "" while there is none."""
        return self._engine

    @property
    def busy(self) -> bool:
        """Whether an exchange is under way."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def validate(self, variant: str, runtime: str = ONNXRUNTIME) -> str | None:
        """Cheap check of requested names; returns why they are refused, or None."""
        try:
            self.bundle.spec.variant(variant)
            runtime_facts(runtime)
        except KeyError as error:
            return str(error.args[0])
        except EngineError as error:
            return str(error)
        return None

    def request(self, variant: str, runtime: str = ONNXRUNTIME) -> None:
        """Begin to exchange the active variant for ``variant`` on ``runtime``; a newer request replaces one that waits.

        Raises:
            PolicyError: the bundle has no such variant, there is no such runtime, or the host is closed.
        """
        reason = self.validate(variant, runtime)
        if reason:
            raise PolicyError(reason)
        with self._lock:
            if self._closed:
                raise PolicyError("the policy is shutting down")
            self._queued = variant, runtime
            if not self.busy:
                self._thread = threading.Thread(target=self._work, name="variant-swap", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                queued, self._queued = self._queued, None
                if queued is None or self._closed:
                    self._thread = None
                    return
                self.swaps += 1
                swap_id = self.swaps
            self._on_swap(self._exchange(swap_id, *queued))

    def _exchange(self, swap_id: int, variant: str, runtime: str) -> SwapResult:
        begin = time.monotonic()
        worker: EngineWorker | None = None
        try:
            worker = EngineWorker(self.bundle.folder, variant, threads=self.threads, runtime=runtime)
            with self._lock:
                self._starting = worker
                if self._closed:
                    worker.abort()
            engine = worker.start(runtime_facts(runtime).start_timeout_s).engine
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises while loading is a refused exchange
            if worker is not None:
                worker.close()
            return self._result(swap_id, variant, runtime, str(error), begin)
        finally:
            self._starting = None
        with self._use, self._lock:  # the chunk boundary: no prediction is under way
            old: EngineWorker | None = worker
            reason = "the policy is shutting down"
            if not self._closed:
                old, self._worker, reason = self._worker, worker, ""
                self._active, self._engine = variant, engine
        if old is not None:
            old.close()
        return self._result(swap_id, variant, runtime, reason, begin)

    def _result(self, swap_id: int, variant: str, runtime: str, reason: str, begin: float) -> SwapResult:
        load_ms = (time.monotonic() - begin) * 1e3
        return SwapResult(swap_id, variant, self._active, not reason, reason, load_ms, runtime, self._engine)

    def _forget(self) -> None:
        self._worker, self._active, self._engine = None, "", ""

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
        self, observation: Mapping[str, NDArray], seed: int, chunk: int, steps: int | None
    ) -> tuple[NDArray[np.float32], str]:
        """One chunk (executed, Da), raw units, and the variant that computed it.

        Raises:
            PolicyError: no variant is loaded, the input is refused, or the worker died (``WorkerDiedError``).
        """
        with self._use:
            worker, variant = self._worker, self._active
            if worker is None:
                raise PolicyError("no variant is loaded yet")
            try:
                return worker.predict(observation, seed=seed, chunk=chunk, steps=steps), variant
            except WorkerDiedError:
                self._forget()
                worker.close()
                raise

    def abort(self) -> None:
        """Kill the workers, so that whoever waits for one goes on; the host is closed for further requests."""
        with self._lock:
            self._closed = True
            workers = [worker for worker in (self._starting, self._worker) if worker is not None]
        for worker in workers:
            worker.abort()

    def close(self) -> None:
        """End the workers at once, also one that still loads. May be called twice."""
        self.abort()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_TIMEOUT_S)
        with self._use:
            worker = self._worker
            self._forget()
        if worker is not None:
            worker.close()
