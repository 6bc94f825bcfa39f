"""A trained supernet read back from a run folder or checkpoint: every subnet of its space, ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from training.checkpoint import CHECKPOINT, CheckpointError, load_checkpoint
from training.compact import COMPACT, averaged_state, sampler_state
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.sandwich import search_space
from training.space import SearchSpace
from training.specification import PolicyMeaning
from training.subnet import Subnet
from training.trained import policy_meaning


@dataclass(frozen=True, slots=True)
class TrainedSupernet:
    """The averaged weights of a supernet's checkpoint (evaluation mode, no gradients, CPU).

    ``teacher_sha256`` is that of the full-precision policy it was trained from, None in checkpoints that do not tell;
    ``sampler`` gives the state of its configuration sampler, from the state of a new one.
    """

    meaning: PolicyMeaning
    network: ElasticDiffusionPolicyT
    space: SearchSpace
    path: Path
    teacher_sha256: str | None
    sampler: Callable[[dict[str, Any]], dict[str, Any]]

    def subnet(self, name: str) -> tuple[Subnet, ElasticDiffusionPolicyT]:
        """The subnet called ``name`` and a stand-alone network of it.

        Raises:
            SpaceError: the name is not one of the space.
        """
        subnet = self.space.parse(name)
        return subnet, self.network.extract(subnet)


def is_supernet(payload: dict[str, Any]) -> bool:
    """Whether a checkpoint's content is a supernet's."""
    config = payload.get("config")
    return isinstance(config, dict) and config.get("supernet") is not None


def load_supernet(path: Path, batch_ranges: bool = False) -> TrainedSupernet:
    """Read the supernet of a run folder or of one checkpoint file.

    Args:
        path: of the run or checkpoint.
        batch_ranges: the caller estimates ranges for every subnet that it runs, where the supernet needs that.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, does not hold a supernet, or holds one that needs ranges.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    payload = load_checkpoint(file)
    if not is_supernet(payload):
        raise CheckpointError(f"{file}: holds a single policy, no supernet; give a run of a supernet configuration")
    meaning = policy_meaning(file, payload)
    network = ElasticDiffusionPolicyT(meaning.config.policy)
    assert meaning.config.supernet is not None
    if meaning.config.supernet.activations == "batchquant":
        if not batch_ranges:
            raise CheckpointError(
                f"{file}: its activation ranges have to be estimated for each subnet (supernet.activations: "
                f"batchquant); make a network of it with 'dcqfa baseline batchquant --trained {path}'"
            )
        network.use_batch_ranges()
    try:
        network.load_state_dict(averaged_state(file, payload, meaning.config))
    except RuntimeError as error:
        raise CheckpointError(f"{file}: the stored supernet cannot be rebuilt ({error})") from error
    network.requires_grad_(False).eval()
    return TrainedSupernet(
        meaning,
        network,
        search_space(meaning.config),
        file,
        payload.get("teacher_sha256"),
        partial(sampler_state, file, {key: payload[key] for key in ("sampler", COMPACT) if key in payload}),
    )
