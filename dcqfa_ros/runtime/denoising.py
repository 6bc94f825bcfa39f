"""The denoising loop: DDIM (eta 0), DDPM and consistency samplers of a variance-preserving diffusion policy.

Sources: Ho et al. 2020, equation 7 (DDPM posterior, "fixed small" variance); Song et al. 2021, equation 12 with eta 0
(DDIM). Both clip the predicted clean sample and agree with ``diffusers``' schedulers (leading spacing,
``set_alpha_to_one``) within 1e-5. A consistency model (Song et al. 2023, algorithm 1) predicts the clean sample at every
level, to which fresh noise of the next one is added. One step is written as ::

    x0 = clip(from_sample * x + from_noise * eps)
    x  = to_clean * x0 + to_direction * (eps for DDIM, x for DDPM) + sigma * z

whose five coefficients per step are computed once, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import DiffusionSpec
from dcqfa_ros.runtime.engine import Engine, Float32, Int64
from dcqfa_ros.runtime.schedule import (
    alphas_cumprod,
    consistency_boundary,
    consistency_timesteps,
    leading_timesteps,
    squared_cosine_betas,
)


@dataclass(frozen=True, slots=True)
class SamplerCoefficients:
    """Coefficients of the update above; every field has shape (steps,), float32, ``timesteps`` int64."""

    timesteps: Int64
    from_sample: Float32
    from_noise: Float32
    to_clean: Float32
    to_direction: Float32
    sigma: Float32

    @classmethod
    def of(cls, spec: DiffusionSpec, steps: int) -> SamplerCoefficients:
        """Compute the coefficients of ``steps`` denoising steps.

        Raises:
            ValueError: ``steps`` is outside 1..``spec.most_steps``.
        """
        alpha_bar = alphas_cumprod(squared_cosine_betas(spec.train_timesteps))
        if spec.sampler == "consistency":
            return cls._consistency(alpha_bar, consistency_timesteps(spec.most_steps, steps))
        timesteps = leading_timesteps(spec.train_timesteps, steps)
        now = alpha_bar[timesteps]
        previous_steps = timesteps - spec.train_timesteps // steps
        previous = np.where(previous_steps >= 0, alpha_bar[np.maximum(previous_steps, 0)], 1.0)
        if spec.sampler == "ddim":
            to_clean, to_direction = np.sqrt(previous), np.sqrt(1.0 - previous)
            sigma = np.zeros_like(now)
        else:
            alpha = now / previous
            to_clean = np.sqrt(previous) * (1.0 - alpha) / (1.0 - now)
            to_direction = np.sqrt(alpha) * (1.0 - previous) / (1.0 - now)
            variance = np.maximum((1.0 - previous) / (1.0 - now) * (1.0 - alpha), 1e-20)
            sigma = np.where(timesteps > 0, np.sqrt(variance), 0.0)
        columns = (1.0 / np.sqrt(now), -np.sqrt(1.0 - now) / np.sqrt(now), to_clean, to_direction, sigma)
        return cls(timesteps, *(_float32(c) for c in columns))

    @classmethod
    def _consistency(cls, alpha_bar: NDArray[np.float64], timesteps: Int64) -> SamplerCoefficients:
        """Coefficients of a consistency sampler that visits ``timesteps``."""
        skip, out = consistency_boundary(timesteps)
        now, following = alpha_bar[timesteps], np.append(alpha_bar[timesteps[1:]], 1.0)
        from_sample, from_noise = skip + out / np.sqrt(now), -out * np.sqrt(1.0 - now) / np.sqrt(now)
        columns = (from_sample, from_noise, np.sqrt(following), np.zeros_like(now), np.sqrt(1.0 - following))
        return cls(timesteps, *(_float32(c) for c in columns))


def _float32(values: NDArray[np.float64]) -> Float32:
    return values.astype(np.float32)


class DenoisingLoop:
    """Turns noise into a normalised action chunk with one engine. Buffers are allocated once and reused.

    Attributes:
        timesteps: noise levels visited, (steps,), int64: the argument of ``Engine.timestep_kv``.
        batch: number of chunks denoised together.
        tokens: action tokens computed per chunk.
        sample: the current sample x, (batch, tokens, action_dim).
        prediction: the noise the engine predicted in it, same shape.
    """

    def __init__(
        self, spec: DiffusionSpec, tokens: int, action_dim: int, *, steps: int | None = None, batch: int = 1
    ) -> None:
        """Prepare ``steps`` denoising steps (default: the spec's) of (batch, tokens, action_dim) chunks.

        Raises:
            ValueError: steps is outside 1..train_timesteps, or batch, tokens or action_dim is below 1.
        """
        for label, value in (("batch", batch), ("tokens", tokens), ("action_dim", action_dim)):
            if value < 1:
                raise ValueError(f"{label}: expected at least 1, got {value}")
        self.coefficients = SamplerCoefficients.of(spec, spec.steps if steps is None else steps)
        self.timesteps = self.coefficients.timesteps
        self.batch, self.tokens = batch, tokens
        self._sampler = spec.sampler
        self._ancestral, self._stochastic = spec.sampler == "ddpm", spec.sampler != "ddim"
        self._clip = np.float32(spec.clip_sample)
        shape = (batch, tokens, action_dim)
        self.sample, self.prediction = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._clean, self._scratch = np.empty(shape, np.float32), np.empty(shape, np.float32)

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.timesteps)

    def step(self, index: int, noise: Float32 | None = None) -> None:
        """Apply update ``index`` to ``sample``, in place, given ``prediction``.

        Args:
            index: denoising step, from 0.
            noise: standard normal z, shape of the sample; ignored where sigma is 0.
        """
        c, x, eps, clean, scratch = self.coefficients, self.sample, self.prediction, self._clean, self._scratch
        np.multiply(x, c.from_sample[index], out=clean)
        np.multiply(eps, c.from_noise[index], out=scratch)
        np.add(clean, scratch, out=clean)
        # Not np.clip: its wrapper costs more than the two ufuncs. Both let NaN through, to be refused at the end.
        np.minimum(clean, self._clip, out=clean)
        np.maximum(clean, -self._clip, out=clean)
        np.multiply(x if self._ancestral else eps, c.to_direction[index], out=scratch)
        np.multiply(clean, c.to_clean[index], out=x)
        np.add(x, scratch, out=x)
        if noise is not None and c.sigma[index] > 0.0:
            np.multiply(noise, c.sigma[index], out=scratch)
            np.add(x, scratch, out=x)

    def run(
        self,
        engine: Engine,
        initial_noise: Float32,
        timestep_kv: Float32,
        observation_kv: Float32,
        step_noise: Callable[[int], Float32] | None = None,
    ) -> Float32:
        """Denoise one batch of chunks.

        Args:
            engine: predicts the noise.
            initial_noise: standard normal, (batch, tokens, action_dim).
            timestep_kv: ``engine.timestep_kv(self.timesteps)``, (steps, R, 1, D).
            observation_kv: ``engine.observation_kv(...)``, (batch, R, To, D).
            step_noise: index of a denoising step -> z (batch, tokens, action_dim); DDIM ignores it,
                the others need it.

        Returns:
            Normalised actions (batch, tokens, action_dim): this loop's buffer, valid until the next call.

        Raises:
            ValueError: a sampler other than DDIM without ``step_noise``.
        """
        if self._stochastic and step_noise is None:
            raise ValueError(f"sampler {self._sampler} needs step_noise")
        np.copyto(self.sample, initial_noise)
        for index in range(len(self.timesteps)):
            engine.denoise(self.sample, timestep_kv[index : index + 1], observation_kv, self.prediction)
            if self._stochastic and step_noise is not None and self.coefficients.sigma[index] > 0.0:
                self.step(index, step_noise(index))
            else:
                self.step(index)
        return self.sample
