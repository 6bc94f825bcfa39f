"""The task of a policy network in training: tell the noise in actions, given observations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dcqfa_ros.runtime.schedule import alphas_cumprod, squared_cosine_betas
from training.config import TrainConfig
from training.data.policy_data import Batch


class Objective:
    """Forward process of a configuration on one device, and the prediction of its noise in the run's precision.

    Attributes:
        signal, sigma: (time steps,) float32, shares of action and noise at every time step.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Tabulate the forward process of ``config.diffusion`` on ``device``."""
        self.device = device
        self._autocast = config.run.precision == "bf16"
        abar = alphas_cumprod(squared_cosine_betas(config.diffusion.train_timesteps))
        self.signal = torch.tensor(np.sqrt(abar), dtype=torch.float32, device=device)
        self.sigma = torch.tensor(np.sqrt(1.0 - abar), dtype=torch.float32, device=device)

    def noisy(self, batch: Batch) -> Tensor:
        """Actions with noise of their time steps, as the network reads them; see :meth:`conditioned`."""
        signal, sigma = self.signal[batch.timesteps], self.sigma[batch.timesteps]
        return conditioned(signal[:, None, None] * batch.action + sigma[:, None, None] * batch.noise, batch)

    def autocast(self) -> torch.autocast:
        """Context of the run's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)

    def predict(self, network: Callable[..., Tensor], noisy: Tensor, batch: Batch) -> Tensor:
        """Noise (B, H, Da) that ``network`` predicts, in the run's precision."""
        with self.autocast():
            return network(noisy, batch.timesteps, batch.observation)

    def loss(self, network: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Mean squared error () float32 of the noise that ``network`` predicts in ``batch``.

        Where leading tokens are known it is taken over the others, every sample counting alike.
        """
        predicted = self.predict(network, self.noisy(batch), batch).float()
        if batch.prefix is None:
            return torch.nn.functional.mse_loss(predicted, batch.noise)
        open_tokens = ~known_tokens(batch)
        error = torch.nn.functional.mse_loss(predicted, batch.noise, reduction="none").mean(-1)
        return ((error * open_tokens).sum(1) / open_tokens.sum(1)).mean()


def known_tokens(batch: Batch) -> Tensor:
    """Which action tokens are known, (B, H) bool."""
    tokens = torch.arange(batch.action.shape[1], device=batch.action.device)
    if batch.prefix is None:
        return torch.zeros_like(tokens, dtype=torch.bool).expand(len(batch.action), -1)
    return tokens < batch.prefix[:, None]


def conditioned(sample: Tensor, batch: Batch) -> Tensor:
    """A sample of actions (B, H, Da) as the network reads it.

    Where the policy takes known tokens they are replaced by the clean actions and a last channel flags them,
    (B, H, Da + 1); otherwise it is read as it is.
    """
    if batch.prefix is None:
        return sample
    known = known_tokens(batch)[..., None]
    return torch.cat([torch.where(known, batch.action, sample), known.to(sample.dtype)], dim=-1)
