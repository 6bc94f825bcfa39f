"""How far a quantized policy is from the full-precision one on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.baselines.bits import BaselineError
from training.baselines.network import observed, plain_linears
from training.data.policy_data import PolicyData
from training.objective import Objective
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.quant.calibrate import InputGroup
from training.search.teacher_distance import SAMPLE_SEED, SAMPLES
from training.trained import TrainedPolicy


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Fixed held-out samples and what the full-precision policy says of them: those of a search's distances.

    Attributes:
        teacher: the full-precision network.
        arguments: (N, T, Dn) noisy actions, (N,) time steps, (N, To, input_dim) observations.
        target: (N, T - first, Da), the teacher's noise in the executed actions.
        first: tokens that are of the past.
    """

    teacher: DiffusionPolicyT
    arguments: tuple[Tensor, Tensor, Tensor]
    target: Tensor
    first: int

    def distance(self, network: nn.Module) -> float:
        """Mean squared difference between the noise that ``network`` and the teacher predict."""
        return float(self.distances(network).mean())

    def distances(self, network: nn.Module) -> Tensor:
        """:meth:`distance` of every sample (N,)."""
        with torch.inference_mode():
            return (network(*self.arguments)[:, self.first :] - self.target).square().mean((1, 2))

    def between(self, one: nn.Module, other: nn.Module) -> float:
        """Mean squared difference between the noise that two networks predict."""
        with torch.inference_mode():
            first, second = (network(*self.arguments)[:, self.first :] for network in (one, other))
            return float(nn.functional.mse_loss(first, second))

    def block_errors(self, network: DiffusionPolicyT) -> list[float]:
        """Relative squared error of the residual stream behind every block, errors of earlier blocks included."""
        ours, theirs = (_streams(n, self.arguments) for n in (network, self.teacher))
        pairs = zip(ours, theirs, strict=True)
        return [float((one - other).square().sum() / other.square().sum()) for one, other in pairs]

    def layer_errors(self, network: DiffusionPolicyT) -> dict[str, float]:
        """Relative squared error of every plain linear's output, each at the full-precision network's own inputs."""
        linears, errors = plain_linears(network), {}

        def observe(group: InputGroup, x: Tensor) -> None:
            for name in group.linears:
                original = self.teacher.get_submodule(name)
                assert isinstance(original, nn.Linear)
                errors[name] = linears[name].output_error(original, x)

        with torch.inference_mode(), observed(self.teacher, observe):
            self.teacher(*self.arguments)
        return errors


def held_out(policy: TrainedPolicy, data: PolicyData, samples: int = SAMPLES) -> HeldOut:
    """Draw the samples and run the full-precision policy on them.

    Raises:
        BaselineError: the run holds no episode out.
    """
    config = policy.config
    if not len(data.held_out):
        raise BaselineError(
            f"{policy.path}: the run holds no episode out (data.validation_ratio), so no distance can be measured"
        )
    first = config.policy.observation_horizon - 1
    tokens = first + config.executed_actions
    batch = data.draw(data.held_out, SAMPLE_SEED, samples)
    noisy = Objective(data.config, torch.device("cpu")).noisy(batch)[:, :tokens].contiguous()
    arguments = (noisy, batch.timesteps, batch.observation)
    with torch.inference_mode():
        target = policy.network(*arguments)[:, first:].clone()
    return HeldOut(policy.network, arguments, target, first)


def quality(measure: HeldOut, network: DiffusionPolicyT, aligned: bool = True) -> dict[str, Any]:
    """Figures for a report.

    Args:
        measure: the samples.
        network: quantized.
        aligned: its linears are those of the teacher; False where it was trained on and its heads and hidden channels
            stand in another order, so that layers cannot be compared one by one.
    """
    distance = measure.distance(network)
    layers: Mapping[str, float] = measure.layer_errors(network) if aligned else {}
    return {
        "distance": distance,
        "distance_samples": len(measure.target),
        "teacher_power": float(measure.target.square().mean()),
        "block_error": measure.block_errors(network),
        "layer_error": dict(layers) or None,
    }


def _streams(network: DiffusionPolicyT, arguments: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Outputs (N, T, dim) of the blocks."""
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _a, out: found.append(out)) for block in network.decoder_blocks()]
    try:
        with torch.inference_mode():
            network(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found
