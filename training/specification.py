"""What a bundle says about a policy, as far as it follows from training: everything but the exported variants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dcqfa_ros.bundle.provenance import TrainingSegment
from dcqfa_ros.bundle.schema import BundleSpec, NormalizerKind, NormalizerSpec
from training.config import ConfigError, TrainConfig
from training.data.images import IMAGE_OFFSET, IMAGE_SCALE
from training.nn.vision import CHANNELS


@dataclass(frozen=True, slots=True)
class PolicyMeaning:
    """What a network's inputs and outputs mean, and where its weights come from."""

    config: TrainConfig
    shapes: Mapping[str, tuple[int, ...]]  # per observation key, one time step, in concatenation order
    observation_norms: Mapping[str, NormalizerSpec]
    action_norm: NormalizerSpec
    train_episodes: int
    step: int  # optimizer steps behind the weights
    data_sha256: str | None = None  # of the demonstrations as read; None where the checkpoint does not know
    history: tuple[TrainingSegment, ...] = ()
    config_file: str | None = None  # name, without folder, of the YAML file the run was started with

    def fields(self) -> dict[str, Any]:
        """The fields of :class:`BundleSpec` as a JSON-ready document, without ``variants`` and ``default_variant``."""
        config, data = self.config, self.config.data
        return {
            "schema_version": 1,
            "name": config.name,
            "task": config.task,
            "backbone": "diffusion_policy_t",
            "architecture": {
                "depth": config.policy.depth,
                "heads": config.policy.heads,
                "dim": config.policy.dim,
                "ffn_dim": config.policy.ffn_ratio * config.policy.dim,
                "horizon": config.policy.horizon,
            },
            "license": config.license,
            "observations": {key: self._observation(key) for key in data.observations} | self._image(),
            "action": {
                **data.action.model_dump(mode="json", exclude={"array", "columns"}),
                "rate_hz": data.rate_hz,
                "horizon": config.policy.horizon,
                "first_executed": config.policy.observation_horizon - 1,
                "executed": config.executed_actions,
                "normalizer": self.action_norm.model_dump(mode="json"),
            },
            "diffusion": {
                "train_timesteps": config.diffusion.train_timesteps,
                "beta_schedule": "squared_cosine",
                "prediction": "epsilon",
                "clip_sample": config.diffusion.clip_sample,
                "sampler": config.diffusion.sampler,
                "timestep_spacing": "leading",
                "steps": config.diffusion.steps,
                "prefix": config.policy.prefix,
            },
            "training": {
                "data": Path(data.path).name,
                "data_sha256": self.data_sha256,
                "episodes": self.train_episodes,
                "split": f"validation ratio {data.validation_ratio}, seed {data.split_seed}"
                + (f", at most {data.max_train_episodes} training episodes" if data.max_train_episodes else ""),
                "steps": max(1, self.step),
                "planned_steps": config.run.steps,
                "batch": config.run.batch,
                "seed": config.run.seed,
                "command": f"dcqfa train --config {self.config_file or config.name} --data {Path(data.path).name} "
                f"--steps {config.run.steps}",
                "history": [segment.model_dump(mode="json") for segment in self.history],
            },
        }

    def _observation(self, key: str) -> dict[str, Any]:
        source = self.config.data.observations[key]
        return {
            "type": "low_dim",
            "shape": list(self.shapes[key]),
            "names": list(source.names),
            "dtype": "float32",
            "units": source.units,
            "frame": source.frame,
            "history": self.config.policy.observation_horizon,
            "rate_hz": self.config.data.rate_hz,
            "max_age_ms": source.max_age_ms,
            "normalizer": self.observation_norms[key].model_dump(mode="json"),
        }

    def _image(self) -> dict[str, dict[str, Any]]:
        """The images' entry, if there are any; it comes last, as the network reads it."""
        source, image = self.config.data.image, self.config.policy.image
        if source is None or image is None:
            return {}
        entry = {
            "type": "image",
            "shape": [image.height, image.width, CHANNELS],
            "crop": [image.crop, image.crop],
            "dtype": "uint8",
            "units": "intensity 0 to 255",
            "frame": source.frame,
            "history": self.config.policy.observation_horizon,
            "rate_hz": self.config.data.rate_hz,
            "max_age_ms": source.max_age_ms,
            "normalizer": {
                "kind": NormalizerKind.MIN_MAX.value,
                "scale": [IMAGE_SCALE] * CHANNELS,
                "offset": [IMAGE_OFFSET] * CHANNELS,
            },
        }
        return {source.key: entry}

    def specification(self) -> BundleSpec:
        """The validated specification of a policy that has no exported variant yet.

        It runs the policy on the training-side engine and finds, before training, what a bundle would refuse after it.

        Raises:
            ConfigError: the training configuration does not describe a policy that a bundle can hold.
        """
        values: dict[str, Any] = {}
        for name, document in self.fields().items():
            adapter: TypeAdapter[Any] = TypeAdapter(BundleSpec.model_fields[name].rebuild_annotation())
            try:
                values[name] = adapter.validate_json(json.dumps(document), strict=True)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join([name, *(str(part) for part in first["loc"])])
                raise ConfigError(f"training configuration {self.config.name!r}: {where}: {first['msg']}") from error
        # A bundle on disk holds at least one variant; everything else is validated above.
        return BundleSpec.model_construct(**values, default_variant="checkpoint", variants=())
