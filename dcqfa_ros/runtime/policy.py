"""The policy as the robot calls it: raw observations in, executable actions out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.chunking import Continuation, Method
from dcqfa_ros.runtime.denoising import DenoisingLoop
from dcqfa_ros.runtime.engine import Engine, Float32
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.guidance import Guidance, Pullback
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

    def __init__(self, spec: BundleSpec, engine: Engine, pullback: Callable[[], Pullback] | None = None) -> None:
        """Bind a bundle's description to a loaded engine.

        ``pullback`` opens the denoiser's vector-Jacobian product; it is called when a guided continuation first asks
        for it, or by :meth:`warm_up`. Without it guided continuations are refused.

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
        self._open_pullback = pullback
        self._pullback: Pullback | None = None

    def predict(
        self,
        observation: Observation,
        seeds: Sequence[int],
        chunks: Sequence[int],
        steps: int | None = None,
        tokens: int | None = None,
        continuations: Sequence[Continuation | None] | None = None,
        actions: int | None = None,
    ) -> Float32:
        """Predict the actions to execute.

        The result depends on each row's observation, seed, chunk and continuation only: not on the other rows beyond
        float rounding, and not on ``tokens``, because attention is causal and noise is always drawn for the whole
        horizon (only guidance looks ahead: a guided row depends on the tokens behind as well).

        Args:
            observation: key -> (B, history, *shape), raw units, the key's dtype; pictures at the network's size;
                oldest time step first.
            seeds: noise seed of each row, B entries.
            chunks: number of the chunk within its episode, B entries.
            steps: denoising steps; default: the bundle's.
            tokens: action tokens computed, ``first_executed + actions`` (default) to ``horizon``.
            continuations: what each row's chunk continues, B entries, None where it continues nothing; default: none.
            actions: actions returned, 1 to ``horizon - first_executed``; default: the bundle's ``executed``.

        Returns:
            Actions (B, actions, action_dim), float32, raw units; row 0 belongs to the observation's time. Known actions
            of a trained continuation are returned as they were given.

        Raises:
            PolicyError: a key is missing or unknown, has a wrong shape or dtype, or holds NaN or infinity; steps,
                tokens or actions is out of range; a continuation cannot be followed; the network's output is not
                finite.
        """
        batch = self.observations.check(observation)
        for label, values in (("seeds", seeds), ("chunks", chunks)):
            if len(values) != batch:
                raise PolicyError(f"{label}: expected {batch} entries (one per observation), got {len(values)}")
        if continuations is not None and len(continuations) != batch:
            raise PolicyError(f"continuations: expected {batch} entries (one per row), got {len(continuations)}")
        count = self._count(actions)
        required = self.spec.action.first_executed + count
        loop, encoded, timestep_kv = self._loop(batch, required if tokens is None else tokens, steps, required)
        guidance = Guidance.of(continuations or (), self.spec, loop.tokens, self._action_normalizer)
        pullback = self._derivative() if guidance is not None and guidance.needs_pullback else None
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
            guidance,
            pullback,
        )
        first = self.spec.action.first_executed
        result = self._action_normalizer.denormalize(normalised[:, first:required])
        if not np.isfinite(result).all():
            row, step, dim = (int(i) for i in np.argwhere(~np.isfinite(result))[0])
            raise PolicyError(
                f"engine {self.engine.name} gave action {self.spec.action.names[dim]!r} = {result[row, step, dim]} "
                f"at action {step} of batch row {row}; the chunk is discarded"
            )
        for row, entry in enumerate(continuations or ()):
            if entry is not None and entry.method is Method.TRAINED:  # normalising and back would round them
                known = entry.previous[first : min(entry.frozen, required)]
                result[row, : len(known)] = known
        return result

    def _count(self, actions: int | None) -> int:
        action = self.spec.action
        count = action.executed if actions is None else actions
        if not 1 <= count <= action.horizon - action.first_executed:
            raise PolicyError(f"actions: expected 1 to {action.horizon - action.first_executed}, got {count}")
        return count

    def _derivative(self) -> Pullback:
        if self._pullback is None:
            if self._open_pullback is None:
                raise PolicyError(
                    f"engine {self.engine.name} was opened without the denoiser's derivative, which chunking guided "
                    "needs: use chunking soft or trained"
                )
            self._pullback = self._open_pullback()
        return self._pullback

    def warm_up(
        self, steps: int | None = None, batch: int = 1, runs: int = 2, method: Method = Method.SYNCHRONOUS
    ) -> None:
        """Run ``runs`` chunks on zero observations, so that the first real one finds tables, buffers and caches ready.

        For a method whose chunks overlap, ``runs`` further ones are of the whole horizon; for GUIDED, guided.

        Raises:
            PolicyError: as :meth:`predict`.
        """
        keys = self.observations.keys
        zeros = {key.name: np.zeros((batch, self.observations.history, *key.shape), key.dtype) for key in keys}
        for _ in range(runs):
            self.predict(zeros, [0] * batch, [0] * batch, steps)
        if not method.overlaps:
            return
        action = self.spec.action
        continuation = None
        if method is Method.GUIDED:
            middle = np.array([action.minimum, action.maximum]).mean(axis=0, keepdims=True).astype(np.float32)
            continuation = Continuation(middle, 1, action.horizon - 1, method)
        longest = action.horizon - action.first_executed
        for _ in range(runs):
            self.predict(zeros, [0] * batch, [0] * batch, steps, continuations=[continuation] * batch, actions=longest)

    def close(self) -> None:
        """Close the engine and drop all buffers."""
        self._loops.clear()
        if self._pullback is not None:
            self._pullback.close()
        self.engine.close()

    def _loop(self, batch: int, tokens: int, steps: int | None, required: int | None = None) -> _Loop:
        """Return loop and buffers for one shape, from the cache where they are there."""
        horizon, least = self.spec.action.horizon, self.required_tokens if required is None else required
        if not least <= tokens <= horizon:
            raise PolicyError(f"tokens: expected {least} to {horizon}, got {tokens}")
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
