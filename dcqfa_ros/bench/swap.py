"""Measure the exchange of variants: a control tick goes on while one variant after the other takes over.

One process holds the control tick, the policy's session and the host of its variants, so the tick shares its
interpreter with everything an exchange does: that is harder than on a robot, where the tick has a process of its own.
Engines run in worker processes. Every tick consumes one action and gives one observation, so chunks are computed for
most of the time.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bench.conditions import Conditions, watch_conditions
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.chunk_buffer import ChunkBuffer
from dcqfa_ros.runtime.engines import ONNXRUNTIME, runtime_facts
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.parity import fixed_observation
from dcqfa_ros.runtime.policy_session import Episode, PolicySession, SessionHooks
from dcqfa_ros.runtime.realtime import SWITCH_INTERVAL_S, RealtimeSettings, apply, cover
from dcqfa_ros.runtime.swaps import HostOptions, SwapResult
from dcqfa_ros.runtime.synchronizer import ObservationSynchronizer
from dcqfa_ros.runtime.ticker import Ticker
from dcqfa_ros.runtime.variant_host import VariantHost
from dcqfa_ros.runtime.worker import worker_environment
from dcqfa_ros.runtime.worker_main import resident_bytes

_TIMEOUT_S = 120.0  # of one exchange, and of the first chunk after it
_OBSERVATIONS = 64
_SAMPLES = 5  # of the memory, at either end
GROWTH_LIMIT = 2.0  # percent


@dataclass(frozen=True, slots=True)
class SwapBench:
    """Result of one run.

    Attributes:
        swaps: exchanges asked for; each was followed by a chunk of the new variant before the next one.
        failures: of them, those after which the variant asked for did not run.
        reasons: why, the first few.
        missed_ticks: control ticks that began over a full period late.
        ticks: in the measured span.
        starved_ticks: ticks without an action: the next chunk is computed when the last one is used up.
        chunks: computed in the measured span.
        jitter_p50_ms, jitter_p99_ms, jitter_max_ms: how late control ticks began.
        swap_ms_p50, swap_ms_p99, swap_ms_max: from the request until the new variant computes the next chunk.
        gap_ms_p99, gap_ms_max: time of an exchange for which no chunk could be begun.
        rss_before_mb, rss_after_mb: resident memory of this process and the worker together while the first variant
            runs; medians of the first and last five such moments (fewer in a short run), the first round left out.
        rss_growth: percent.
        workers_left, fds_left, memory_files_left: child processes, file descriptors and shared memory of this process
            after closing, beyond those before.
        variants, runtime, runtime_version, python: what was exchanged, and the interpreter of the workers.
        threads: of an engine.
        rate_hz, seconds, seed: what was measured.
        tick_scheduler: of the control tick's thread.
        conditions: what else went on.
        goals_met: no tick missed, no failure, memory within 2 %, nothing left.
    """

    swaps: int
    failures: int
    reasons: tuple[str, ...]
    missed_ticks: int
    ticks: int
    starved_ticks: int
    chunks: int
    jitter_p50_ms: float
    jitter_p99_ms: float
    jitter_max_ms: float
    swap_ms_p50: float
    swap_ms_p99: float
    swap_ms_max: float
    gap_ms_p99: float
    gap_ms_max: float
    rss_before_mb: float
    rss_after_mb: float
    rss_growth: float
    workers_left: int
    fds_left: int
    memory_files_left: int
    variants: tuple[str, ...]
    runtime: str
    runtime_version: str
    python: str
    threads: int
    rate_hz: float
    seconds: float
    seed: int
    tick_scheduler: str
    conditions: Conditions
    goals_met: bool


def run_swap_bench(
    bundle: Bundle,
    swaps: int = 1000,
    rate_hz: float = 100.0,
    variants: Sequence[str] = (),
    runtime: str = ONNXRUNTIME,
    threads: int = 1,
    python: str = "",
    seed: int = 0,
    realtime_priority: int = 0,
    progress: bool = False,
) -> SwapBench:
    """Exchange variants ``swaps`` times, in an order drawn with ``seed``, while the control tick goes on.

    Args:
        bundle: the policy.
        swaps: number of exchanges measured.
        rate_hz: of the control tick.
        variants: those to exchange, at least two; all of the bundle's where none are named.
        runtime: what executes them.
        threads: of an engine.
        python: interpreter of the workers; this one's where empty.
        seed: of the order and of the policy's noise.
        realtime_priority: SCHED_FIFO priority of the control tick's thread, one below of the other threads; 0: none.
        progress: tell how far it is, on stderr.

    Raises:
        BenchError: a value is out of range, the first variant cannot be loaded at all, or the system refuses the
            priority.
    """
    names = tuple(variants) or tuple(v.name for v in bundle.spec.variants)
    for name, value, low, high in (
        ("swaps", swaps, 1, 10**6),
        ("rate", rate_hz, 1.0, 1000.0),
        ("seed", seed, 0, 2**31),
        ("realtime priority", realtime_priority, 0, 99),
    ):
        if not low <= value <= high:
            raise BenchError(f"{name}: expected {low:g} to {high:g}, got {value:g}")
    if len(set(names)) < 2:
        raise BenchError(f"variants: expected at least two different ones, got {', '.join(names)}")
    version = _version(python or sys.executable, runtime)
    before = _Left.now()
    with _running(bundle, rate_hz, threads, python, seed, realtime_priority) as cell:
        for name in (*names, names[0]):  # once round before anything is measured
            result = cell.exchange(name, runtime)
            if not result.ok:
                raise BenchError(f"variant {name!r} cannot be loaded on {runtime}: {result.reason}")
        gc.collect()
        gc.freeze()  # as nodes do when they are activated
        memory, results = [cell.memory()], []
        cell.ticker.count_anew()
        ticks, chunks, starved = cell.ticker.ticks, cell.chunks, cell.starved
        conditions, begin = watch_conditions(), time.monotonic()
        order = Random(seed)
        name = names[0]
        for number in range(swaps):
            name = order.choice([other for other in names if other != name])
            results.append(cell.exchange(name, runtime))
            if name == names[0]:
                memory.append(cell.memory())
            if progress and (number + 1) % 10 == 0:
                print(
                    f"\r{number + 1} of {swaps} exchanges, {cell.ticker.missed} ticks missed", end="", file=sys.stderr
                )
        seconds, seen = time.monotonic() - begin, conditions()
        jitter = [cell.ticker.jitter.percentile_ns(share) / 1e6 for share in (50, 99, 100)]
        missed, ticks, scheduler = cell.ticker.missed, cell.ticker.ticks - ticks, cell.ticker.report()["scheduler"]
        chunks, starved = cell.chunks - chunks, cell.starved - starved
        if name != names[0]:
            cell.exchange(names[0], runtime)
            memory.append(cell.memory())
    left = _Left.now()
    failed = [r for r in results if not r.ok]
    count = max(1, min(_SAMPLES, len(memory) // 2))
    first, last = statistics.median(memory[:count]), statistics.median(memory[-count:])
    growth = 100.0 * (last - first) / first
    workers, descriptors, files = (a - b for a, b in zip(left, before, strict=True))
    loads, gaps = [r.load_ms for r in results], [r.gap_ms for r in results]
    return SwapBench(
        swaps=swaps,
        failures=len(failed),
        reasons=tuple(dict.fromkeys(r.reason for r in failed))[:5],
        missed_ticks=missed,
        ticks=ticks,
        starved_ticks=starved,
        chunks=chunks,
        jitter_p50_ms=round(jitter[0], 3),
        jitter_p99_ms=round(jitter[1], 3),
        jitter_max_ms=round(jitter[2], 3),
        swap_ms_p50=_percentile(loads, 50, 1),
        swap_ms_p99=_percentile(loads, 99, 1),
        swap_ms_max=_percentile(loads, 100, 1),
        gap_ms_p99=_percentile(gaps, 99, 3),
        gap_ms_max=_percentile(gaps, 100, 3),
        rss_before_mb=round(first / 2**20, 1),
        rss_after_mb=round(last / 2**20, 1),
        rss_growth=round(growth, 2),
        workers_left=workers,
        fds_left=descriptors,
        memory_files_left=files,
        variants=names,
        runtime=runtime,
        runtime_version=version,
        python=python or sys.executable,
        threads=threads,
        rate_hz=rate_hz,
        seconds=round(seconds, 1),
        seed=seed,
        tick_scheduler=scheduler,
        conditions=seen,
        goals_met=not (missed or failed or workers or files) and descriptors <= 0 and growth <= GROWTH_LIMIT,
    )


def _percentile(values: Sequence[float], share: float, digits: int) -> float:
    return round(float(np.percentile(values, share)), digits)


def _version(python: str, runtime: str) -> str:
    """Return the version of a runtime's package as the workers' interpreter has it."""
    names = runtime_facts(runtime).distributions
    code = (
        "import sys\nfrom importlib import metadata\nfor name in sys.argv[1:]:\n"
        " try: print(metadata.version(name)); break\n except metadata.PackageNotFoundError: pass"
    )
    try:
        done = subprocess.run(
            [python, "-c", code, *names], capture_output=True, text=True, timeout=60, env=worker_environment(os.environ)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"--python {python}: cannot be run: {error}") from error
    version = done.stdout.strip()
    if not version:
        raise BenchError(f"--python {python}: {names[0]} is not installed there: {runtime_facts(runtime).install}")
    return version


@contextlib.contextmanager
def _running(bundle: Bundle, rate_hz: float, threads: int, python: str, seed: int, priority: int) -> Iterator[_Cell]:
    cell = _Cell(bundle, rate_hz, threads, python, seed, priority)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as nodes do
    try:
        cell.start()
        yield cell
    finally:
        cell.close()
        sys.setswitchinterval(interval)


class _Left(tuple[int, int, int]):
    """Child processes, file descriptors and shared memory of this process."""

    @classmethod
    def now(cls) -> _Left:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        return cls((len(_children()), len(list(Path("/proc/self/fd").iterdir())), maps.count("memfd:dcqfa_chunk")))


def _children() -> list[int]:
    """Process ids of this process' children, zombies among them."""
    found = []
    for file in Path("/proc/self/task").glob("*/children"):
        try:
            found += [int(pid) for pid in file.read_text(encoding="ascii").split()]
        except OSError:  # the thread has ended meanwhile
            continue
    return found


