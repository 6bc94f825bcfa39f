"""Timing of whole chunks on a robot's engine, several networks in turn so that drift and other load hit all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dcqfa_ros.bench.conditions import no_garbage_collection
from dcqfa_ros.bundle.schema import DiffusionSpec
from dcqfa_ros.runtime.denoising import DenoisingLoop
from dcqfa_ros.runtime.engine import Engine, Float32
from training.export.diffusion_policy_t import table_graph
from training.profile_graphs import BlockSize, Feeds, PolicyGraphs, rest_of

BURST = 10  # consecutive chunks of one network
# Runs before them that are not counted: others have had the caches since. After one, a reference of 13 MB among larger
# networks was seen to take 1.4 times as long as among small ones.
SETTLE = 4


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and interquartile range of one network's runs, in milliseconds, corrected for drift."""

    median_ms: float
    spread_ms: float


def variant_of(
    graphs: PolicyGraphs, blocks: Sequence[BlockSize], train_timesteps: int
) -> tuple[dict[str, bytes], Feeds]:
    """The three graphs of a network, by role, and inputs for them: ``observation`` and ``noisy``."""
    with _one_thread_of_torch():
        denoiser, step = graphs.step(blocks)
        encoder, chunk = graphs.chunk(blocks)
        timestep = table_graph(np.repeat(step["timestep_kv"], train_timesteps, axis=0), rest_of(blocks))
    files = {"encoder": encoder, "timestep": timestep, "denoiser": denoiser}
    return files, {"observation": chunk["observation"], "noisy": step["noisy"]}


@contextmanager
def _one_thread_of_torch() -> Iterator[None]:
    """Further threads would wait actively for work that never comes, beside the engine that is timed next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class TimedNetwork:
    """A network on an engine, run as the robot runs it."""

    def __init__(self, engine: Engine, feeds: Mapping[str, NDArray[np.float32]], diffusion: DiffusionSpec) -> None:
        """Prepare what is computed once: the keys and values of the noise levels.

        Args:
            engine: of the graphs of :func:`variant_of`.
            feeds: their inputs.
            diffusion: the sampler.
        """
        self._engine = engine
        self._observation, self._noisy = feeds["observation"], feeds["noisy"]
        self._loop = DenoisingLoop(diffusion, self._noisy.shape[1], self._noisy.shape[2])
        self._timestep_kv = engine.timestep_kv(self._loop.timesteps).copy()
        self._observation_kv = engine.observation_kv(self._observation).copy()
        self._noise = np.zeros_like(self._noisy)

    def encode(self) -> Float32:
        """What runs once per chunk: the observation."""
        return self._engine.observation_kv(self._observation)

    def denoise(self) -> Float32:
        """All denoising steps of a chunk, for keys and values that are known."""
        return self._loop.run(self._engine, self._noisy, self._timestep_kv, self._observation_kv, lambda _: self._noise)

    def chunk(self) -> Float32:
        """A whole chunk: observation to actions."""
        np.copyto(self._observation_kv, self.encode())
        return self.denoise()


def time_in_turn(
    runs: Sequence[Callable[[], object]],
    rounds: int,
    warm_ups: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time each of ``runs``, the first of which is the reference, in ``rounds`` bursts of ``BURST`` in turn.

    In every round all times are divided by how much slower the reference was than it was over all rounds; of three
    rounds in a row the middle one counts, so that a burst that was interrupted does not make others look fast.

    Args:
        runs: callables; each computes one whole unit of work.
        rounds: bursts of each.
        warm_ups: untimed runs of each before.
        clock: seconds.
    """
    for run in runs:
        for _ in range(warm_ups):
            run()
    seconds = np.empty((len(runs), rounds, BURST))
    with no_garbage_collection():
        for number in range(rounds):
            for place in range(len(runs)):
                index = (number + place) % len(runs)
                run = runs[index]
                for _ in range(SETTLE):
                    run()
                for repeat in range(BURST):
                    begin = clock()
                    run()
                    seconds[index, number, repeat] = clock() - begin
    reference = np.median(seconds[0], axis=1)
    neighbours = np.lib.stride_tricks.sliding_window_view(np.pad(reference, 1, mode="edge"), 3)
    reference = np.median(neighbours, axis=1)
    seconds *= (np.median(seconds[0]) / reference)[None, :, None]
    low, middle, high = 1e3 * np.percentile(seconds.reshape(len(runs), -1), [25, 50, 75], axis=1)
    return [Timing(float(m), float(h - q)) for q, m, h in zip(low, middle, high, strict=True)]
