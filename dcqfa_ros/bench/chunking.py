"""Methods of chunk execution under injected latency on Push-T: score, jerk and jumps between chunks, in one table.

Each row is a set of closed-loop episodes in virtual time (:mod:`dcqfa_ros.bench.chunking_rollout`), so results depend
on seeds and weights and not on how fast this computer is. Methods and latencies share seeds and noise: differences are
of pairs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

from tqdm import tqdm

from dcqfa_ros.bench.chunking_contenders import Contender, Field
from dcqfa_ros.bench.chunking_record import Outcome, Record, summarize_tracks
from dcqfa_ros.bench.chunking_rollout import roll_out
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.runtime.chunking import ChunkPlan, Method
from dcqfa_ros.sim.pusht import EPISODE_STEPS

LONGEST_DELAY_MS = 60_000.0


@dataclass(frozen=True, slots=True)
class Task:
    """One set of episodes to run; it can travel to another process."""

    method: Method
    ticks: int
    delay_ms: float
    contender: Contender
    seeds: tuple[int, ...]
    steps: int | None
    threads: int
    execution_horizon: int


def delay_ticks(delay_ms: float, rate_hz: float) -> int:
    """Return the control periods that a latency costs: its chunk takes effect at the next tick after it came."""
    return math.ceil(round(delay_ms * rate_hz / 1000.0, 6))


@dataclass(frozen=True, slots=True)
class NotRun:
    """A row that is missing: method, latency in ms, and why."""

    method: Method
    delay: float
    reason: str


def plan_tasks(
    field: Field,
    methods: Sequence[Method],
    delays_ms: Sequence[float],
    seeds: Sequence[int],
    steps: int | None,
    threads: int,
    execution_horizon: int,
) -> tuple[list[Task], list[NotRun]]:
    """Return what to run, and which rows are not run and why.

    Latencies that cost the same number of control periods are one task: in virtual time nothing tells them apart.

    Raises:
        BenchError: a value is out of range.
    """
    _check(field, methods, delays_ms, seeds, steps, threads, execution_horizon)
    tasks: dict[tuple[Method, int], Task] = {}
    not_run: list[NotRun] = []
    for method in methods:
        for delay in delays_ms:
            if method in field.not_run:
                not_run.append(NotRun(method, delay, field.not_run[method]))
                continue
            ticks = delay_ticks(delay, field.spec.action.rate_hz)
            task = Task(method, ticks, delay, field.contenders[method], tuple(seeds), steps, threads, execution_horizon)
            tasks.setdefault((method, ticks), task)
    return list(tasks.values()), not_run


def _check(
    field: Field,
    methods: Sequence[Method],
    delays_ms: Sequence[float],
    seeds: Sequence[int],
    steps: int | None,
    threads: int,
    execution_horizon: int,
) -> None:
    if not methods:
        raise BenchError(f"--methods: expected at least one of {', '.join(m.value for m in Method)}")
    if not delays_ms:
        raise BenchError("--delays-ms: expected at least one latency in milliseconds, such as 0,200")
    for delay in delays_ms:
        if not 0.0 <= delay <= LONGEST_DELAY_MS:
            raise BenchError(f"--delays-ms: expected 0 to {LONGEST_DELAY_MS:g} ms, got {delay:g}")
    if not seeds:
        raise BenchError("--seeds: expected at least 1")
    if min(seeds) < 0 or max(seeds) > 2**32 - 1:
        raise BenchError(f"seeds {min(seeds)} to {max(seeds)}: start seeds are 0 to {2**32 - 1}")
    for spec in (field.spec, field.trained):
        if steps is not None and spec is not None and not 1 <= steps <= spec.diffusion.most_steps:
            most = spec.diffusion.most_steps
            raise BenchError(f"--steps {steps}: policy {spec.name!r} takes 1 to {most} denoising steps")
    if threads < 1:
        raise BenchError(f"--threads: expected at least 1, got {threads}")
    usable = field.spec.action.horizon - field.spec.action.first_executed
    if not 1 <= execution_horizon <= usable:
        raise BenchError(
            f"--execution-horizon {execution_horizon}: a chunk of {field.spec.name!r} holds 1 to {usable} actions"
        )


def run_tasks(tasks: Sequence[Task], record: Record, jobs: int = 1) -> list[Outcome]:
    """Run what ``record`` does not hold yet and return the outcomes of all tasks, in their order.

    Args:
        tasks: what to run.
        record: takes each outcome as soon as it is there.
        jobs: processes that compute, each with the task's threads; 1 computes in this one.

    Raises:
        BenchError: jobs is below 1, or the record cannot be written.
        UserError: a bundle is damaged, or the simulator is not installed.
    """
    if jobs < 1:
        raise BenchError(f"--jobs: expected at least 1, got {jobs}")
    open_tasks = [task for task in tasks if record.find(*_key(task)) is None]
    with tqdm(total=len(tasks), initial=len(tasks) - len(open_tasks), desc="chunking", unit="row") as bar:
        if jobs == 1:
            for task in open_tasks:
                bar.set_postfix_str(_name(task))
                with tqdm(total=len(task.seeds) * EPISODE_STEPS, desc=_name(task), unit="step", leave=False) as steps:
                    record.add(run_task(task, steps.update))
                bar.update()
        else:
            _run_together(open_tasks, record, jobs, bar)
    outcomes = [record.find(*_key(task)) for task in tasks]
    return [outcome for outcome in outcomes if outcome is not None]


def _run_together(tasks: Sequence[Task], record: Record, jobs: int, bar: tqdm) -> None:
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_task, task) for task in tasks]
        try:
            for future in as_completed(futures):
                record.add(future.result())
                bar.set_postfix_str(f"{record.outcomes[-1].method.value}, {record.outcomes[-1].ticks} ticks done")
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _key(task: Task) -> tuple[Method, int, str]:
    return task.method, task.ticks, task.contender.weights


def _name(task: Task) -> str:
    return f"{task.method.value} {task.delay_ms:g} ms"


def run_task(task: Task, progress: Callable[[int], object] | None = None) -> Outcome:
    """Run one set of episodes in this process.

    Raises:
        UserError: the bundle is damaged, the simulator is not installed, or the policy refuses its input.
    """
    begin, contender = time.monotonic(), task.contender
    with contender.open(task.threads) as policy:
        spec = policy.spec
        plan = ChunkPlan(spec.action, task.method, task.execution_horizon, spec.diffusion.prefix)
        tracks = roll_out(
            policy,
            spec,
            task.seeds,
            task.method,
            task.ticks,
            execution_horizon=task.execution_horizon,
            steps=task.steps,
            progress=progress,
        )
    return summarize_tracks(
        tracks,
        spec.action.rate_hz,
        method=task.method,
        ticks=task.ticks,
        bundle=contender.bundle,
        variant=contender.variant,
        weights=contender.weights,
        timing_note=plan.timing(task.ticks).note,
        seconds=time.monotonic() - begin,
    )
