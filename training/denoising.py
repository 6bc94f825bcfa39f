"""The sampler's update on tensors, where gradients are wanted or a network is at hand in place of an engine."""

from __future__ import annotations

from torch import Tensor

from dcqfa_ros.bundle.schema import DiffusionSpec
from dcqfa_ros.runtime.denoising import SamplerCoefficients


class SamplerUpdate:
    """What :meth:`dcqfa_ros.runtime.denoising.DenoisingLoop.step` does to a sample, without guidance.

    Attributes:
        timesteps: noise levels visited, (steps,) int64.
        sigma: standard deviation of the fresh noise of every update, (steps,) float32; 0 for DDIM.
    """

    def __init__(self, spec: DiffusionSpec, steps: int) -> None:
        """Compute the coefficients of ``steps`` denoising steps.

        Raises:
            ValueError: ``steps`` is outside 1..``spec.most_steps``.
        """
        self._coefficients = SamplerCoefficients.of(spec, steps)
        self._ancestral, self._limit = spec.sampler == "ddpm", spec.clip_sample
        self.timesteps, self.sigma = self._coefficients.timesteps, self._coefficients.sigma

    def __call__(self, x: Tensor, noise: Tensor, index: int, fresh: Tensor | None = None) -> Tensor:
        """Return the sample after update ``index``.

        Args:
            x: sample (B, T, Da) before it.
            noise: the noise that was predicted in it, same shape.
            index: denoising step, from 0.
            fresh: standard normal noise, same shape; wanted where ``sigma[index]`` is above 0.
        """
        c = self._coefficients
        clean = float(c.from_sample[index]) * x + float(c.from_noise[index]) * noise
        clean = clean.clamp(-self._limit, self._limit)
        x = float(c.to_clean[index]) * clean + float(c.to_direction[index]) * (x if self._ancestral else noise)
        return x if fresh is None else x + float(c.sigma[index]) * fresh
