"""A trained policy read back from a run folder or checkpoint: its EMA network, normalisers and meaning."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dcqfa_ros.bundle.schema import BundleSpec, NormalizerSpec
from training.checkpoint import CHECKPOINT, CheckpointError, load_checkpoint
from training.config import TrainConfig
from training.policies.diffusion_policy_t import DiffusionPolicyT


@dataclass(frozen=True, slots=True)
class TrainedPolicy:
    """The full-precision policy of a checkpoint (EMA weights, evaluation mode, no gradients, CPU)."""

    config: TrainConfig
    network: DiffusionPolicyT
    shapes: dict[str, tuple[int, ...]]  # per observation key, one time step, in concatenation order
    observation_norms: dict[str, NormalizerSpec]
    action_norm: NormalizerSpec
    train_episodes: int
    step: int
    path: Path

    @property
    def tokens(self) -> int:
        """Action tokens that synchronous execution needs: up to the last executed action."""
        return self.config.policy.observation_horizon - 1 + self.config.executed_actions


def load_trained(path: Path) -> TrainedPolicy:
    """Read the policy of a run folder or of one checkpoint file.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or does not hold a complete policy.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    payload = load_checkpoint(file)
    try:
        config = TrainConfig.model_validate_json(json.dumps(payload["config"]), strict=True)
        network = DiffusionPolicyT(config.policy)
        network.load_state_dict(payload["ema"])
        network.requires_grad_(False).eval()
        return TrainedPolicy(
            config=config,
            network=network,
            shapes={key: tuple(shape) for key, shape in payload["shapes"].items()},
            observation_norms={key: _normalizer(spec) for key, spec in payload["observation_norms"].items()},
            action_norm=_normalizer(payload["action_norm"]),
            train_episodes=int(payload["train_episodes"]),
            step=int(payload["step"]),
            path=file,
        )
    except KeyError as error:
        raise CheckpointError(f"{file}: field {error} is missing; it is no checkpoint of this version") from error
    except (ValidationError, RuntimeError) as error:  # torch reports a state that does not fit as RuntimeError
        raise CheckpointError(f"{file}: the stored policy cannot be rebuilt ({error})") from error


def _normalizer(document: dict[str, Any]) -> NormalizerSpec:
    return NormalizerSpec.model_validate_json(json.dumps(document), strict=True)


def specification_fields(policy: TrainedPolicy) -> dict[str, Any]:
    """Fields of :class:`BundleSpec` that follow from training alone: everything but the variants and their default."""
    config, data = policy.config, policy.config.data
    observations = {
        key: {
            "type": "low_dim",
            "shape": list(policy.shapes[key]),
            "dtype": "float32",
            "units": source.units,
            "frame": source.frame,
            "history": config.policy.observation_horizon,
            "rate_hz": data.rate_hz,
            "max_age_ms": source.max_age_ms,
            "normalizer": policy.observation_norms[key].model_dump(mode="json"),
        }
        for key, source in data.observations.items()
    }
    action = data.action
    return {
        "schema_version": 1,
        "name": config.name,
        "task": config.task,
        "backbone": "diffusion_policy_t",
        "license": config.license,
        "observations": observations,
        "action": {
            **action.model_dump(mode="json", exclude={"array", "columns"}),
            "rate_hz": data.rate_hz,
            "horizon": config.policy.horizon,
            "first_executed": config.policy.observation_horizon - 1,
            "executed": config.executed_actions,
            "normalizer": policy.action_norm.model_dump(mode="json"),
        },
        "diffusion": {
            "train_timesteps": config.diffusion.train_timesteps,
            "beta_schedule": "squared_cosine",
            "prediction": "epsilon",
            "clip_sample": config.diffusion.clip_sample,
            "sampler": config.diffusion.sampler,
            "steps": config.diffusion.steps,
        },
        "training": {
            "data": Path(data.path).name,
            "episodes": policy.train_episodes,
            "split": f"{policy.train_episodes} training episodes; validation ratio {data.validation_ratio}, "
            f"seed {data.split_seed}",
            "steps": policy.step,
            "batch": config.run.batch,
            "seed": config.run.seed,
            "command": f"dcqfa train --config config/training/{config.name}.yaml --data {Path(data.path).name} "
            f"--steps {config.run.steps}",
        },
    }


def unexported_specification(policy: TrainedPolicy) -> BundleSpec:
    """The specification of a policy that has no exported variant yet, for running it on the training-side engine.

    Every field but ``variants`` is validated; a bundle on disk must hold at least one variant, a checkpoint has none.
    """
    fields = specification_fields(policy)
    validated: dict[str, Any] = {}
    for name, value in fields.items():
        annotation = BundleSpec.model_fields[name]
        adapter: TypeAdapter[Any] = TypeAdapter(annotation.rebuild_annotation())
        validated[name] = adapter.validate_json(json.dumps(value), strict=True)
    return BundleSpec.model_construct(**validated, default_variant="checkpoint", variants=())
