"""The training steps that ``dcqfa bench train`` compares: the plain policy's and the supernet's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.config import TrainConfig
from training.data.policy_data import Batch
from training.losses.sqil import sqil_loss
from training.nn.elastic_policy import clone
from training.objective import Objective
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.quant.elastic_calibration import calibrate_inputs, calibrate_weights
from training.shared_stem import SharedStem
from training.subnet import Subnet

EMA_DECAY = 0.999
SEED = 0


class PlainContender:
    """The plain policy's training step, as ``training.trainer`` does it."""

    def __init__(self, config: TrainConfig, objective: Objective, compile_step: bool) -> None:
        """Make network, average and optimizer, with random weights."""
        torch.manual_seed(SEED)
        self.objective, self._clip = objective, config.optimizer.clip_norm
        self.model = DiffusionPolicyT(config.policy).to(objective.device).train()
        self._forward: Callable[..., Tensor] = torch.compile(self.model) if compile_step else self.model
        averaged = DiffusionPolicyT(config.policy).to(objective.device)
        averaged.load_state_dict(self.model.state_dict())
        self._averaged: list[Tensor] = list(averaged.requires_grad_(False).parameters())
        self._parameters = list(self.model.parameters())
        self._weights: list[Tensor] = list(self._parameters)
        self._optimizer = _adamw(config, self._parameters, [])

    def step(self, batch: Batch) -> None:
        """Do one optimizer step."""
        loss = self.objective.loss(self._forward, batch)
        loss.item()  # checked before the update
        loss.backward()
        _update(self._optimizer, [self._parameters], self._clip, self._averaged, self._weights)


class SupernetContender:
    """The supernet's training step, as ``training.supernet`` does it, in parts that can be timed one by one."""

    def __init__(self, config: TrainConfig, objective: Objective, compile_step: bool, sample: Batch) -> None:
        """Make network, average, teacher and optimizer with random weights; calibrate on ``sample``."""
        assert config.supernet is not None
        torch.manual_seed(SEED)
        self.objective, self._clip = objective, config.optimizer.clip_norm
        teacher = DiffusionPolicyT(config.policy).to(objective.device).requires_grad_(False).eval()
        self._teacher: Callable[..., Tensor] = torch.compile(teacher) if compile_step else teacher
        self.model = ElasticDiffusionPolicyT(config.policy)
        self.model.load_state_dict(teacher.state_dict(), strict=False)  # the quantizers' steps are not among them
        self.model.to(objective.device).eval()
        calibrate_weights(self.model)
        with torch.no_grad():
            calibrate_inputs(self.model, [(objective.noisy(sample), sample.timesteps, sample.observation)])
        averaged = clone(self.model)
        if compile_step:
            self.model.compile_parts()
        named = list(self.model.named_parameters())
        self._parameters = [p for n, p in named if not n.endswith("log_step")]
        self._steps = [p for n, p in named if n.endswith("log_step")]
        self._weights: list[Tensor] = list(self.model.parameters())
        self._averaged: list[Tensor] = list(averaged.parameters())
        self._optimizer = _adamw(config, self._parameters, self._steps)

    @torch.no_grad()
    def teach(self, batch: Batch) -> Tensor:
        """Noise (B, H, Da) that the teacher predicts."""
        return self.objective.predict(self._teacher, self.objective.noisy(batch), batch).float()

    def begin(self, batch: Batch) -> SharedStem:
        """Forward pass of what all networks of a step share; its ``backward`` comes after theirs."""
        return SharedStem(self.model, self.objective, self.objective.noisy(batch), batch)

    def learn(
        self, subnet: Subnet, stem: SharedStem, batch: Batch, teacher: Tensor, alpha: Tensor, *, dropout: bool = False
    ) -> None:
        """Forward and backward of one network; gradients add up until :meth:`update`."""
        self.model.activate(subnet)
        self.model.train(dropout)
        predicted = stem.predict(len(batch.index))
        total, task, _ = sqil_loss(predicted, teacher, batch.noise, alpha)
        total.backward()
        task.item()

    def update(self) -> None:
        """Clip, step, average."""
        _update(self._optimizer, [self._parameters, self._steps], self._clip, self._averaged, self._weights)

    @torch.no_grad()
    def infer(self, subnet: Subnet, batch: Batch, *, autocast: bool = False) -> None:
        """Forward pass in evaluation mode, in float32 or, with ``autocast``, in the run's precision."""
        self.model.activate(subnet)
        self.model.eval()
        if autocast:
            self.objective.predict(self.model, batch.action, batch)
        else:
            self.model(batch.action, batch.timesteps, batch.observation)


def _adamw(config: TrainConfig, parameters: Sequence[Tensor], steps: Sequence[Tensor]) -> torch.optim.AdamW:
    opt = config.optimizer
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": opt.weight_decay},
        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
    ]
    if steps:
        assert config.supernet is not None
        groups.append({"params": list(steps), "weight_decay": 0.0, "lr": config.supernet.step_learning_rate})
    return torch.optim.AdamW(groups, lr=opt.learning_rate, betas=opt.betas, fused=True)


def _update(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Sequence[Tensor]],
    clip: float,
    averaged: list[Tensor],
    weights: list[Tensor],
) -> None:
    for group in groups:
        torch.nn.utils.clip_grad_norm_(group, clip).item()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        torch._foreach_lerp_(averaged, weights, 1.0 - EMA_DECAY)


def random_batch(config: TrainConfig, size: int, device: torch.device, seed: int = SEED) -> Batch:
    """Made-up windows of a policy's shapes, normalised."""
    policy, generator = config.policy, torch.Generator().manual_seed(seed)
    action = (size, policy.horizon, policy.action_dim)
    return Batch(
        torch.rand((size, policy.observation_horizon, policy.input_dim), generator=generator) * 2 - 1,
        torch.rand(action, generator=generator) * 2 - 1,
        torch.randint(config.diffusion.train_timesteps, (size,), generator=generator),
        torch.randn(action, generator=generator),
        torch.arange(size),
        torch.randint(policy.prefix + 1, (size,), generator=generator) if policy.prefix else None,
    ).to(device)
