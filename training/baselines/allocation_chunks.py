"""Chunks of the calibration sampled from fixed noise, with gradients: what allocations measure damage on."""

from __future__ import annotations

import torch
from torch import Tensor

from dcqfa_ros.runtime.noise import step_noise
from training.baselines.calibration import Calibration
from training.denoising import SamplerUpdate
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.trained import TrainedPolicy

OBSERVATIONS = 64  # on which the error of a whole network is told


class CalibrationSampler:
    """The policy's sampler in PyTorch, from the noise of the calibration.

    Attributes:
        reference: (N, executed, Da) float32, the full-precision policy's executed actions, normalised.
        steps: denoising steps.
    """

    def __init__(self, policy: TrainedPolicy, calibration: Calibration) -> None:
        """Sample as ``policy`` does, from the noise of ``calibration``."""
        spec = policy.meaning.specification().diffusion
        self.reference = calibration.chunk[:, calibration.first :]
        self.steps = spec.steps
        self._update = SamplerUpdate(spec, spec.steps)
        self._calibration = calibration
        self._shape = (policy.config.policy.horizon, policy.config.policy.action_dim)

    def __call__(self, network: DiffusionPolicyT, rows: Tensor) -> Tensor:
        """Executed actions (B, executed, Da), normalised, of calibration ``rows`` (B,) int64, repeated ones too.

        Gradients flow wherever ``network`` lets them. The observation is encoded once per chunk, as a robot does.
        """
        given, update, actions = self._calibration, self._update, self._shape[1]
        flags = given.calls[0].noisy[rows][..., actions:]  # of known tokens, where the policy takes any
        known, clean = flags > 0, given.calls[0].noisy[rows][..., :actions]
        observation_kv = network.observation_keys_values(given.observation[rows])
        x = given.noise[rows]
        for index, timestep in enumerate(update.timesteps.tolist()):
            timestep_kv = network.timestep_keys_values(torch.full((len(rows),), timestep))
            x = torch.where(known, clean, x) if flags.shape[-1] else x
            noise = network.denoise(torch.cat([x, flags], dim=-1), timestep_kv, observation_kv)
            fresh = self._step_noise(rows, index, x.shape[1]) if update.sigma[index] > 0.0 else None
            x = update(x, noise, index, fresh)
        x = torch.where(known, clean, x) if flags.shape[-1] else x
        return x[:, given.first :]

    @torch.no_grad()
    def error(self, network: DiffusionPolicyT, observations: int = OBSERVATIONS) -> float:
        """``E ||A~ - A*||^2`` of a whole quantized network, over the first ``observations`` of the calibration.

        A is the executed chunk, normalised, all of its numbers summed: the unit of QVLA's sensitivities.
        """
        rows = torch.arange(min(observations, len(self.reference)))
        return float((self(network, rows) - self.reference[rows]).square().sum((1, 2)).mean())

    def _step_noise(self, rows: Tensor, index: int, tokens: int) -> Tensor:
        drawn = [step_noise(self._calibration.seed, row, index, self._shape)[:tokens] for row in rows.tolist()]
        return torch.stack([torch.from_numpy(noise) for noise in drawn])
