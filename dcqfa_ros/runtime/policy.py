"""The policy as the robot calls it: raw observations in, executable actions out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.denoising import DenoisingLoop
from dcqfa_ros.runtime.engine import Engine, Float32
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.noise import chunk_noise, step_noise
from dcqfa_ros.runtime.normalize import Normalizer
from dcqfa_ros.runtime.observations import Observation, ObservationLayout
from dcqfa_ros.runtime.recent import Recent

__all__ = ["PolicyError", "PolicyRuntime"]

_CACHED_LOOPS = 8  # an evaluation's batch shrinks as episodes end: keep few buffer sets


class _Loop(NamedTuple):
    """What one batch, number of tokens and number of steps needs."""

    denoising: DenoisingLoop
    encoded: Float32  # the encoder's input buffer, (B, To, Do)
    timestep_kv: Float32  # (steps, R, 1, D)


class PolicyRuntime:
    """One variant of a policy on one engine. Not thread-safe: it belongs to the engine's thread.

    Attributes:
        spec: the bundle's description.
        engine: executes the network.
        observations: layout of the observation dictionary.
        required_tokens: action tokens that the executed actions need, ``first_executed + executed``.
    """

    def __init__(self, spec: BundleSpec, engine: Engine) -> None:
        """Bind a bundle's description to a loaded engine.

        The time token of every training time step is encoded here, once: whatever number of steps is asked for later
        reads rows of that table, and no engine meets a new shape of it within a chunk's deadline.

        Raises:
            PolicyError: the bundle declares an observation that this runtime cannot feed, or the engine failed.
        """
        self.spec = spec
        self.engine = engine
        self.observations = ObservationLayout(spec)
        self.required_tokens = spec.action.first_executed + spec.action.executed
        self._action_normalizer = Normalizer(spec.action.normalizer, (spec.action.dim,))
        every = np.arange(spec.diffusion.train_timesteps, dtype=np.int64)
        self._timestep_kv: Float32 = np.array(engine.timestep_kv(every), np.float32)  # (train_timesteps, R, 1, D)
        self._loops: Recent[tuple[int, int, int], _Loop] = Recent(_CACHED_LOOPS)

    def predict(
        self,
        observation: Observation,
        seeds: Sequence[int],
        chunks: Sequence[int],
        steps: int | None = None,
        tokens: int | None = None,
    ) -> Float32:
        """Predict the actions to execute.

        The result depends on each row's observation, seed and chunk only: not on the other rows beyond float rounding,
        and not on ``tokens``, because attention is causal and noise is always drawn for the whole horizon.

        Args:
            observation: key -> (B, history, *shape), raw units, the key's dtype; pictures at the network's size;
                oldest time step first.
            seeds: noise seed of each row, B entries.
            chunks: number of the chunk within its episode, B entries.
            steps: denoising steps; default: the bundle's.
            tokens: action tokens computed, ``required_tokens`` (default) to ``horizon``.

        Returns:
            Actions (B, executed, action_dim), float32, raw units; row 0 belongs to the observation's time.

        Raises:
            PolicyError: a key is missing or unknown, has a wrong shape or dtype, or holds NaN or infinity; steps or
                tokens is out of range; the network's output is not finite.
        """
        batch = self.observations.check(observation)
        for label, values in (("seeds", seeds), ("chunks", chunks)):
            if len(values) != batch:
                raise PolicyError(f"{label}: expected {batch} entries (one per observation), got {len(values)}")
        loop, encoded, timestep_kv = self._loop(batch, self.required_tokens if tokens is None else tokens, steps)
        self.observations.encode(observation, encoded)
        observation_kv = self.engine.observation_kv(encoded)
        shape = (self.spec.action.horizon, self.spec.action.dim)

        def draw(noise: Callable[[int, int], Float32]) -> Float32:
            pairs = zip(seeds, chunks, strict=True)
            return np.stack([noise(seed, chunk)[: loop.tokens] for seed, chunk in pairs])

        try:
            initial = draw(lambda seed, chunk: chunk_noise(seed, chunk, shape))
        except ValueError as error:
            raise PolicyError(str(error)) from error
        normalised = loop.run(
            self.engine,
            initial,
            timestep_kv,
            observation_kv,
            lambda step: draw(lambda seed, chunk: step_noise(seed, chunk, step, shape)),
        )
        first = self.spec.action.first_executed
        actions = self._action_normalizer.denormalize(normalised[:, first : first + self.spec.action.executed])
        if not np.isfinite(actions).all():
            row, step, dim = (int(i) for i in np.argwhere(~np.isfinite(actions))[0])
            raise PolicyError(
                f"engine {self.engine.name} gave action {self.spec.action.names[dim]!r} = {actions[row, step, dim]} "
                f"at action {step} of batch row {row}; the chunk is discarded"
            )
        return actions

    def warm_up(self, steps: int | None = None, batch: int = 1, runs: int = 2) -> None:
        """Run ``runs`` chunks on zero observations, so that the first real one finds tables, buffers and caches ready.

        Raises:
            PolicyError: as :meth:`predict`.
        """
        keys = self.observations.keys
        zeros = {key.name: np.zeros((batch, self.observations.history, *key.shape), key.dtype) for key in keys}
        for _ in range(runs):
            self.predict(zeros, [0] * batch, [0] * batch, steps)

    def close(self) -> None:
        """Close the engine and drop all buffers."""
        self._loops.clear()
        self.engine.close()

    def _loop(self, batch: int, tokens: int, steps: int | None) -> _Loop:
        """Return loop and buffers for one shape, from the cache where they are there."""
        horizon = self.spec.action.horizon
        if not self.required_tokens <= tokens <= horizon:
            raise PolicyError(f"tokens: expected {self.required_tokens} to {horizon}, got {tokens}")
        count = self.spec.diffusion.steps if steps is None else steps
        key = (batch, tokens, count)
        found = self._loops.get(key)
        if found is None:
            try:
                loop = DenoisingLoop(self.spec.diffusion, tokens, self.spec.action.dim, steps=count, batch=batch)
            except ValueError as error:
                raise PolicyError(str(error)) from error
            encoded = np.empty((batch, self.observations.history, self.observations.dim), np.float32)
            found = _Loop(loop, encoded, self._timestep_kv[loop.timesteps])
            self._loops.put(key, found)
        return found
