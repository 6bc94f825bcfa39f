"""A trained policy read back from a run folder or checkpoint: its EMA network, normalisers and meaning."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dcqfa_ros.bundle.provenance import TrainingSegment
from dcqfa_ros.bundle.schema import NormalizerSpec
from training.checkpoint import BASELINE, CHECKPOINT, CheckpointError, load_checkpoint
from training.config import TrainConfig
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.specification import PolicyMeaning


@dataclass(frozen=True, slots=True)
class TrainedPolicy:
    """The full-precision policy of a checkpoint (EMA weights, evaluation mode, no gradients, CPU)."""

    meaning: PolicyMeaning
    network: DiffusionPolicyT
    path: Path

    @property
    def config(self) -> TrainConfig:
        """The configuration it was trained with."""
        return self.meaning.config


def load_trained(path: Path) -> TrainedPolicy:
    """Read the policy of a run folder or of one checkpoint file.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or does not hold a complete policy.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    payload = load_checkpoint(file)
    if BASELINE in payload:
        raise CheckpointError(f"{file}: holds a quantized policy, expected a full-precision one; give its --checkpoint")
    meaning = policy_meaning(file, payload)
    if meaning.config.supernet is not None:
        raise CheckpointError(f"{file}: holds a supernet, expected a single policy; name one of its subnets")
    try:
        network = DiffusionPolicyT(meaning.config.policy)
        network.load_state_dict(payload["ema"])
    except KeyError as error:
        raise CheckpointError(f"{file}: field {error} is missing; it is no checkpoint of this version") from error
    except RuntimeError as error:  # torch reports a state that does not fit as RuntimeError
        raise CheckpointError(f"{file}: the stored policy cannot be rebuilt ({error})") from error
    network.requires_grad_(False).eval()
    return TrainedPolicy(meaning, network, file)


def policy_meaning(file: Path, payload: dict[str, Any]) -> PolicyMeaning:
    """What the inputs and outputs of a checkpoint's network mean.

    Raises:
        CheckpointError: a field is missing or not of the schema.
    """
    try:
        return PolicyMeaning(
            config=TrainConfig.model_validate_json(json.dumps(payload["config"]), strict=True),
            shapes={key: tuple(shape) for key, shape in payload["shapes"].items()},
            observation_norms={key: _normalizer(spec) for key, spec in payload["observation_norms"].items()},
            action_norm=_normalizer(payload["action_norm"]),
            train_episodes=int(payload["train_episodes"]),
            step=int(payload["step"]),
            data_sha256=payload.get("data_sha256"),
            history=segments(payload),
            config_file=payload.get("config_file"),
        )
    except KeyError as error:
        raise CheckpointError(f"{file}: field {error} is missing; it is no checkpoint of this version") from error
    except ValidationError as error:
        raise CheckpointError(f"{file}: the stored policy cannot be rebuilt ({error})") from error


def meaning_document(meaning: PolicyMeaning) -> dict[str, Any]:
    """The part of a checkpoint that :func:`policy_meaning` reads."""
    return {
        "config": meaning.config.model_dump(mode="json"),
        "config_file": meaning.config_file,
        "step": meaning.step,
        "history": [segment.model_dump(mode="json") for segment in meaning.history],
        "data_sha256": meaning.data_sha256,
        "train_episodes": meaning.train_episodes,
        "shapes": {key: list(shape) for key, shape in meaning.shapes.items()},
        "observation_norms": {key: norm.model_dump(mode="json") for key, norm in meaning.observation_norms.items()},
        "action_norm": meaning.action_norm.model_dump(mode="json"),
    }


def segments(payload: dict[str, Any]) -> tuple[TrainingSegment, ...]:
    """The starts and resumes that a checkpoint knows of; none in checkpoints that do not keep them.

    Raises:
        ValidationError: an entry is not of the schema.
    """
    return tuple(
        TrainingSegment.model_validate_json(json.dumps(entry), strict=True) for entry in payload.get("history", ())
    )


def _normalizer(document: dict[str, Any]) -> NormalizerSpec:
    return NormalizerSpec.model_validate_json(json.dumps(document), strict=True)
