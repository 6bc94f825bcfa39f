"""The policy as the robot calls it: raw observations in, executable actions out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.denoising import DenoisingLoop
from dcqfa_ros.runtime.engine import Engine, Float32
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.noise import chunk_noise, step_noise
from dcqfa_ros.runtime.normalize import Normalizer
from dcqfa_ros.runtime.observations import Observation, ObservationLayout

__all__ = ["PolicyError", "PolicyRuntime"]

_CACHED_LOOPS = 8  # an evaluation's batch shrinks as episodes end: keep few buffer sets


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

        Raises:
            PolicyError: the bundle declares an observation that this runtime cannot feed.
        """
        self.spec = spec
        self.engine = engine
        self.observations = ObservationLayout(spec)
        self.required_tokens = spec.action.first_executed + spec.action.executed
        self._action_normalizer = Normalizer(spec.action.normalizer, (spec.action.dim,))
        self._timestep_kv: dict[int, Float32] = {}
        self._loops: OrderedDict[tuple[int, int, int], tuple[DenoisingLoop, Float32]] = OrderedDict()

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
            observation: key -> (B, history, *shape), float32, raw units; oldest time step first.
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
        loop, encoded = self._loop(batch, self.required_tokens if tokens is None else tokens, steps)
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
            self._timestep_table(loop),
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
        zeros = {key.name: np.zeros((batch, self.observations.history, *key.shape), np.float32) for key in keys}
        for _ in range(runs):
            self.predict(zeros, [0] * batch, [0] * batch, steps)

    def close(self) -> None:
        """Close the engine and drop all buffers."""
        self._loops.clear()
        self._timestep_kv.clear()
        self.engine.close()

    def _loop(self, batch: int, tokens: int, steps: int | None) -> tuple[DenoisingLoop, Float32]:
        """Return the denoising loop and the encoder's input buffer for one shape, from the cache where it is there."""
        horizon = self.spec.action.horizon
        if not self.required_tokens <= tokens <= horizon:
            raise PolicyError(f"tokens: expected {self.required_tokens} to {horizon}, got {tokens}")
        count = self.spec.diffusion.steps if steps is None else steps
        key = (batch, tokens, count)
        if key not in self._loops:
            try:
                loop = DenoisingLoop(self.spec.diffusion, tokens, self.spec.action.dim, steps=count, batch=batch)
            except ValueError as error:
                raise PolicyError(str(error)) from error
            self._loops[key] = loop, np.empty((batch, self.observations.history, self.observations.dim), np.float32)
            if len(self._loops) > _CACHED_LOOPS:
                self._loops.popitem(last=False)
        self._loops.move_to_end(key)
        return self._loops[key]

    def _timestep_table(self, loop: DenoisingLoop) -> Float32:
        """Keys and values of the time token at every step, (steps, R, 1, D); computed once per step count."""
        table = self._timestep_kv.get(loop.steps)
        if table is None:
            table = self._timestep_kv[loop.steps] = np.array(self.engine.timestep_kv(loop.timesteps), np.float32)
        return table
