"""Distance of a subnet to the full-precision teacher on fixed held-out samples: what a search minimises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcqfa_ros.errors import UserError
from training.config import TrainConfig, override
from training.data.policy_data import PolicyData
from training.objective import Objective
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.subnet import Subnet
from training.supernet_checkpoint import TrainedSupernet, load_supernet
from training.warm_start import policy_beside, read_policy_weights, state_sha256

SAMPLE_SEED = 50_000_017  # fixed windows, noise and time steps: every subnet is measured on the same
SAMPLES = 256
VERSION = 1  # raised when the same weights would give other distances: those that are kept are then measured anew


class DistanceError(UserError):
    """A distance that cannot be measured; the message says what is missing."""


class Measure(Protocol):
    """Measures subnets, in order."""

    def __call__(self, subnets: Sequence[Subnet]) -> Iterator[float]:
        """Distances of ``subnets``, each as soon as it is known."""
        ...


@dataclass(frozen=True, slots=True)
class DistanceSource:
    """Where the networks and samples of a distance come from.

    Attributes:
        checkpoint: file of the supernet.
        config: the run's configuration, with the data's place on this machine.
        samples: windows, with one time step and noise each.
    """

    checkpoint: Path
    config: TrainConfig
    samples: int = SAMPLES


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """Everything that another process needs to measure the same distances, as arrays; no file is read there.

    Attributes:
        policy: architecture of the supernet.
        state: its averaged weights by name.
        noisy: (N, T, Da) float32, actions with noise.
        timesteps: (N,) int64.
        observation: (N, To, Do) float32.
        target: (N, T - first, Da) float32, the teacher's noise.
        first: tokens that are of the past.
    """

    policy: DiffusionPolicyTConfig
    state: Mapping[str, NDArray[Any]]
    noisy: NDArray[np.float32]
    timesteps: NDArray[np.int64]
    observation: NDArray[np.float32]
    target: NDArray[np.float32]
    first: int

    def unpacked(self) -> SubnetDistance:
        """The distance, with memory of its own: what arrived may be read-only and shared."""
        network = ElasticDiffusionPolicyT(self.policy)
        network.load_state_dict({name: torch.tensor(value) for name, value in self.state.items()})
        network.requires_grad_(False).eval()
        arguments = (torch.tensor(self.noisy), torch.tensor(self.timesteps), torch.tensor(self.observation))
        return SubnetDistance(network, arguments, torch.tensor(self.target), self.first)


class SubnetDistance:
    """Mean squared difference between the noise that a subnet and the teacher predict, over the executed actions.

    Both run in float32. Attention is causal, so tokens behind the executed ones change nothing and are left out.

    Attributes:
        network: that subnets are activated in.
    """

    def __init__(
        self, network: ElasticDiffusionPolicyT, arguments: tuple[Tensor, Tensor, Tensor], target: Tensor, first: int
    ) -> None:
        """Take the network and the samples.

        Args:
            network: the supernet, in evaluation mode.
            arguments: (N, T, Da) float32 noisy actions, (N,) int64 time steps, (N, To, Do) float32 observations.
            target: (N, T - first, Da) float32, the teacher's noise.
            first: tokens that are of the past.
        """
        self.network = network
        self._arguments, self._target, self._first = arguments, target, first

    def distance(self, subnet: Subnet) -> float:
        """Distance of one subnet."""
        self.network.activate(subnet)
        with torch.inference_mode():
            predicted = self.network(*self._arguments)[:, self._first :]
            return float(torch.nn.functional.mse_loss(predicted, self._target))

    def __call__(self, subnets: Sequence[Subnet]) -> Iterator[float]:
        """Distances of ``subnets``, one after the other."""
        return (self.distance(subnet) for subnet in subnets)

    def parcel(self) -> Parcel:
        """The same for another process."""
        state = {name: value.numpy() for name, value in self.network.state_dict().items()}
        noisy, timesteps, observation = (tensor.numpy() for tensor in self._arguments)
        return Parcel(self.network.config, state, noisy, timesteps, observation, self._target.numpy(), self._first)


class TeacherDistance(SubnetDistance):
    """The distance of a run's subnets on its held-out data.

    Attributes:
        supernet: the network that subnets are activated in.
        key: what the distances depend on.
    """

    def __init__(self, source: DistanceSource, supernet: TrainedSupernet | None = None) -> None:
        """Read networks and data, draw the samples and run the teacher on them.

        Raises:
            UserError: a file is missing or damaged, or does not belong to the run.
        """
        self.supernet = supernet or load_supernet(source.checkpoint)
        meaning, config = self.supernet.meaning, source.config
        assert config.supernet is not None
        weights = read_policy_weights(policy_beside(source.checkpoint, config.supernet.warm_start), config.policy)
        if self.supernet.teacher_sha256 not in (None, weights.sha256):
            raise DistanceError(
                f"{source.checkpoint}: was trained with another teacher than {weights.path}; restore that one "
                "(supernet.warm_start of its configuration)"
            )
        data = PolicyData(override(config, run={"precision": "fp32"}))
        if meaning.data_sha256 not in (None, data.sha256):
            raise DistanceError(
                f"{config.data.path}: not the demonstrations that {source.checkpoint} was trained on; give those with "
                "--data"
            )
        if not len(data.held_out):
            raise DistanceError(
                f"{source.checkpoint}: the run holds no episode out (data.validation_ratio), so no subnet can be judged"
            )
        tokens = config.policy.observation_horizon - 1 + config.executed_actions
        first = config.policy.observation_horizon - 1  # actions before it are of the past
        batch = data.draw(data.held_out, SAMPLE_SEED, source.samples)
        noisy = Objective(data.config, torch.device("cpu")).noisy(batch)[:, :tokens].contiguous()
        arguments = (noisy, batch.timesteps, batch.observation)
        teacher = DiffusionPolicyT(config.policy)
        teacher.load_state_dict(weights.state)
        with torch.inference_mode():
            target = teacher.eval()(*arguments)[:, first:].contiguous()
        super().__init__(self.supernet.network, arguments, target, first)
        self.key: dict[str, Any] = {
            "version": VERSION,
            "network": state_sha256(self.supernet.network.state_dict()),
            "teacher": weights.sha256,
            "data": data.sha256,
            "samples": source.samples,
            "seed": SAMPLE_SEED,
            "tokens": [first, tokens],
        }