class _Cell:
    """A control tick that consumes a policy's chunks, one action per tick."""

    def __init__(self, bundle: Bundle, rate_hz: float, threads: int, python: str, seed: int, priority: int = 0) -> None:
        self.ticker = Ticker(round(1e9 / rate_hz))
        self._realtime = RealtimeSettings(priority)
        self.chunks = self.starved = 0
        self._seed = seed
        self._spec: BundleSpec = bundle.spec
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
        self._session = PolicySession(bundle.spec, self.host, self._observations, self.ticker.period_ns, hooks)
        self._buffer = ChunkBuffer(bundle.spec.action.dim)
        self._buffer_lock = threading.Lock()
        self._consumed: dict[int, int] = {}  # by stamp of the observation
        self._halt = threading.Event()
        self._threads = [
            threading.Thread(target=self._tick, name="control", daemon=True),
            threading.Thread(target=self._session.run, args=(self._halt,), name="inference", daemon=True),
        ]

    def start(self) -> None:
        self._session.begin(Episode(1, 0, self._seed))
        self.ticker.restart()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._halt.set()
        self._observations.end()
        self.host.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_TIMEOUT_S)

    def exchange(self, variant: str, runtime: str) -> SwapResult:
        """Ask for a variant, wait for the outcome, and for a chunk that it computed."""
        try:
            number = self.host.request(variant, runtime)
            cover(self._realtime.priority)  # the thread that loads it, too
        except UserError as error:
            raise BenchError(str(error)) from error
        result = self._await(lambda: self._results.pop(number, None), f"the outcome of exchange {number}")
        if result.ok:
            count = self.chunks
            done = self.host.computed_by
            self._await(lambda: self.chunks > count and done.last == result.engine, f"a chunk of {variant!r}")
        return result

    def _await(self, condition: Any, what: str) -> Any:
        with self._changed:
            value = self._changed.wait_for(lambda: condition() or self._problem, _TIMEOUT_S)
        if self._problem or not value:
            raise BenchError(self._problem or f"{what} did not come within {_TIMEOUT_S:.0f} s")
        return value

    def memory(self) -> int:
        """Resident memory of this process and its children, bytes."""
        return sum(resident_bytes(pid) for pid in (os.getpid(), *_children()))

    def _note(self, result: SwapResult) -> None:
        with self._changed:
            self._results[result.swap_id] = result
            self._changed.notify_all()

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._problem = self._problem or reason
            self._changed.notify_all()

    def _take(self, stamp_ns: int, actions: NDArray[np.float32], _: float) -> None:
        with self._buffer_lock, contextlib.suppress(PolicyError, KeyError):  # too late
            self._buffer.push(self._consumed[stamp_ns], actions)
        with self._changed:
            self.chunks += 1
            self._changed.notify_all()

    def _tick(self) -> None:
        refusals = apply(self._realtime)
        if refusals:
            self._fail(refusals[0])
            return
        cover(self._realtime.priority)
        step, period = 0, self.ticker.period_ns
        while True:
            self.ticker.wait(self._halt)
            if self._halt.is_set():
                return
            stamp = step * period
            with self._buffer_lock:
                self.starved += self._buffer.next() is None
                self._consumed[stamp] = self._buffer.consumed
                self._consumed.pop(stamp - 1000 * period, None)
            now = time.monotonic_ns()
            for key, value in self._samples[step % _OBSERVATIONS].items():
                self._observations.add(key, stamp, value, now)
            step += 1
            self.ticker.done()
