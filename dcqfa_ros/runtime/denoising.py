"""The denoising loop: DDIM (eta 0), DDPM and consistency samplers of a variance-preserving diffusion policy.

Sources: Ho et al. 2020, equation 7 (DDPM posterior, "fixed small" variance); Song et al. 2021, equation 12 with eta 0
(DDIM). Both clip the predicted clean sample and agree with ``diffusers``' schedulers (leading spacing,
``set_alpha_to_one``) within 1e-5. A consistency model (Song et al. 2023, algorithm 1) predicts the clean sample at
every level, to which fresh noise of the next one is added. One step is written as ::

    x0 = clip(from_sample * x + from_noise * eps)
    x  = to_clean * x0 + to_direction * (eps for DDIM, x for DDPM) + sigma * z

whose five coefficients per step are computed once, in float64. Where the chunk continues another one, x0 and eps are
corrected in between (:mod:`dcqfa_ros.runtime.guidance`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import DiffusionSpec
from dcqfa_ros.runtime.engine import Engine, Float32, Int64
from dcqfa_ros.runtime.guidance import Guidance, Pullback, correct
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
        noisy: what the engine reads: the sample, and behind it the flag channel where the network has one (1.0 for
            known tokens), (batch, tokens, action_dim or action_dim + 1).
        sample: the current sample x, (batch, tokens, action_dim), a view of ``noisy``.
        prediction: the noise the engine predicted in it, same shape.
    """

    def __init__(
        self, spec: DiffusionSpec, tokens: int, action_dim: int, *, steps: int | None = None, batch: int = 1
    ) -> None:
        """Prepare ``steps`` denoising steps (default: the spec's) of (batch, tokens, action_dim) chunks.

        Raises:
            ValueError: steps is outside 1..``spec.most_steps``, or batch, tokens or action_dim is below 1.
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
        self.noisy = np.zeros((batch, tokens, action_dim + (spec.prefix > 0)), np.float32)
        self._flags = self.noisy[..., action_dim:]  # (batch, tokens, 0 or 1)
        self.sample, self.prediction = self.noisy[..., :action_dim], np.empty(shape, np.float32)
        self._clean, self._scratch = np.empty(shape, np.float32), np.empty(shape, np.float32)

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.timesteps)

    def step(
        self,
        index: int,
        noise: Float32 | None = None,
        guidance: Guidance | None = None,
        pull: Callable[[Float32], Float32] | None = None,
    ) -> None:
        """Apply update ``index`` to ``sample``, in place, given ``prediction``.

        Args:
            index: denoising step, from 0.
            noise: standard normal z, shape of the sample; ignored where sigma is 0.
            guidance: continuations that correct x0 and eps (DDIM only).
            pull: cotangent of the prediction -> gradient with respect to ``noisy``; guided rows need it.
        """
        c, x, eps, clean, scratch = self.coefficients, self.sample, self.prediction, self._clean, self._scratch
        np.multiply(x, c.from_sample[index], out=clean)
        np.multiply(eps, c.from_noise[index], out=scratch)
        np.add(clean, scratch, out=clean)
        # Not np.clip: its wrapper costs more than the two ufuncs. Both let NaN through, to be refused at the end.
        np.minimum(clean, self._clip, out=clean)
        np.maximum(clean, -self._clip, out=clean)
        if guidance is not None and guidance.corrects:
            sigma = -float(c.from_noise[index])  # sqrt((1 - abar) / abar)
            correct(clean, eps, guidance, sigma, self._clip, self._gradient(index, guidance, pull))
        np.multiply(x if self._ancestral else eps, c.to_direction[index], out=scratch)
        np.multiply(clean, c.to_clean[index], out=x)
        np.add(x, scratch, out=x)
        if noise is not None and c.sigma[index] > 0.0:
            np.multiply(noise, c.sigma[index], out=scratch)
            np.add(x, scratch, out=x)

    def _gradient(self, index: int, guidance: Guidance, pull: Callable[[Float32], Float32] | None) -> Float32 | None:
        """``sqrt(abar) (d x0 / d x)^T [W (Y - x0)]`` of the guided rows, None where there are none.

        x0 is differentiated without its clipping: a clipped action would otherwise feel no guidance.
        """
        if not guidance.needs_pullback:
            return None
        if pull is None:
            raise ValueError("guided continuations need the denoiser's vector-Jacobian product")
        cotangent = np.ascontiguousarray(guidance.guided * (guidance.target - self._clean))
        pulled = pull(cotangent)[..., : cotangent.shape[2]]
        share = self.coefficients.from_noise[index] / self.coefficients.from_sample[index]  # -sqrt(1 - abar)
        gradient: Float32 = np.where(guidance.guided.any(axis=1, keepdims=True), cotangent + share * pulled, 0.0)
        return gradient

    def run(
        self,
        engine: Engine,
        initial_noise: Float32,
        timestep_kv: Float32,
        observation_kv: Float32,
        step_noise: Callable[[int], Float32] | None = None,
        guidance: Guidance | None = None,
        pullback: Pullback | None = None,
    ) -> Float32:
        """Denoise one batch of chunks.

        Args:
            engine: predicts the noise.
            initial_noise: standard normal, (batch, tokens, action_dim).
            timestep_kv: ``engine.timestep_kv(self.timesteps)``, (steps, R, 1, D).
            observation_kv: ``engine.observation_kv(...)``, (batch, R, To, D).
            step_noise: index of a denoising step -> z (batch, tokens, action_dim); DDIM ignores it,
                the others need it.
            guidance: what the chunks continue, over the loop's tokens; None where they continue nothing.
            pullback: the denoiser's vector-Jacobian product; guided rows need it.

        Returns:
            Normalised actions (batch, tokens, action_dim): this loop's buffer, valid until the next call.

        Raises:
            ValueError: a sampler other than DDIM without ``step_noise`` or with a soft or guided continuation, a
                guided one without ``pullback``, or known tokens for a network without their channel.
        """
        if self._stochastic and step_noise is None:
            raise ValueError(f"sampler {self._sampler} needs step_noise")
        self._begin(initial_noise, guidance)
        for index in range(len(self.timesteps)):
            step_kv = timestep_kv[index : index + 1]
            self._hold(guidance)
            engine.denoise(self.noisy, step_kv, observation_kv, self.prediction)
            pull = None if pullback is None else _bind(pullback, self.noisy, step_kv, observation_kv)
            if self._stochastic and step_noise is not None and self.coefficients.sigma[index] > 0.0:
                self.step(index, step_noise(index), guidance, pull)
            else:
                self.step(index, None, guidance, pull)
        self._hold(guidance)
        return self.sample

    def _begin(self, initial_noise: Float32, guidance: Guidance | None) -> None:
        np.copyto(self.sample, initial_noise)
        self._flags[...] = 0.0
        if guidance is None:
            return
        if guidance.corrects and self._sampler != "ddim":
            raise ValueError(f"soft and guided continuations are defined for sampler ddim, not for {self._sampler}")
        if guidance.clean.any():
            if not self._flags.size:
                raise ValueError("known tokens need a network with their flag channel (diffusion.prefix above 0)")
            np.copyto(self._flags, guidance.clean)

    def _hold(self, guidance: Guidance | None) -> None:
        """Overwrite the tokens that are known."""
        if guidance is not None:
            np.copyto(self.sample, guidance.target, where=guidance.clean)


def _bind(
    pullback: Pullback, noisy: Float32, timestep_kv: Float32, observation_kv: Float32
) -> Callable[[Float32], Float32]:
    return lambda cotangent: pullback.pull(noisy, timestep_kv, observation_kv, cotangent)
