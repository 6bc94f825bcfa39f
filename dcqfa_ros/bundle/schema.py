"""Schema of ``bundle.yaml``: the contract between training and robot.

Every model is frozen and refuses unknown fields. Reading, hashing and verifying files is in ``load`` and ``verify``;
this module knows only the shape of the document. Arrays of numbers are tuples, so that nothing in them can change.
"""

from __future__ import annotations

import hashlib
from enum import Enum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dcqfa_ros.bundle.provenance import CalibrationRecord, LatencyRecord, ParityRecord, QualityRecord, TrainingRecord
from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.bundle.types import Name, Positive, Rate, RelativePath, Sha256, Text


class NormalizerKind(str, Enum):
    """How raw values map to the policy's range."""

    IDENTITY = "identity"
    MIN_MAX = "min_max"  # [minimum, maximum] -> [-1, 1]
    QUANTILE = "quantile"  # like min_max, but minimum and maximum are quantiles of the data
    MEAN_STD = "mean_std"  # (x - mean) / std


class NormalizerSpec(StrictModel):
    """Affine normalisation per flattened dimension: ``normalised = raw * scale + offset`` (same units as the key's)."""

    kind: NormalizerKind
    scale: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _lengths(self) -> NormalizerSpec:
        if len(self.scale) != len(self.offset):
            raise ValueError(f"scale has {len(self.scale)} entries but offset has {len(self.offset)}")
        if self.kind is NormalizerKind.IDENTITY and self.scale:
            raise ValueError("kind identity takes no scale and no offset")
        if self.kind is not NormalizerKind.IDENTITY and not self.scale:
            raise ValueError(f"kind {self.kind.value} needs scale and offset, one entry per dimension")
        if any(s == 0.0 for s in self.scale):
            raise ValueError("scale must not hold zeros: actions could not be mapped back")
        return self


class _Observation(StrictModel):
    """Fields shared by every observation key. ``shape`` is one time step's, without history."""

    shape: tuple[Positive, ...] = Field(min_length=1, max_length=4)
    dtype: Literal["float32", "uint8", "uint16", "int64"]
    units: Text
    frame: Text
    history: Positive = 1
    rate_hz: Rate
    max_age_ms: Annotated[float, Field(gt=0.0, le=60_000.0)]
    normalizer: NormalizerSpec

    @property
    def size(self) -> int:
        """Number of scalars in one time step."""
        size = 1
        for n in self.shape:
            size *= n
        return size

    @model_validator(mode="after")
    def _normalizer_fits(self) -> _Observation:
        n = len(self.normalizer.scale)
        if n and n not in (self.size, self.shape[-1]):
            raise ValueError(f"normalizer has {n} entries, expected {self.size} (one per scalar of shape {self.shape})")
        return self


class LowDimObservation(_Observation):
    """Joint positions, poses, key points: a small float vector per time step; ``names`` says what each scalar is."""

    type: Literal["low_dim"]
    names: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _names_fit(self) -> LowDimObservation:
        if self.names and len(self.names) != self.size:
            raise ValueError(f"names has {len(self.names)} entries, expected {self.size} (one per scalar) or none")
        if len(set(self.names)) != len(self.names):
            raise ValueError("names must differ from each other")
        return self


class ImageObservation(_Observation):
    """RGB image, shape (height, width, 3), uint8, encoding rgb8."""

    type: Literal["image"]
    encoding: Literal["rgb8"] = "rgb8"
    resize: tuple[Positive, Positive] | None = None
    crop: tuple[Positive, Positive] | None = None
    color_jitter: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # training only
    encoder: Literal["own", "shared"] = "own"


class DepthObservation(_Observation):
    """Aligned depth, shape (height, width), uint16; ``depth_scale`` metres per unit."""

    type: Literal["depth"]
    depth_scale: Annotated[float, Field(gt=0.0, le=1.0)]
    resize: tuple[Positive, Positive] | None = None
    crop: tuple[Positive, Positive] | None = None
    encoder: Literal["own", "shared"] = "own"


class WrenchObservation(_Observation):
    """Compensated wrench window at its own rate, shape (window, 6), N and N m, clipped to +-``clip``."""

    type: Literal["wrench"]
    clip: tuple[float, float, float, float, float, float]


class LanguageObservation(_Observation):
    """Instruction as token ids or as an embedding computed by ``model``."""

    type: Literal["language"]
    model: Text


class GoalObservation(_Observation):
    """Goal embedding or goal state, constant over an episode."""

    type: Literal["goal"]


ObservationSpec = Annotated[
    LowDimObservation | ImageObservation | DepthObservation | WrenchObservation | LanguageObservation | GoalObservation,
    Field(discriminator="type"),
]


