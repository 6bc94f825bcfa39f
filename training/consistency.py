"""Consistency distillation: one network that maps actions of any noise level to clean ones in a step or a few.

Sources: Song et al. 2023 (consistency models, algorithm 2), Luo et al. 2023 (latent consistency models: discrete
variance-preserving schedule, one DDIM step of the teacher over several time steps, boundary condition), Prasad et al.
2024 (the same for visuomotor policies), Song and Dhariwal 2023 (pseudo-Huber loss). The student goes on predicting
noise, so that network, graphs and engines stay those of the policy that is distilled; what makes a consistency function
of it is in :func:`dcqfa_ros.runtime.schedule.consistency_boundary`, which the robot's sampler uses too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcqfa_ros.runtime.schedule import consistency_boundary
from training.config import ConfigError, ConsistencyConfig
from training.data.policy_data import Batch
from training.objective import conditioned, known_tokens
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.trainer import Trainer


class ConsistencyTrainer(Trainer):
    """Distills the policy that ``warm_start`` names.

    Attributes:
        teacher: the policy, frozen.
        target: moving average of the trained network, faster than ``ema``, that the loss compares with.
    """

    def _prepare(self) -> None:
        config = self.config
        if config.consistency is None or self.start is None:
            raise ConfigError(f"training configuration {config.name!r}: consistency: the section is missing")
        if self.start.prefix == 0 and config.policy.prefix:
            raise ConfigError(
                f"training configuration {config.name!r}: policy.prefix is {config.policy.prefix}, but the policy of "
                "warm_start, which is distilled, takes no known tokens; fine-tune it with that prefix first, or set 0"
            )
        self.options: ConsistencyConfig = config.consistency
        self.teacher, self.target = (DiffusionPolicyT(config.policy).to(self.device) for _ in range(2))
        for network in (self.teacher, self.target):
            network.load_state_dict(self.start.state)
            network.requires_grad_(False).eval()
        compiled = torch.compile if config.run.compile else lambda network: network
        self._run_teacher: Callable[..., Tensor] = compiled(self.teacher)
        self._run_target: Callable[..., Tensor] = compiled(self.target)
        skip, out = consistency_boundary(np.arange(config.diffusion.train_timesteps))
        self._skip, self._out = (torch.tensor(s, dtype=torch.float32, device=self.device) for s in (skip, out))

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"target": self.target.state_dict()}

    def _load_state(self, payload: dict[str, Any]) -> None:
        super()._load_state(payload)
        self.target.load_state_dict(payload["target"])

    def consistency(self, network: Callable[..., Tensor], sample: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """Clean actions (B, H, Da) float32 that ``network`` maps a sample (B, H, Da) at ``timesteps`` (B,) to."""
        clean = self._clean(sample, self._noise(network, sample, timesteps, batch), timesteps)
        skip, out = (share[timesteps][:, None, None] for share in (self._skip, self._out))
        return skip * sample + out * clean

    def _noise(self, network: Callable[..., Tensor], sample: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        with self.objective.autocast():
            return network(conditioned(sample, batch), timesteps, batch.observation).float()

    def _clean(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, sigma = (share[timesteps][:, None, None] for share in (self.signal, self.sigma))
        return (sample - sigma * noise) / signal

    @torch.no_grad()
    def lower(self, sample: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """One DDIM step of the teacher from the time steps of ``batch`` to those ``skip`` below.

        Returns:
            The sample there (B, H, Da), and its time steps (B,), -1 where it is clean.
        """
        noise = self._noise(self._run_teacher, sample, batch.timesteps, batch)
        limit = self.config.diffusion.clip_sample
        clean = self._clean(sample, noise, batch.timesteps).clamp(-limit, limit)
        timesteps = (batch.timesteps - self.options.skip).clamp(min=-1)
        at = timesteps.clamp(min=0)
        stepped = self.signal[at][:, None, None] * clean + self.sigma[at][:, None, None] * noise
        return torch.where((timesteps < 0)[:, None, None], clean, stepped), timesteps

    def batch_loss(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Pseudo-Huber distance () between the clean actions of ``model`` and of the target one DDIM step below."""
        signal, sigma = (share[batch.timesteps][:, None, None] for share in (self.signal, self.sigma))
        sample = signal * batch.action + sigma * batch.noise
        lower, timesteps = self.lower(sample, batch)
        with torch.no_grad():
            target = self.consistency(self._run_target, lower, timesteps.clamp(min=0), batch)
            limit = self.config.diffusion.clip_sample
            target = torch.where((timesteps < 0)[:, None, None], lower, target.clamp(-limit, limit))
        error = (self.consistency(model, sample, batch.timesteps, batch) - target).square()
        error = error.masked_fill(known_tokens(batch)[..., None], 0.0).sum((1, 2))
        huber = self.options.huber * float(np.sqrt(sample[0].numel()))
        return (torch.sqrt(error + huber**2) - huber).mean()

    def train_step(self) -> float:
        """One optimizer step; returns the loss; see :meth:`Trainer.train_step`."""
        value = super().train_step()
        with torch.no_grad():
            moving: list[Tensor] = list(self.target.parameters())
            torch._foreach_lerp_(moving, self.weights, 1.0 - self.options.target_decay)
        return value
