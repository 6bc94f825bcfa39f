"""Distance of the subnets of a trained DiffusionPolicy-T to its full-precision teacher on fixed held-out samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.config import TrainConfig, override
from training.data.policy_data import PolicyData
from training.objective import Objective
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.search.distance import DistanceError, SubnetDistance
from training.supernet_checkpoint import TrainedSupernet, load_supernet
from training.warm_start import policy_beside, read_policy_weights, state_sha256

SAMPLE_SEED = 50_000_017  # fixed windows, noise and time steps: every subnet is measured on the same
SAMPLES = 256
VERSION = 1  # raised when the same weights would give other distances: those that are kept are then measured anew


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


class TeacherDistance(SubnetDistance):
    """The distance of a run's subnets to the full-precision policy on its held-out data, over the executed actions.

    Attention is causal, so tokens behind the executed ones change nothing and are left out.

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
