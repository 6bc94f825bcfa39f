"""Timing of whole chunks on this computer's engine, several networks in turn so that drift and other load hit all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bench.conditions import no_garbage_collection
from dcqfa_ros.bundle.schema import DiffusionSpec
from dcqfa_ros.runtime.denoising import DenoisingLoop
from dcqfa_ros.runtime.engine import Float32, Int64
from dcqfa_ros.runtime.fusion import fuse_for_onnxruntime_cpu
from dcqfa_ros.runtime.lowering import lower_for_onnxruntime_cpu, parse_model
from dcqfa_ros.runtime.ort_engine import open_session, session_options

BURST = 5  # consecutive chunks of one network; one more before them fills the caches again and is not counted
Feeds = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and interquartile range of one network's runs, in milliseconds, corrected for drift."""

    median_ms: float
    spread_ms: float


class ChunkNetwork:
    """The graph that runs once per chunk, as the engine runs it."""

    def __init__(self, graph: tuple[bytes, Feeds], threads: int) -> None:
        """Lower, fuse and load a canonical graph."""
        data, self._feeds = graph
        self._session = _open(data, threads)

    def run(self) -> Any:
        """Encode one observation."""
        return self._session.run(None, self._feeds)


class StepNetwork:
    """The denoising loop of one chunk over the graph of a step, with the engine's bound buffers and copies."""

    def __init__(self, graph: tuple[bytes, Feeds], threads: int, diffusion: DiffusionSpec) -> None:
        """Lower, fuse and load a canonical graph whose sample is called ``noisy`` and whose result is ``noise``."""
        data, feeds = graph
        self._session = _open(data, threads)
        self._binding = self._session.io_binding()
        self._arrays = {name: array.copy() for name, array in feeds.items()}
        sample = feeds["noisy"]
        self._result = np.zeros_like(sample)
        for name, array in (*self._arrays.items(), ("noise", self._result)):
            bind = self._binding.bind_output if name == "noise" else self._binding.bind_input
            bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._loop = DenoisingLoop(diffusion, sample.shape[1], sample.shape[2])
        self._initial = sample
        self._timestep_kv = np.repeat(feeds.get("timestep_kv", np.zeros((1, 1), np.float32)), self.steps, axis=0)
        self._observation_kv = feeds.get("observation_kv", np.zeros((1, 1), np.float32))
        self._noise = np.zeros_like(sample)

    @property
    def steps(self) -> int:
        """Denoising steps of one run."""
        return self._loop.steps

    def run(self) -> Float32:
        """Denoise one chunk."""
        return self._loop.run(self, self._initial, self._timestep_kv, self._observation_kv, lambda _: self._noise)

    # What DenoisingLoop asks of an engine:
    name = "profile"

    def denoise(
        self, noisy: Float32, timestep_kv: Float32, observation_kv: Float32, out: Float32 | None = None
    ) -> Float32:
        """Predict the noise once; inputs are copied to bound buffers as ``OnnxRuntimeEngine`` does."""
        for label, given in (("noisy", noisy), ("timestep_kv", timestep_kv), ("observation_kv", observation_kv)):
            if label in self._arrays:
                np.copyto(self._arrays[label], given)
        self._session.run_with_iobinding(self._binding)
        if out is None:
            return self._result
        np.copyto(out, self._result)
        return out

    def observation_kv(self, observation: Float32) -> Float32:
        """Not part of the loop: the keys and values are the given ones, whatever ``observation`` is."""
        del observation
        return self._observation_kv

    def timestep_kv(self, timesteps: Int64) -> Float32:
        """Not part of the loop: the keys and values are the given ones."""
        return self._timestep_kv[: len(timesteps)]

    def close(self) -> None:
        """Nothing to close: the session goes with the object."""


def _open(data: bytes, threads: int) -> Any:
    model = parse_model(data, "profile.onnx")
    if lower_for_onnxruntime_cpu(model, "profile.onnx"):
        fuse_for_onnxruntime_cpu(model)
    return open_session(model, session_options(threads))


def time_in_turn(
    runs: Sequence[Callable[[], object]],
    rounds: int,
    warm_ups: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time each of ``runs``, the first of which is the reference, in ``rounds`` bursts of ``BURST`` in turn.

    In every round all times are divided by how much slower the reference was than it was over all rounds.

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
                run()
                for repeat in range(BURST):
                    begin = clock()
                    run()
                    seconds[index, number, repeat] = clock() - begin
    reference = np.median(seconds[0], axis=1)
    seconds *= (np.median(seconds[0]) / reference)[None, :, None]
    low, middle, high = 1e3 * np.percentile(seconds.reshape(len(runs), -1), [25, 50, 75], axis=1)
    return [Timing(float(m), float(h - q)) for q, m, h in zip(low, middle, high, strict=True)]
