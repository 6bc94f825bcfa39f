"""Configuration of a training run: one YAML file, unknown fields refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dcqfa_ros.bundle.document import DocumentError, parse_document
from dcqfa_ros.bundle.schema import Name, NormalizerKind, Positive, Rate, Text, consistency_levels
from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.errors import UserError
from training.distill_config import DistillConfig
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.supernet_config import SupernetConfig

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch's generators take
Columns = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class ConfigError(UserError, ValueError):
    """A configuration file that cannot be used; the message names file and field."""


class ObservationSource(StrictModel):
    """One low-dimensional observation key: where it lies in the data set and what it means on the robot.

    ``names`` says what each scalar of one time step is.
    """

    array: Text
    columns: Columns | None = None
    names: tuple[Name, ...] = ()
    units: Text
    frame: Text
    normalizer: NormalizerKind = NormalizerKind.MIN_MAX
    max_age_ms: Annotated[float, Field(gt=0.0)] = 300.0


class ImageSource(StrictModel):
    """The RGB images of the policy's ``image`` section, uint8 (or whole numbers 0 to 255 of another type).

    ``key`` names them on the robot. ``file`` is a ``.npz`` beside ``data.path`` that holds the array; without one, and
    always with zarr, the array lies in ``data.path``.
    """

    key: Name = "image"
    array: Text
    file: Text | None = None
    frame: Text
    max_age_ms: Annotated[float, Field(gt=0.0)] = 300.0


class ActionSource(StrictModel):
    """The action array and its meaning; limits are those of the robot, not of the data."""

    array: Text
    columns: Columns | None = None
    space: Literal["tcp_twist_gripper", "tcp_pose", "joint_position", "planar_position"]
    names: tuple[Name, ...]
    units: tuple[Text, ...]
    frame: Text
    mode: Literal["absolute", "delta"] = "absolute"
    rotation: Literal["none", "euler", "rotation_6d"] = "none"
    gripper: Literal["none", "continuous", "binary"] = "none"
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    normalizer: NormalizerKind = NormalizerKind.MIN_MAX


class DataConfig(StrictModel):
    """A data set of demonstrations and how observations and actions are read from it.

    ``format`` auto goes by the path: a ``.npz`` file, or a folder, ``.zarr`` or ``.zip`` holding a zarr replay buffer.
    """

    path: Text
    format: Literal["auto", "npz", "zarr"] = "auto"
    episode_ends: Text
    rate_hz: Rate
    observations: dict[Name, ObservationSource] = Field(min_length=1)
    action: ActionSource
    image: ImageSource | None = None
    validation_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02
    split_seed: Seed = 42
    max_train_episodes: Positive | None = None


class DiffusionConfig(StrictModel):
    """Forward process and the sampler written to the bundle."""

    train_timesteps: Annotated[int, Field(ge=2)] = 100
    sampler: Literal["ddim", "ddpm", "consistency"] = "ddim"
    steps: Positive = 16
    clip_sample: Annotated[float, Field(gt=0.0)] = 1.0

    @property
    def levels(self) -> int:
        """Number of noise levels, from the least, that are trained at."""
        return consistency_levels(self.train_timesteps) if self.sampler == "consistency" else self.train_timesteps


class ConsistencyConfig(StrictModel):
    """Consistency distillation of the policy that ``warm_start`` names (Song et al. 2023, Luo et al. 2023).

    Attributes:
        skip: time steps that the teacher's one DDIM step goes down; the two levels must agree on the clean actions.
        target_decay: of the moving average whose prediction at the lower level is the target.
        huber: distance, per scalar, above which the pseudo-Huber loss grows linearly.
    """

    skip: Positive = 5
    target_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    huber: Annotated[float, Field(gt=0.0)] = 0.00054


class OptimizerConfig(StrictModel):
    """AdamW with warm-up and cosine decay to ``final_learning_rate``."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-4
    final_learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0


class EmaConfig(StrictModel):
    """Exponential moving average: decay = min(maximum, 1 - (1 + step)^-power)."""

    power: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    maximum: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9995


class RunConfig(StrictModel):
    """Length, batch, precision and bookkeeping of the run."""

    steps: Positive
    batch: Positive = 128
    seed: Seed = 42
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: Positive = 1
    compile: bool = False  # torch.compile; on a CPU this needs a C++ compiler
    device: Literal["cpu", "cuda"] = "cpu"
    checkpoint_every: Positive = 500
    log_every: Positive = 50
    validate_every: Positive = 1000


