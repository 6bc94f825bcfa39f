"""Records of where a bundle's weights come from and of what was measured with them; part of ``bundle.yaml``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.bundle.types import Positive, Sha256, Text


class LatencyRecord(StrictModel):
    """Latency of one whole chunk on one device, milliseconds; ``command`` reproduces it."""

    device: Text
    runtime: Text
    kind: Literal["measured", "predicted"]
    threads: Positive
    steps: Positive
    p50_ms: Annotated[float, Field(gt=0.0)]
    p99_ms: Annotated[float, Field(gt=0.0)] | None = None
    command: Text


class QualityRecord(StrictModel):
    """Task metric with its seeds and 95 % interval half-width; ``command`` reproduces it."""

    metric: Text
    mean: float
    ci95: Annotated[float, Field(ge=0.0)]
    first_seed: Annotated[int, Field(ge=0)]
    seeds: Positive
    steps: Positive
    command: Text


class ParityRecord(StrictModel):
    """Error of whole chunks of the exported network on fixed inputs, normalised action units.

    ``max_abs`` and ``rms`` are against the full-precision policy, so they hold the cost of quantization and of a
    smaller network; ``export_rms`` is against the training-side network with the variant's own quantizers, so it holds
    that of the export alone. ``block_rms`` is the largest root mean square error of a block's output that was computed
    from the training-side network's own inputs, relative to that output: errors do not add up from block to block.
    ``fixed_chunks`` holds what the exported network computes for the observations of ``dcqfa_ros.runtime.parity``:
    normalised actions, flattened (samples, executed, action dimensions). A robot compares newly loaded engines with it.
    """

    samples: Positive
    max_abs: Annotated[float, Field(ge=0.0)]
    rms: Annotated[float, Field(ge=0.0)]
    tolerance_rms: Annotated[float, Field(gt=0.0)]
    export_rms: Annotated[float, Field(ge=0.0)]
    tolerance_export_rms: Annotated[float, Field(gt=0.0)]
    block_rms: Annotated[float, Field(ge=0.0)] | None = None
    tolerance_block_rms: Annotated[float, Field(gt=0.0)] | None = None
    fixed_chunks: tuple[float, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _holds(self) -> ParityRecord:
        if self.rms > self.tolerance_rms:
            raise ValueError(f"rms {self.rms} exceeds tolerance_rms {self.tolerance_rms}")
        if self.export_rms > self.tolerance_export_rms:
            raise ValueError(f"export_rms {self.export_rms} exceeds tolerance_export_rms {self.tolerance_export_rms}")
        if (self.block_rms is None) != (self.tolerance_block_rms is None):
            raise ValueError("block_rms and tolerance_block_rms belong together")
        if (self.block_rms or 0.0) > (self.tolerance_block_rms or 0.0):
            raise ValueError(f"block_rms {self.block_rms} exceeds tolerance_block_rms {self.tolerance_block_rms}")
        return self


class CalibrationRecord(StrictModel):
    """What activation scales were found on: ``samples`` observations drawn with ``seed`` from the training episodes."""

    samples: Positive
    seed: Annotated[int, Field(ge=0)]
    data_sha256: Sha256


class TrainingSegment(StrictModel):
    """One start or resume of a training run, at ``step``. Only segments under equal conditions repeat bit for bit.

    ``changed`` says what differs from the segment before, as text.
    """

    step: Annotated[int, Field(ge=0)]
    planned_steps: Positive
    threads: Positive
    compile: bool
    device: Text
    torch: Text
    changed: tuple[Text, ...] = ()


class TrainingRecord(StrictModel):
    """Where the weights come from: enough to repeat the run.

    ``data_sha256`` is that of the observations, actions and episode ends as read; ``planned_steps`` shaped the learning
    rate where the run was stopped after fewer ``steps``.
    """

    data: Text
    data_sha256: Sha256 | None = None
    episodes: Positive
    split: Text
    steps: Positive
    planned_steps: Positive | None = None
    batch: Positive
    seed: Annotated[int, Field(ge=0)]
    command: Text
    history: tuple[TrainingSegment, ...] = ()
