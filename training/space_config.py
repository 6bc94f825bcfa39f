"""The ``space`` section of a training configuration, and its reading against a policy."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.bundle.types import Name
from training.policy_shape import PolicyShape
from training.subnet import Precision, SpaceError

Ratios = Annotated[tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...], Field(min_length=1)]
Depths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
BitWidths = Annotated[tuple[Literal[4, 8], ...], Field(min_length=1)]


class SpaceConfig(StrictModel):
    """The section of a training configuration that spans the space.

    ``min_depth`` counts the blocks of a group that are kept at least; a group may have ``depths`` in its place, all the
    numbers of blocks to choose from, the whole group among them. ``always_kept`` names the ends of a group that no
    subnet skips; ratios are shares of the full heads and hidden channels; ``precisions`` lists what the whole network
    may run in besides integer codes.
    """

    min_depth: dict[Name, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    depths: dict[Name, Depths] = Field(default_factory=dict)
    always_kept: dict[Name, Literal["first", "ends"]] = Field(default_factory=dict)
    head_ratios: Ratios
    mlp_ratios: Ratios
    weight_bits: BitWidths = (4, 8)
    activation_bits: BitWidths = (4, 8)
    precisions: tuple[Precision, ...] = (Precision.FP32, Precision.FP16, Precision.FP8)

    @field_validator("head_ratios", "mlp_ratios", "weight_bits", "activation_bits", "precisions")
    @classmethod
    def _distinct(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(values)) != len(values):
            raise ValueError(f"a choice stands twice in {', '.join(str(value) for value in values)}; keep one")
        return values

    @field_validator("depths")
    @classmethod
    def _distinct_depths(cls, groups: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        for group, depths in groups.items():
            if len(set(depths)) != len(depths):
                raise ValueError(f"{group}: a choice stands twice in {', '.join(map(str, depths))}; keep one")
        return {group: tuple(sorted(depths)) for group, depths in groups.items()}  # the order means nothing

    def identity(self) -> str:
        """JSON by which the same section is recognised; a field that came later is there only where it is used."""
        return self.model_dump_json(exclude=None if self.depths else {"depths"})

    def sha256(self) -> str:
        """Hash of :meth:`identity`."""
        return hashlib.sha256(self.identity().encode()).hexdigest()

    @model_validator(mode="after")
    def _one_way(self) -> SpaceConfig:
        both = sorted(set(self.min_depth) & set(self.depths))
        if both:
            raise ValueError(f"group {both[0]} stands in min_depth and in depths; keep one of them")
        return self

    @field_validator("head_ratios", "mlp_ratios")
    @classmethod
    def _full_size(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in values:
            raise ValueError("the full size 1.0 is missing; the largest network is part of every space")
        return values

    @field_validator("precisions")
    @classmethod
    def _whole_network(cls, values: tuple[Precision, ...]) -> tuple[Precision, ...]:
        if Precision.INT in values:
            raise ValueError("int is always in the space; leave it out")
        return values


def check_shape(shape: PolicyShape) -> None:
    """Refuse a declaration that no width of the space could slice."""
    if not shape.blocks:
        raise SpaceError(f"policy {shape.backbone}: expected at least one elastic block, got none")
    for block in shape.blocks:
        for linear in block.linears:
            if not linear.quantized and (linear.in_slice, linear.out_slice) != ("full", "full"):
                raise SpaceError(
                    f"policy {shape.backbone}: {block.name}.{linear.name} is not quantized, so it cannot be sliced"
                )
            for by, features in ((linear.in_slice, linear.in_features), (linear.out_slice, linear.out_features)):
                units = {"heads": block.heads, "mlp": block.mlp}.get(by, 1)
                if units < 1 or features % units:
                    raise SpaceError(
                        f"policy {shape.backbone}: {block.name}.{linear.name}: {features} features are sliced by {by}, "
                        f"but are no multiple of {units}"
                    )


def width_counts(ratios: Sequence[float], full: int, what: str, field: str, elastic: bool) -> tuple[int, ...]:
    """``ratios`` of ``full`` as ascending counts; a block of fixed size has the full count alone."""
    if not elastic:
        return (full,)
    counts = []
    for ratio in sorted(ratios):
        count = round(ratio * full)
        if count < 1 or abs(count - ratio * full) > 1e-6 * full:
            raise SpaceError(f"space.{field}: {ratio} of the {full} {what} is no whole number; choose another share")
        counts.append(count)
    if len(set(counts)) != len(counts):
        raise SpaceError(f"space.{field}: two shares of the {full} {what} are the same number; keep one")
    return tuple(counts)


def ratio_text(count: int, full: int) -> str:
    """``count / full`` as a short decimal from which ``round(float(text) * full)`` restores ``count``: .75, 3."""
    ratio = Fraction(count, full)
    exact = (places for places in range(7) if (ratio * 10**places).denominator == 1)
    # What is no short decimal (1/3) gets as many places as tell it from its neighbours.
    places = next(exact, None)
    if places is None:
        places = next(p for p in itertools.count(2) if round(float(f"{float(ratio):.{p}f}") * full) == count)
    text = f"{float(ratio):.{places}f}"
    return text.removeprefix("0") if text.startswith("0.") else text