class TrainConfig(StrictModel):
    """A whole training run.

    Attributes:
        warm_start: run folder, checkpoint or bundle whose full-precision policy a single policy starts from; where it
            knows no prefix and ``policy.prefix`` asks for one, the flag's weights start from zero.
        distill: distillation of a trained supernet on the states that it visits.
    """

    name: Name
    task: Text
    license: Text = "Apache-2.0"
    policy: DiffusionPolicyTConfig
    executed_actions: Positive = 8
    data: DataConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    run: RunConfig
    warm_start: Text | None = None
    consistency: ConsistencyConfig | None = None
    supernet: SupernetConfig | None = None
    distill: DistillConfig | None = None

    @model_validator(mode="after")
    def _kinds_of_runs(self) -> TrainConfig:
        if self.supernet is not None:
            for field, given in (
                ("warm_start", self.warm_start is not None),
                ("consistency", self.consistency is not None),
                ("policy.prefix", self.policy.prefix > 0),
            ):
                if given:
                    raise ValueError(f"{field} is for a single policy; leave it out of a run with a section supernet")
        if (self.consistency is not None) != (self.diffusion.sampler == "consistency"):
            raise ValueError("section consistency and diffusion.sampler consistency belong together; give both or none")
        if self.consistency is not None and self.warm_start is None:
            raise ValueError("consistency needs warm_start: the policy that is distilled")
        return self

    @model_validator(mode="after")
    def _distillation(self) -> TrainConfig:
        if self.distill is None:
            return self
        if self.supernet is None:
            raise ValueError("distill needs section supernet: space, teacher and losses of the networks that it trains")
        if self.diffusion.sampler != "ddim":
            raise ValueError(f"distill records denoising paths of sampler ddim, got {self.diffusion.sampler}")
        if self.policy.image is not None:
            raise ValueError("distill rolls policies of key points out; the Push-T cell renders no images for training")
        if not 1 <= self.distill.denoising_steps <= self.diffusion.train_timesteps:
            raise ValueError(f"distill.denoising_steps: expected 1 to {self.diffusion.train_timesteps}")
        return self

    @model_validator(mode="after")
    def _images_on_both_sides(self) -> TrainConfig:
        if (self.policy.image is None) != (self.data.image is None):
            have, lack = ("data", "policy") if self.policy.image is None else ("policy", "data")
            raise ValueError(f"{have}.image is given but {lack}.image is missing; give both or neither")
        if self.data.image is not None and self.data.image.key in self.data.observations:
            raise ValueError(f"data.image.key {self.data.image.key!r} is the name of another observation")
        return self


def override(config: TrainConfig, **sections: dict[str, Any]) -> TrainConfig:
    """Return ``config`` with fields of the named sections replaced; a value of None leaves a field as it is.

    Raises:
        ConfigError: a value does not fit its field; the message names section and field.
    """
    document = config.model_dump(mode="json")
    for section, fields in sections.items():
        document[section].update({name: value for name, value in fields.items() if value is not None})
    return _validate(document, "command line")


def _validate(document: Any, where: str) -> TrainConfig:
    try:
        return TrainConfig.model_validate_json(json.dumps(document), strict=True)
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):  # YAML knows dates and other things that JSON does not
            raise ConfigError(f"{where}: {error}") from error
        lines = [f"{where}: {'.'.join(str(p) for p in e['loc']) or '(document)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def load_config(path: Path) -> TrainConfig:
    """Read a training configuration, as strictly as a bundle's description is read.

    Raises:
        ConfigError: the file is missing, is no plain YAML, or has an unknown, missing, repeated or ill-typed field.
    """
    try:
        return parse_document(path.read_bytes(), TrainConfig)
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"{path}: cannot be read ({reason}); give the path of a training YAML file") from error
    except DocumentError as error:
        lines = [f"{path}: {field or '(document)'}: {message}{_hint(message)}" for field, message in error.issues]
        raise ConfigError("\n".join(lines)) from error


def _hint(message: str) -> str:
    """Explain a number in a form that YAML takes for text, such as ``3e-4``."""
    number = re.search(r'valid number, got "([+-]?\d+(?:\.\d*)?)[eE]([+-]?)(\d+)"$', message)
    if number is None:
        return ""
    mantissa, sign, exponent = number.groups()
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"; YAML takes that for text: write {mantissa}e{sign or '+'}{exponent}"