class ActionSpace(str, Enum):
    """What an action means to the arm."""

    TCP_TWIST_GRIPPER = "tcp_twist_gripper"
    TCP_POSE = "tcp_pose"
    JOINT_POSITION = "joint_position"
    PLANAR_POSITION = "planar_position"


class ActionSpec(StrictModel):
    """The action chunk: ``horizon`` predicted actions, of which ``executed`` are run from index ``first_executed``."""

    space: ActionSpace
    names: tuple[Name, ...] = Field(min_length=1, max_length=32)
    units: tuple[Text, ...]
    frame: Text
    mode: Literal["absolute", "delta"]
    rotation: Literal["none", "euler", "rotation_6d"]
    gripper: Literal["none", "continuous", "binary"]
    rate_hz: Rate
    horizon: Positive
    first_executed: Annotated[int, Field(ge=0)]
    executed: Positive
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    normalizer: NormalizerSpec

    @property
    def dim(self) -> int:
        """Number of scalars in one action."""
        return len(self.names)

    @model_validator(mode="after")
    def _consistent(self) -> ActionSpec:
        for field in ("units", "minimum", "maximum"):
            if len(getattr(self, field)) != self.dim:
                raise ValueError(f"{field} has {len(getattr(self, field))} entries, expected {self.dim} (one per name)")
        if len(set(self.names)) != self.dim:
            raise ValueError("names must differ from each other")
        if any(lo >= hi for lo, hi in zip(self.minimum, self.maximum, strict=True)):
            raise ValueError("minimum must be below maximum in every dimension")
        if self.first_executed + self.executed > self.horizon:
            raise ValueError(
                f"first_executed + executed = {self.first_executed + self.executed} exceeds horizon {self.horizon}"
            )
        if len(self.normalizer.scale) not in (0, self.dim):
            raise ValueError(f"normalizer has {len(self.normalizer.scale)} entries, expected {self.dim}")
        return self


class ArchitectureSpec(StrictModel):
    """Size of a ``diffusion_policy_t`` network: decoder blocks, attention heads, channels, and action tokens."""

    depth: Positive
    heads: Positive
    dim: Positive
    ffn_dim: Positive
    horizon: Positive

    @model_validator(mode="after")
    def _heads_fit(self) -> ArchitectureSpec:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        return self


