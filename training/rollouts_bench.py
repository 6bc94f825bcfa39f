"""What batching and parallel workers gain in collecting states: ``dcqfa bench rollouts``.

Three ways to collect the very same states take turns in every round, on the same cores, with the same seeds, start
states, network and number of denoising steps:

- one by one: a world at a time, one policy call of batch 1 per chunk, in this process;
- batched: all worlds in this process, one policy call per chunk for all of them;
- parallel: what distillation does, worlds and batched policy calls in one process per core.

PyTorch has one thread or one per core in the first two, whichever is faster in a trial before the rounds. ``ratio`` is
the median over the rounds of one by one over parallel within a round, so that drift cancels.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dcqfa_ros.bench.conditions import Conditions, versions, watch_conditions
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.observations import ObservationLayout
from dcqfa_ros.sim.pusht import PushTWorld
from training.evaluate import LAST_SEED
from training.rollouts_group import Float, Job, Kit, Visited, flat_state
from training.rollouts_workers import LocalWorkers, OwnProcess, Workers
from training.subnet import SpaceError, Subnet
from training.supernet_checkpoint import TrainedSupernet, load_supernet

PACKAGES = ("torch", "numpy", "pymunk")


class RolloutBenchError(UserError, ValueError):
    """A benchmark of rollouts that cannot be run as asked; the message names the option."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is collected in a round: ``calls`` policy calls in each of ``worlds``, by ``workers`` processes."""

    worlds: int = 64
    calls: int = 2
    rounds: int = 3
    denoising_steps: int = 8
    workers: int | None = None
    first_seed: int = 400_000

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            RolloutBenchError: a value is out of range.
        """
        for name in ("worlds", "calls", "rounds", "denoising_steps", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RolloutBenchError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
        last = self.first_seed + self.worlds - 1
        if self.first_seed < 0 or last > LAST_SEED:
            raise RolloutBenchError(f"--seed: seeds {self.first_seed} to {last}: start seeds are 0 to {LAST_SEED}")
        if self.workers is not None and self.workers > self.worlds:
            raise RolloutBenchError(f"--workers {self.workers}: more than there are worlds, {self.worlds}")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to collect: median seconds of a round and states per second."""

    label: str
    processes: int
    threads: int
    batch: int
    seconds: float
    states_per_second: float


@dataclass(frozen=True, slots=True)
class RolloutReport:
    """Result of :func:`bench_rollouts`.

    Attributes:
        ratio: states per second of ``parallel`` over those of ``one_by_one``, median over the rounds.
        ratio_batched: those of ``batched`` over those of ``one_by_one``.
        rounds_ratio: ``ratio`` of every round.
        first_call_px: largest difference between the samples of ``parallel`` and ``one_by_one`` at the first call,
            where both see equal observations: float rounding of other batch sizes.
    """

    ratio: float
    ratio_batched: float
    rounds_ratio: tuple[float, ...]
    one_by_one: Way
    batched: Way
    parallel: Way
    first_call_px: float
    policy: str
    subnet: str
    worlds: int
    calls: int
    states: int
    denoising_steps: int
    device: str
    cores: int
    conditions: Conditions
    versions: dict[str, str]


