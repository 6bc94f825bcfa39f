"""Calibration of one subnet after the supernet's training: quantizer steps, layer norms and biases, no weight.

A supernet learns one set of steps per layer and bit width, and one set of norms and biases, which every subnet shares.
What suits all of them is not what suits one. Here those of a subnet that was cut out are learned on for some
iterations, on a few observations, from the full-precision policy's answers: about 1 % of its parameters, in a minute or
two. (Networks with batch normalization are recalibrated for the same reason once they are cut out: Once-for-All,
arXiv:1908.09791; these have none.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dcqfa_ros.errors import UserError
from training.data.policy_data import Batch, PolicyData
from training.nn.elastic import ElasticLinear, InputQuantizer
from training.objective import Objective
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.supernet_checkpoint import TrainedSupernet
from training.warm_start import policy_beside, read_policy_weights

_DIVERGED = "calibration: the distance to the full-precision policy is not finite; leave the calibration out"


class SubnetCalibrationError(UserError, ValueError):
    """A subnet that cannot be calibrated; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How subnets are calibrated.

    Attributes:
        observations: windows of the training episodes, drawn once.
        iterations: of Adam, with a rate that falls to 0 along a cosine.
        batch: draws per iteration, each of one of the observations with a time step and noise of its own.
        learning_rate: of biases, norms and the logarithms of steps.
        seed: of all draws.
    """

    observations: int = 256
    iterations: int = 80
    batch: int = 256
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("observations", "iterations", "batch"):
            if getattr(self, name) < 1:
                raise SubnetCalibrationError(f"calibration, {name}: expected at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise SubnetCalibrationError(f"calibration, learning_rate: expected above 0, got {self.learning_rate}")


class SubnetCalibrator:
    """Calibrates subnets of one supernet, all on the same observations.

    Attributes:
        options: how it is done.
    """

    def __init__(self, supernet: TrainedSupernet, data: PolicyData, options: CalibrationOptions | None = None) -> None:
        """Draw the observations and read the teacher.

        Args:
            supernet: whose subnets are calibrated.
            data: its demonstrations.
            options: how it is done.

        Raises:
            SubnetCalibrationError: the full-precision policy at hand is not the one it was trained from.
            UserError: that policy cannot be read.
        """
        self.options = CalibrationOptions() if options is None else options
        config = supernet.meaning.config
        assert config.supernet is not None
        weights = read_policy_weights(policy_beside(supernet.path, config.supernet.warm_start), config.policy)
        if supernet.teacher_sha256 not in (None, weights.sha256):
            raise SubnetCalibrationError(
                f"{supernet.path}: was trained from another full-precision policy than {weights.path}; restore that "
                "one (supernet.warm_start of its configuration)"
            )
        self._teacher = DiffusionPolicyT(config.policy)
        self._teacher.load_state_dict(weights.state)
        self._teacher.requires_grad_(False).eval()
        self._objective = Objective(config, torch.device("cpu"))
        self._data_sha256 = data.sha256
        self._levels = config.diffusion.levels
        self._pool = data.draw(data.windows, self.options.seed, self.options.observations)

    def calibrate(self, network: ElasticDiffusionPolicyT, progress: Callable[[int], object] = lambda _: None) -> None:
        """Learn steps, norms and biases of a stand-alone subnet, in place; no parameter needs gradients afterwards.

        Args:
            network: as :meth:`TrainedSupernet.subnet` gives it, not frozen for inference.
            progress: called with 1 after every iteration.

        Raises:
            SubnetCalibrationError: the distance to the teacher, or what was learned from it, is not finite; the network
                is then as it was.
        """
        tuned = calibrated_parameters(network)
        before = [parameter.detach().clone() for parameter in tuned]
        generator = torch.Generator().manual_seed(self.options.seed)
        network.requires_grad_(False)
        for parameter in tuned:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(tuned, lr=self.options.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.options.iterations)
        try:
            for _ in range(self.options.iterations):
                distance = self._distance(network, self._draw(generator))
                if not torch.isfinite(distance):
                    raise SubnetCalibrationError(_DIVERGED)
                optimizer.zero_grad()
                distance.backward()
                optimizer.step()
                schedule.step()
                progress(1)
            if not all(torch.isfinite(parameter).all() for parameter in tuned):
                raise SubnetCalibrationError(_DIVERGED)
        except BaseException:
            with torch.no_grad():
                for parameter, value in zip(tuned, before, strict=True):
                    parameter.copy_(value)
            raise
        finally:
            for parameter in tuned:
                parameter.requires_grad_(False)
                parameter.grad = None

    def record(self) -> dict[str, Any]:
        """What a bundle records of a calibration."""
        options = self.options
        learned = f"Adam, {options.iterations} iterations of {options.batch}, rate {options.learning_rate:g}"
        return {
            "samples": options.observations,
            "seed": options.seed,
            "data_sha256": self._data_sha256,
            "method": f"quantizer steps, layer norms and biases from the full-precision policy's answers: {learned}",
        }

    def _draw(self, generator: torch.Generator) -> Batch:
        size = self.options.batch
        index = torch.randint(len(self._pool.index), (size,), generator=generator)
        batch = self._pool.map(lambda values: values[index])
        timesteps = torch.randint(self._levels, (size,), generator=generator)
        return replace(batch, timesteps=timesteps, noise=torch.randn(batch.noise.shape, generator=generator))

    def _distance(self, network: ElasticDiffusionPolicyT, batch: Batch) -> Tensor:
        noisy = self._objective.noisy(batch)
        with torch.no_grad():
            answer = self._objective.predict(self._teacher, noisy, batch).float()
        return nn.functional.mse_loss(self._objective.predict(network, noisy, batch).float(), answer)


def calibrated_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Logarithms of the quantizers' steps, scales and shifts of the layer norms, and biases of all linears."""
    found = []
    for module in network.modules():
        if isinstance(module, ElasticLinear | InputQuantizer):
            found.append(module.log_step)
        if isinstance(module, nn.LayerNorm):
            found.append(module.weight)
        if isinstance(module, nn.Linear | nn.LayerNorm):
            found.append(module.bias)
    return found
