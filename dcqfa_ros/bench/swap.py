"""Measure the exchange of variants: a control tick goes on while one variant after the other takes over.

As on a robot, the control tick has a process of its own (:mod:`dcqfa_ros.bench.swap_tick`); this one holds the policy's
session and the host of its variants, whose engines run in worker processes. Every tick consumes one action and gives
one observation, so chunks are computed for most of the time.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from dcqfa_ros.bench import bare_tick
from dcqfa_ros.bench.conditions import Conditions, watch_conditions
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.bench.swap_cell import Left, running_cell
from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.runtime.engines import ONNXRUNTIME, runtime_facts
from dcqfa_ros.runtime.realtime import RealtimeSettings
from dcqfa_ros.runtime.worker import worker_environment

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
        untold_ticks: ticks whose observation was lost, because this process had not read those before.
        chunks: computed in the measured span.
        jitter_p50_ms, jitter_p99_ms, jitter_max_ms: how late control ticks began.
        swap_ms_p50, swap_ms_p99, swap_ms_max: from the request until the new variant computes the next chunk.
        gap_ms_p99, gap_ms_max: time of an exchange for which no chunk could be begun.
        rss_before_mb, rss_after_mb: resident memory of this process (not the control tick's) and the worker together
            while the first variant runs; medians of the first and last five such moments (fewer in a short run), the
            first round left out.
        rss_growth: percent.
        workers_left, fds_left, memory_files_left: child processes, file descriptors and shared memory of this process
            after closing, beyond those before.
        variants, runtime, runtime_version, python: what was exchanged, and the interpreter of the workers.
        threads: of an engine.
        rate_hz, seconds, seed: what was measured.
        tick_scheduler: of the control tick's thread.
        processor: that it was kept on; None: any.
        reference_missed, reference_max_ms: of processes that only tick, one per processor (one in all beyond eight, and
            one on ``processor``), at a priority above: periods by which they were late, in all, and the greatest
            lateness. None where one was lost.
        missed_alone: what would have been missed had the time not passed in which none of these ran; None where they
            have no real-time priority, where one was lost, or where there were more stalls than are kept.
        missed_while_processor_ran: likewise, had the time not passed in which the one on ``processor`` did not run. It
            stands still, too, where the kernel does for another program, one of this benchmark's perhaps, what it does
            not interrupt. None also where the control tick was kept on none.
        conditions: what else went on; the scheduler is this process'.
        goals_met: no tick missed, no failure, memory within 2 %, nothing left.
    """

    swaps: int
    failures: int
    reasons: tuple[str, ...]
    missed_ticks: int
    ticks: int
    starved_ticks: int
    untold_ticks: int
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
    processor: int | None
    reference_missed: int | None
    reference_max_ms: float | None
    missed_alone: int | None
    missed_while_processor_ran: int | None
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
    processor: int | None = None,
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
        realtime_priority: SCHED_FIFO priority of the control tick's process, 0: none; this one has none.
        processor: that the control tick is kept on; what else runs may run on any.
        progress: tell how far it is, on stderr.

    Raises:
        BenchError: a value is out of range, a variant cannot be loaded at all, the system refuses the priority, or the
            control tick's process ended.
    """
    available = os.sched_getaffinity(0)
    if processor is not None and processor not in available:
        raise BenchError(f"processor: expected one of {', '.join(map(str, sorted(available)))}, got {processor}")
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
    before = Left.now()
    realtime = RealtimeSettings(realtime_priority, () if processor is None else (processor,))
    with running_cell(bundle, rate_hz, threads, python, seed, realtime) as cell:
        for name in (*names, names[0]):  # once round before anything is measured
            result = cell.exchange(name, runtime)
            if not result.ok:
                raise BenchError(f"variant {name!r} cannot be loaded on {runtime}: {result.reason}")
        gc.collect()
        gc.freeze()  # as nodes do when they are activated
        memory, results = [cell.memory()], []
        bare = bare_tick.BareTicks(rate_hz, realtime_priority, processor)
        try:
            cell.tick.count_anew()
            chunks = cell.chunks
            conditions, begin = watch_conditions(), time.monotonic()
            order = Random(seed)
            name = names[0]
            for number in range(swaps):
                name = order.choice([other for other in names if other != name])
                results.append(cell.exchange(name, runtime))
                if name == names[0]:
                    memory.append(cell.memory(*bare.pids))
                if progress and (number + 1) % 10 == 0:
                    told = f"\r{number + 1} of {swaps} exchanges, {cell.tick.missed} ticks missed"
                    print(told, end="", file=sys.stderr)
            tick = cell.tick.report()
            seconds, seen = time.monotonic() - begin, conditions()
            reference = _told(bare)
        finally:
            bare.end()
        chunks = cell.chunks - chunks
        if name != names[0]:
            cell.exchange(names[0], runtime)
            memory.append(cell.memory())
    left = Left.now()
    failed = [r for r in results if not r.ok]
    count = max(1, min(_SAMPLES, len(memory) // 2))
    first, last = statistics.median(memory[:count]), statistics.median(memory[-count:])
    growth = 100.0 * (last - first) / first
    workers, descriptors, files = (a - b for a, b in zip(left, before, strict=True))
    alone = on_processor = None
    if reference is not None:
        period_ns = round(1e9 / rate_hz)
        alone = bare_tick.missed_alone(tick.stalls, reference, period_ns)
        if processor is not None:
            on_processor = bare_tick.missed_alone(tick.stalls, reference, period_ns, processor)
    loads, gaps = [r.load_ms for r in results], [r.gap_ms for r in results]
    return SwapBench(
        swaps=swaps,
        failures=len(failed),
        reasons=tuple(dict.fromkeys(r.reason for r in failed))[:5],
        missed_ticks=tick.missed,
        ticks=tick.ticks,
        starved_ticks=tick.starved,
        untold_ticks=tick.untold,
        chunks=chunks,
        jitter_p50_ms=tick.jitter_p50_ms,
        jitter_p99_ms=tick.jitter_p99_ms,
        jitter_max_ms=tick.jitter_max_ms,
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
        tick_scheduler=tick.scheduler,
        processor=processor,
        reference_missed=None if reference is None else reference.missed,
        reference_max_ms=None if reference is None else reference.max_ms,
        missed_alone=alone,
        missed_while_processor_ran=on_processor,
        conditions=seen,
        goals_met=not (tick.missed or failed or workers or files) and descriptors <= 0 and growth <= GROWTH_LIMIT,
    )


def _told(bare: bare_tick.BareTicks) -> bare_tick.Told | None:
    """What the reference processes tell; their loss loses no exchange."""
    try:
        return bare.result()
    except BenchError as error:
        print(error, file=sys.stderr)
        return None


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