def consistency_levels(train_timesteps: int) -> int:
    """Number of noise levels, from the least, that a consistency sampler may visit: nine tenths of all.

    Above them next to nothing is left of the actions, and predicted noise says little about them: its error counts
    some hundred times in the clean actions.
    """
    return max(1, train_timesteps * 9 // 10)


class DiffusionSpec(StrictModel):
    """Noise schedule and sampler of a variance-preserving diffusion policy (``dcqfa_ros.runtime.schedule``).

    Attributes:
        sampler: ``consistency`` for a network that maps every noise level to clean actions in one step.
        steps: denoising steps per chunk where no other number is asked for.
        prefix: largest number of leading action tokens that the network takes as already known (clean), counted from
            token 0, the ``first_executed`` past ones included; 0 for none. A network that takes any has one more input
            channel per action token: 1.0 for known tokens, 0.0 for noisy ones.
    """

    train_timesteps: Annotated[int, Field(ge=1, le=10_000)]
    beta_schedule: Literal["squared_cosine"]
    prediction: Literal["epsilon"]
    clip_sample: Annotated[float, Field(gt=0.0)]
    sampler: Literal["ddim", "ddpm", "consistency"]
    timestep_spacing: Literal["leading"] = "leading"
    steps: Positive
    prefix: Annotated[int, Field(ge=0)] = 0

    @property
    def most_steps(self) -> int:
        """Largest number of denoising steps that the sampler can be asked for."""
        return consistency_levels(self.train_timesteps) if self.sampler == "consistency" else self.train_timesteps

    @model_validator(mode="after")
    def _steps(self) -> DiffusionSpec:
        if self.steps > self.train_timesteps:
            raise ValueError(f"steps {self.steps} exceeds train_timesteps {self.train_timesteps}")
        if self.steps > self.most_steps:
            raise ValueError(f"steps {self.steps} exceeds the {self.most_steps} noise levels of sampler consistency")
        return self


class FileSpec(StrictModel):
    """One file of a variant, relative to the bundle's folder."""

    path: RelativePath
    sha256: Sha256
    bytes: Annotated[int, Field(ge=1)]


class Bits(StrictModel):
    """Weight and activation precision of one layer: 4, 8, 16 or 32 bits, integer or floating point."""

    weight: Literal[4, 8, 16, 32]
    activation: Literal[4, 8, 16, 32]
    kind: Literal["int", "float"]


class LayerBits(StrictModel):
    """Bits of one named layer: as searched, as written to ONNX, and as each runtime really executes it."""

    layer: Name
    searched: Bits
    exported: Bits
    executed: dict[Name, Bits]


class VariantSize(StrictModel):
    """Model size twice: parameters x bits / 8 without scales (the paper's convention), and bytes on disk."""

    parameters: Positive
    paper_bytes: Positive
    disk_bytes: Positive


class BlockSpec(StrictModel):
    """One kept block of a searched variant: its place in the whole policy, and what is left of its width."""

    index: Annotated[int, Field(ge=0)]
    heads: Positive
    ffn_dim: Positive


class VariantSpec(StrictModel):
    """One runnable variant of the policy.

    Attributes:
        subnet: lossless name in the search space of the supernet that the variant is of, None for the policy itself.
        blocks: what a subnet keeps, None for the whole policy.
        training: where a subnet's weights come from, None for those of the bundle's training record.
        searched_for: the device and budgets of the search that chose the subnet, None where none did.
    """

    name: Name
    description: Text
    precision: Literal["fp32", "fp16", "fp8", "w8a8", "w4a4", "mixed"]
    opset: Annotated[int, Field(ge=17, le=30)]
    files: dict[Literal["encoder", "timestep", "denoiser"], FileSpec]
    layers: tuple[LayerBits, ...] = Field(min_length=1)
    size: VariantSize
    calibration: CalibrationRecord | None = None
    latency: tuple[LatencyRecord, ...] = ()
    quality: tuple[QualityRecord, ...] = ()
    parity: ParityRecord
    subnet: Text | None = None
    blocks: tuple[BlockSpec, ...] | None = Field(default=None, min_length=1)
    training: TrainingRecord | None = None
    searched_for: Text | None = None

    @property
    def weights(self) -> str:
        """Identity of what the variant computes: SHA-256 over those of its files, in the order a chunk needs them.

        Records of latency and quality belong to it: keys and values, and the table of time steps, count as well.
        """
        files = (self.files["encoder"], self.files["timestep"], self.files["denoiser"])
        return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()

    @model_validator(mode="after")
    def _whole_or_subnet(self) -> VariantSpec:
        if (self.subnet is None) != (self.blocks is None):
            raise ValueError("subnet and blocks belong together: a subnet has both, the whole policy neither")
        indices = [block.index for block in self.blocks or ()]
        if indices != sorted(set(indices)):
            raise ValueError("blocks must be in the order of the policy, each once")
        return self

    @model_validator(mode="after")
    def _complete(self) -> VariantSpec:
        missing = {"encoder", "timestep", "denoiser"} - set(self.files)
        if missing:
            raise ValueError(f"files lacks {', '.join(sorted(missing))}")
        names = [layer.layer for layer in self.layers]
        if len(set(names)) != len(names):
            raise ValueError("layers holds the same layer twice")
        return self


class BundleSpec(StrictModel):
    """The whole of ``bundle.yaml``; ``created_by`` holds the versions of the programs that wrote it."""

    schema_version: Literal[1]
    name: Name
    task: Text
    backbone: Literal["diffusion_policy_t"]
    architecture: ArchitectureSpec
    license: Text
    observations: dict[Name, ObservationSpec] = Field(min_length=1)
    action: ActionSpec
    diffusion: DiffusionSpec
    training: TrainingRecord
    created_by: dict[Name, Text] = Field(default_factory=dict)
    default_variant: Name
    variants: tuple[VariantSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _variants(self) -> BundleSpec:
        names = [v.name for v in self.variants]
        if len(set(names)) != len(names):
            raise ValueError("variants holds the same name twice")
        if "auto" in names:
            raise ValueError("a variant must not be named 'auto': the selector uses that word")
        if self.default_variant not in names:
            raise ValueError(f"default_variant {self.default_variant!r} is not one of {', '.join(names)}")
        histories = {o.history for o in self.observations.values() if o.type == "low_dim"}
        if len(histories) > 1:
            raise ValueError("low_dim observations must share one history")
        for variant in self.variants:
            for block in variant.blocks or ():
                size = self.architecture
                if block.index >= size.depth or block.heads > size.heads or block.ffn_dim > size.ffn_dim:
                    raise ValueError(f"variant {variant.name!r}: block {block.index} does not fit the architecture")
        if self.diffusion.prefix >= self.action.horizon:
            raise ValueError(
                f"diffusion.prefix {self.diffusion.prefix} leaves nothing to predict of action.horizon "
                f"{self.action.horizon}; expected less"
            )
        if self.architecture.horizon != self.action.horizon:
            raise ValueError(
                f"architecture.horizon {self.architecture.horizon} differs from action.horizon {self.action.horizon}"
            )
        return self

    def variant(self, name: str) -> VariantSpec:
        """Return the variant called ``name``.

        Raises:
            KeyError: no such variant; the message lists those there are.
        """
        for candidate in self.variants:
            if candidate.name == name:
                return candidate
        known = ", ".join(v.name for v in self.variants)
        raise KeyError(f"bundle {self.name!r} has no variant {name!r}; it has {known}")
