"""A full-precision policy as other methods start from it: of a training run, or read back out of a bundle."""

from __future__ import annotations

from pathlib import Path

import torch

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.paths import find_bundle
from training.checkpoint import CHECKPOINT
from training.config import TrainConfig
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.specification import PolicyMeaning
from training.trained import TrainedPolicy, load_trained
from training.warm_start import WarmStartError, read_policy_weights, state_sha256


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run folder or a checkpoint, so that it holds its own configuration; else a bundle."""
    return path.suffix == ".pt" or path.is_file() or (path / CHECKPOINT).is_file()


def load_full_precision(path: Path, config: TrainConfig) -> tuple[TrainedPolicy, str]:
    """A full-precision policy and what it is recognised by (:attr:`training.warm_start.PolicyWeights.sha256`).

    Args:
        path: a run folder or checkpoint file, or the folder or name of a bundle.
        config: what a bundle's policy was trained with, which it does not hold; a run has its own.

    Raises:
        UserError: its files are missing or damaged, or a bundle's policy was not trained with ``config``.
    """
    if is_run(path):
        trained = load_trained(path)
        return trained, state_sha256(trained.network.state_dict())
    if config.supernet is not None:
        raise WarmStartError(
            f"training configuration {config.name!r}: is of a supernet; give the one that the policy of {path} was "
            "trained with"
        )
    weights = read_policy_weights(path, config.policy)
    spec = load_bundle(find_bundle(str(path))).spec
    with torch.random.fork_rng(devices=[]):
        network = DiffusionPolicyT(config.policy)
    network.load_state_dict(weights.state)
    network.requires_grad_(False).eval()
    meaning = PolicyMeaning(
        config=config,
        shapes={key: tuple(source.shape) for key, source in spec.observations.items()},
        observation_norms=weights.observation_norms,
        action_norm=weights.action_norm,
        train_episodes=spec.training.episodes,
        step=weights.steps,
        data_sha256=weights.data_sha256,
        history=tuple(spec.training.history),
    )
    _check(path, spec, meaning.specification(), config)
    return TrainedPolicy(meaning, network, path), weights.sha256


def _check(path: Path, spec: BundleSpec, ours: BundleSpec, config: TrainConfig) -> None:
    """Refuse a configuration by which the bundle's policy would be sampled or executed in another way."""
    for field, theirs, mine in (
        ("diffusion", spec.diffusion, ours.diffusion),
        ("action", spec.action, ours.action),
        ("architecture", spec.architecture, ours.architecture),
    ):
        if theirs != mine:
            raise WarmStartError(
                f"{path}: its {field} is not that of the training configuration {config.name!r}; give the one that it "
                "was trained with (--config)"
            )