def bench_rollouts(target: Path, variant: str, options: Options) -> RolloutReport:
    """Collect with a subnet of a supernet in the three ways.

    Args:
        target: run folder or checkpoint of a supernet.
        variant: name of the subnet.
        options: what is collected.

    Raises:
        UserError: the supernet cannot be read, has no such subnet, takes fewer denoising steps, or is no policy of
            Push-T key points.
    """
    supernet = load_supernet(target)
    try:
        subnet = supernet.space.parse(variant)
    except SpaceError as error:
        raise RolloutBenchError(f"--variant {variant}: not in the search space of {target} ({error})") from error
    spec = supernet.meaning.specification()
    if options.denoising_steps > spec.diffusion.most_steps:
        raise RolloutBenchError(
            f"--denoising-steps {options.denoising_steps}: {target} takes 1 to {spec.diffusion.most_steps}"
        )
    kit = Kit(supernet.meaning.config.policy, spec, options.denoising_steps, None)
    weights, cores = flat_state(supernet.network), len(os.sched_getaffinity(0))
    workers = min(options.workers or cores, options.worlds)
    starts = _starts(supernet, options)
    alone = [_job(subnet, starts[:, n : n + 1], options.first_seed + n) for n in range(options.worlds)]
    whole = [_job(subnet, starts, options.first_seed)]
    shares = np.array_split(np.arange(options.worlds), workers)
    parts = [_job(subnet, starts[:, share], options.first_seed + int(share[0])) for share in shares]
    threads = torch.get_num_threads()
    own, crew = OwnProcess(kit), LocalWorkers(kit, workers)
    ways = [
        _Contender("one_by_one", own, alone, 1),
        _Contender("batched", own, whole, options.worlds),
        _Contender("parallel", crew, parts, len(shares[0]), processes=workers),
    ]
    try:
        for way in ways:
            way.warm_up(weights, cores)
        conditions = watch_conditions()
        for _ in range(options.rounds):
            for way in ways:
                way.seconds.append(way.time(weights, way.jobs))
        watched = conditions()
    finally:
        crew.close()
        torch.set_num_threads(threads)
    states = options.worlds * options.calls
    ratios = {way.label: [a / b for a, b in zip(ways[0].seconds, way.seconds, strict=True)] for way in ways}
    rows = {way.label: way.row(states) for way in ways}
    visited = {way.label: Visited.join(way.found) for way in ways}
    return RolloutReport(
        ratio=float(np.median(ratios["parallel"])),
        ratio_batched=float(np.median(ratios["batched"])),
        rounds_ratio=tuple(ratios["parallel"]),
        **rows,
        first_call_px=_first_call_difference(visited, options, [len(share) for share in shares], kit),
        policy=supernet.meaning.config.name,
        subnet=supernet.space.name(subnet),
        worlds=options.worlds,
        calls=options.calls,
        states=states,
        denoising_steps=options.denoising_steps,
        device="cpu",
        cores=cores,
        conditions=watched,
        versions=versions(PACKAGES),
    )


@dataclass(slots=True)
class _Contender:
    """One way to collect, with what was measured of it."""

    label: str
    workers: Workers
    jobs: list[Job]
    batch: int
    processes: int = 1
    threads: int = 1
    seconds: list[float] = field(default_factory=list)
    found: list[Visited] = field(default_factory=list)

    def time(self, weights: Float, jobs: list[Job]) -> float:
        """Seconds that some jobs take."""
        torch.set_num_threads(self.threads)
        started = time.perf_counter()
        self.found = self.workers.run(weights, jobs)
        return time.perf_counter() - started

    def warm_up(self, weights: Float, cores: int) -> None:
        """Run a few jobs, start processes, and keep the number of threads that is faster."""
        some = self.jobs[: max(self.processes, len(self.jobs) // 16)]
        trials = {}
        for threads in sorted({1, cores} if isinstance(self.workers, OwnProcess) else {1}):
            self.threads = threads
            self.time(weights, some[:1])
            trials[threads] = self.time(weights, some)
        self.threads = min(trials, key=lambda threads: trials[threads])

    def row(self, states: int) -> Way:
        """What is reported."""
        median = float(np.median(self.seconds))
        return Way(self.label, self.processes, self.threads, self.batch, median, states / median)


def _starts(supernet: TrainedSupernet, options: Options) -> Float:
    """Normalised observations (calls, worlds, To, Do) of the seeds' start states; worlds that end start there again."""
    layout, world = ObservationLayout(supernet.meaning.specification()), PushTWorld()
    starts = []
    for seed in range(options.first_seed, options.first_seed + options.worlds):
        world.reset(seed)
        found = world.observation()
        flat = np.concatenate([key.normalizer.normalize(found[key.name]).ravel() for key in layout.keys])
        starts.append(np.stack([flat] * layout.history))
    return np.stack([np.stack(starts)] * options.calls)


def _job(subnet: Subnet, starts: Float, first_seed: int) -> Job:
    calls, count = starts.shape[:2]
    nobody = np.zeros((calls, count), bool)
    seeds = tuple(range(first_seed, first_seed + count))
    return Job(subnet, starts, calls, True, seeds, 0, nobody, nobody)


def _first_call_difference(visited: dict[str, Visited], options: Options, shares: list[int], kit: Kit) -> float:
    """Largest difference in px between the last samples of the recorded paths at the first call of every world."""
    calls, scale = options.calls, np.abs(np.asarray(kit.spec.action.normalizer.scale or (1.0,)))
    alone = visited["one_by_one"].path.reshape(options.worlds, calls, -1)[:, 0]
    first, parts = 0, []
    for share in shares:  # a group's states lie in the order of calls and then of worlds
        parts.append(visited["parallel"].path[first : first + share])
        first += share * calls
    together = np.concatenate(parts).reshape(options.worlds, -1)
    return float(np.abs(alone - together).max() / scale.min())
