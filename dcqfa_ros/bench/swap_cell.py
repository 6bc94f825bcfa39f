"""A policy's process as ``dcqfa bench swap`` needs it: session, host of the variants, and an arm's tick elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bench.processes import BenchError, children
from dcqfa_ros.bench.swap_tick import TickProcess
from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.parity import fixed_observation
from dcqfa_ros.runtime.policy_session import Episode, PolicySession, SessionHooks
from dcqfa_ros.runtime.realtime import SWITCH_INTERVAL_S, RealtimeSettings
from dcqfa_ros.runtime.swaps import HostOptions, SwapResult
from dcqfa_ros.runtime.synchronizer import Frame, ObservationSynchronizer
from dcqfa_ros.runtime.variant_host import VariantHost
from dcqfa_ros.runtime.worker_main import resident_bytes

_TIMEOUT_S = 120.0  # of one exchange, and of the first chunk after it
_OBSERVATIONS = 64
_STAMPS_KEPT = 1000
_NO_SETTINGS = RealtimeSettings()


@contextlib.contextmanager
def running_cell(
    bundle: Bundle,
    rate_hz: float,
    threads: int,
    python: str = "",
    seed: int = 0,
    realtime: RealtimeSettings = _NO_SETTINGS,
) -> Iterator[Cell]:
    """Start a cell and close it again, whatever happens meanwhile.

    Arguments as ``run_swap_bench``; ``realtime`` is what the control tick asks for.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as nodes do
    cell = Cell(bundle, rate_hz, threads, python, seed, realtime)
    try:
        cell.start()
        yield cell
    finally:
        cell.close()
        sys.setswitchinterval(interval)


class Left(tuple[int, int, int]):
    """Numbers of child processes, file descriptors and shared memories of this process."""

    @classmethod
    def now(cls) -> Left:
        """Count them."""
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        return cls((len(children()), len(list(Path("/proc/self/fd").iterdir())), maps.count("memfd:dcqfa_chunk")))


class Cell:
    """A policy whose variants are exchanged, and an arm in another process that consumes its chunks.

    Attributes:
        host: of the variants.
        tick: the arm's process.
        chunks: computed so far.
    """

    def __init__(
        self, bundle: Bundle, rate_hz: float, threads: int, python: str, seed: int, realtime: RealtimeSettings
    ) -> None:
        """Start nothing yet; arguments as ``running_cell``."""
        self.chunks = 0
        self._seed = seed
        self._samples = [
            {key: value[0, -1] for key, value in fixed_observation(bundle.spec, number).items()}
            for number in range(_OBSERVATIONS)
        ]
        self._results: dict[int, SwapResult] = {}
        self._problem = ""
        self._changed = threading.Condition()
        options = HostOptions(python=python)
        self.host = VariantHost(bundle, threads, self._note, options=lambda: options)
        self._observations = ObservationSynchronizer(bundle.spec.observations)
        hooks = SessionHooks(
            publish=self._take, problem=self._fail, lost=self._fail, steps=lambda: None, ageless=lambda: True
        )
        self._period_ns = round(1e9 / rate_hz)
        self._session = PolicySession(bundle.spec, self.host, self._observations, self._period_ns, hooks)
        dim = bundle.spec.action.dim
        self.tick = TickProcess(dim, self._period_ns, realtime, self._observe, self._fail)
        self._consumed: dict[int, int] = {}  # by stamp of the observation
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._session.run, args=(self._halt,), name="inference", daemon=True)

    def start(self) -> None:
        """Begin to tick and to infer; there is no variant yet.

        Raises:
            BenchError: the control tick's process cannot be started.
        """
        self._session.begin(Episode(1, 0, self._seed))
        self.tick.start()
        self._thread.start()

    def close(self) -> None:
        """End the policy's workers and the control tick's process."""
        self._halt.set()
        self._observations.end()
        try:
            self.host.close()
        finally:
            self.tick.close()
            if self._thread.ident is not None:
                self._thread.join(_TIMEOUT_S)

    def exchange(self, variant: str, runtime: str) -> SwapResult:
        """Ask for a variant, wait for the outcome, and for a chunk that it computed.

        Raises:
            BenchError: there is no such variant or runtime, it did not come in time, or there is no tick any more.
        """
        try:
            number = self.host.request(variant, runtime)
        except UserError as error:
            raise BenchError(str(error)) from error
        result = self._await(lambda: self._results.pop(number, None), f"the outcome of exchange {number}")
        if result.ok:
            count = self.chunks
            done = self.host.computed_by
            self._await(lambda: self.chunks > count and done.last == result.engine, f"a chunk of {variant!r}")
        return result

    def memory(self, *others: int) -> int:
        """Resident memory of this process and its workers, bytes.

        That of the control tick's process, and of children in ``others``, is not in it.
        """
        workers = children() - {self.tick.pid, *others}
        return sum(resident_bytes(pid) for pid in (os.getpid(), *workers))

    def _await(self, condition: Any, what: str) -> Any:
        with self._changed:
            value = self._changed.wait_for(lambda: self._problem or condition(), _TIMEOUT_S)
        if self._problem or not value:
            raise BenchError(self._problem or f"{what} did not come within {_TIMEOUT_S:.0f} s")
        return value

    def _note(self, result: SwapResult) -> None:
        with self._changed:
            self._results[result.swap_id] = result
            self._changed.notify_all()

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._problem = self._problem or reason
            self._changed.notify_all()

    def _take(self, frame: Frame, actions: NDArray[np.float32], _: float) -> None:
        first = self._consumed.get(frame.stamp_ns)
        if first is not None:  # else it is too late by far
            self.tick.push(first, actions)
        with self._changed:
            self.chunks += 1
            self._changed.notify_all()

    def _observe(self, stamp_ns: int, consumed: int) -> None:
        """Take a tick of the arm: what it has consumed, and an observation."""
        self._consumed[stamp_ns] = consumed
        self._consumed.pop(stamp_ns - _STAMPS_KEPT * self._period_ns, None)
        now = time.monotonic_ns()
        try:
            for key, value in self._samples[stamp_ns // self._period_ns % _OBSERVATIONS].items():
                self._observations.add(key, stamp_ns, value, now)
        except UserError as error:
            self._fail(str(error))
