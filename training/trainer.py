"""Training of the full-precision policy by denoising score matching.

It starts from random weights or from those of another policy; with ``policy.prefix`` it is trained for real-time
chunking (Black et al. 2025, training-time action conditioning): leading action tokens stay clean, as many as are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.config import TrainConfig
from training.data.policy_data import Batch
from training.held_out import held_out_loss
from training.moments import load_moments
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.run import Record, TrainingError, TrainingRun
from training.schedules import step_seed
from training.warm_start import PolicyWeights, read_policy_weights, state_sha256

__all__ = ["Trainer", "TrainingError"]

HELD_OUT_PREFIXES = (0, 1, 3, 5, 8)  # lengths of known prefixes that held-out losses are told for


class Trainer(TrainingRun):
    """One full-precision training run.

    Attributes:
        model: the trained network.
        ema: its exponential moving average, which is what is exported.
        start: the weights it started from, None for random ones.
    """

    other_facts = MappingProxyType({"warm_start_sha256": "warm_start"})

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        resume: bool = True,
        *,
        change: Collection[str] = (),
        config_file: str | None = None,
    ) -> None:
        """Read the data, build the network and continue from the folder's checkpoint where there is one.

        Args:
            config: the run.
            folder: where it is kept.
            resume: continue from the folder's checkpoint.
            change: fields that may differ from the checkpoint's; see :data:`training.run.CHANGEABLE`.
            config_file: name, without folder, of the YAML file that ``config`` comes from, for the record.

        Raises:
            DataError: the data set cannot be used or does not fit the policy.
            ConfigError: the configuration does not describe a policy that a bundle can hold, or its action normaliser
                leaves the range that the sampler keeps.
            CheckpointError: the folder's checkpoint is damaged or belongs to another configuration, other data or
                another policy to start from.
            BundleError: the bundle to start from is damaged.
            WarmStartError: the policy to start from is another one than ``config`` describes.
            WorldError: the batch does not divide among the processes.
        """
        super().__init__(config, folder, config_file=config_file)
        self.world.check_batch("run.batch", config.run.batch)
        self.start: PolicyWeights | None = None
        if config.warm_start is not None:
            self.start = read_policy_weights(Path(config.warm_start), config.policy)
            self.start.check_normalizers(self.data.observation_norms, self.data.action_norm)
        torch.manual_seed(config.run.seed)
        self.model = DiffusionPolicyT(config.policy).to(self.device)
        if self.start is not None:
            self.model.load_state_dict(self.start.state)
        self.forward: Callable[..., Tensor] = torch.compile(self.model) if config.run.compile else self.model
        self.ema = DiffusionPolicyT(config.policy).to(self.device)
        self.ema.load_state_dict(self.model.state_dict())
        self.ema.requires_grad_(False).eval()
        self.parameters = list(self.model.parameters())
        self.weights: list[Tensor] = list(self.parameters)
        self.averaged: list[Tensor] = list(self.ema.parameters())
        opt = config.optimizer
        decay = [p for p in self.parameters if p.ndim == 2]
        plain = [p for p in self.parameters if p.ndim != 2]  # biases, norms and position embeddings are not decayed
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": opt.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=opt.learning_rate,
            betas=opt.betas,
            fused=True,
        )
        self._prepare()
        if resume:
            self.resume(change)

    def _prepare(self) -> None:
        """Make what another kind of single-policy run needs besides, before a checkpoint is read."""

    def _facts(self) -> dict[str, Any]:
        start = {} if self.start is None else {"warm_start_sha256": state_sha256(self.start.state)}
        return super()._facts() | start

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _load_state(self, payload: dict[str, Any]) -> None:
        self.model.load_state_dict(payload["model"])
        self.ema.load_state_dict(payload["ema"])
        load_moments(self.optimizer, payload["optimizer"])

    def loss(self, model: Callable[..., Tensor], windows: Any, seed: int, batch: int) -> Tensor:
        """Loss in a draw of ``batch`` windows (this process's share of them)."""
        drawn = self.world.share(self.data.draw(windows, seed, batch)).to(self.device)
        return self.batch_loss(model, drawn)

    def batch_loss(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Mean squared error () of the noise that ``model`` predicts in ``batch``."""
        return self.objective.loss(model, batch)

    def train_step(self) -> float:
        """One optimizer step; returns the loss.

        Raises:
            TrainingError: loss or gradient is not finite; nothing was updated.
        """
        config = self.config
        seed = step_seed(config.run.seed, self.step)
        torch.manual_seed(seed + self.world.rank)  # dropout
        self.model.train()
        loss = self.loss(self.forward, self.windows, seed, config.run.batch)
        value = self.world.mean([loss.item()])[0]
        if not np.isfinite(value):
            raise self.diverged("loss", value, config.run.batch)
        loss.backward()
        self.world.average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip_norm).item()
        if not np.isfinite(norm):
            self.optimizer.zero_grad()
            raise self.diverged("gradient norm", norm, config.run.batch)
        factor = self.learning_rate_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average(self.averaged, self.weights)
        self.step += 1
        return value

    def _step(self) -> Record:
        return {"loss": self.train_step(), "lr": float(self.optimizer.param_groups[0]["lr"])}

    def validate(self) -> float:
        """Held-out loss of the EMA network on fixed draws; NaN when no episode is held out."""
        return held_out_loss(self.ema, self.objective, self.data, loss=self.batch_loss, world=self.world)

    def validate_prefixes(self) -> dict[int, float]:
        """:meth:`validate` by the number of leading action tokens known; empty where the policy takes none."""
        longest = self.config.policy.prefix
        lengths = sorted({n for n in HELD_OUT_PREFIXES if n <= longest} | {longest}) if longest else []
        return {
            n: held_out_loss(self.ema, self.objective, self.data, prefix=n, loss=self.batch_loss, world=self.world)
            for n in lengths
        }

    def _validation(self) -> Record:
        by_prefix = {f"held_out/prefix_{n}": loss for n, loss in self.validate_prefixes().items()}
        return {"validation_loss": self.validate(), **by_prefix}
