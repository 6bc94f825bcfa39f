"""The ``supernet`` section of a training configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dcqfa_ros.bundle.schema import Positive, Text
from dcqfa_ros.bundle.strict import StrictModel
from training.quant.ranges import Method
from training.sampler import SamplerConfig
from training.space_config import SpaceConfig

MOST_SYNTHETIC = 100_000  # four seconds and 1.5 GB in the shipped space

Share = Annotated[float, Field(ge=0.0, le=1.0)]

Weight = Annotated[float, Field(gt=0.0)]

LowBit = Literal["w4a4", "w8a8", "fp8"]


def _low_shares() -> dict[LowBit, float]:
    return {"w4a4": 0.6, "w8a8": 0.2, "fp8": 0.2}


class SandwichConfig(StrictModel):
    """Samples per member of a step, all the first ones of the same draw, and weights of the members' losses.

    Members are the largest network in full precision, the largest at few bits (``low_shares`` says how often at which),
    the smallest, and ``sampled`` networks of the configuration sampler. Weights are relative: the smallest network has
    the largest loss by far, and what it pulls the shared weights towards costs the largest at 4 bits most.
    """

    largest_batch: Positive = 32
    low_batch: Positive = 64
    smallest_batch: Positive = 64
    sampled_batch: Positive = 64
    sampled: Annotated[int, Field(ge=0)] = 2
    low_shares: dict[LowBit, Share] = Field(default_factory=_low_shares)
    largest_weight: Weight = 1.0
    low_weight: Weight = 1.0
    smallest_weight: Weight = 1.0
    sampled_weight: Weight = 1.0

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> SandwichConfig:
        if abs(sum(self.low_shares.values()) - 1.0) > 1e-6:
            raise ValueError(f"low_shares sum to {sum(self.low_shares.values()):g}, expected 1")
        return self


class SupernetConfig(StrictModel):
    """A device-conditioned, quantization-aware supernet (``algorithms.md`` sections 1 to 4).

    Attributes:
        warm_start: bundle, run folder or checkpoint of the full-precision policy: initial weights and teacher.
        space: the search space.
        tables: look-up tables of devices (JSON files).
        held_out: a device of ``tables`` that training never sees.
        synthetic: number of made-up devices.
        importance: how heads and hidden channels are ordered before the first step.
        activations: quantizers of activations: ``learned`` steps, static, or ``batchquant``, whose ranges come from the
            batch and at test time have to be estimated for the running subnet (a baseline; docs/baselines.md).
        calibration: observations that the first steps of the quantizers are fitted to.
        calibration_method: what the first ranges are chosen by: ``mse`` (least squared error), ``min_max`` (everything
            that occurs), or ``percentile`` (99.9 % of the activations; weights as with ``min_max``).
        step_learning_rate: of the quantizers' log-steps.
        distillation: weight of the distillation from the teacher; 0 leaves the task loss alone.
        saliency_percentile: states above it count twice in the distillation.
        width_from, depth_from: shares of the run from which widths and depth vary.
        only: name of the one subnet that is trained, for comparison with the supernet that trains all; None for that.
    """

    warm_start: Text
    space: SpaceConfig
    tables: tuple[Text, ...] = ()
    held_out: Text | None = None
    synthetic: Annotated[int, Field(ge=0, le=MOST_SYNTHETIC)] = 2000
    sandwich: SandwichConfig = SandwichConfig()
    sampler: SamplerConfig = SamplerConfig()
    importance: Literal["l1", "taylor"] = "l1"
    activations: Literal["learned", "batchquant"] = "learned"
    calibration: Positive = 256
    calibration_method: Method = "mse"
    step_learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3
    distillation: Annotated[float, Field(ge=0.0)] = 1.0
    saliency_percentile: Annotated[float, Field(ge=0.0, le=100.0)] = 80.0
    width_from: Share = 0.1
    depth_from: Share = 0.3
    only: Text | None = None
