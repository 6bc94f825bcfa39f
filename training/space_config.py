"""The ``space`` section of a training configuration, and its reading against a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator

from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.bundle.types import Name
from training.policy_shape import PolicyShape
from training.subnet import Precision, SpaceError

Ratios = Annotated[tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...], Field(min_length=1)]
BitWidths = Annotated[tuple[Literal[4, 8], ...], Field(min_length=1)]


class SpaceConfig(StrictModel):
    """The section of a training configuration that spans the space.

    ``min_depth`` counts the blocks of a group that are kept at least, ``always_kept`` names the ends of a group that no
    subnet skips; ratios are shares of the full heads and hidden channels; ``precisions`` lists what the whole network
    may run in besides integer codes.
    """

    min_depth: dict[Name, Annotated[int, Field(ge=1)]]
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
            for by, features in ((linear.in_slice, linear.in_features), (linear.out_slice, linear.out_features)):
                units = {"heads": block.heads, "mlp": block.mlp}.get(by, 1)
                if units < 1 or features % units:
                    raise SpaceError(
                        f"policy {shape.backbone}: {block.name}.{linear.name}: {features} features are sliced by {by}, "
                        f"but are no multiple of {units}"
                    )


def least_depths(
    shape: PolicyShape, groups: Mapping[str, tuple[int, ...]], configured: Mapping[str, int]
) -> dict[str, int]:
    """Least depth of every group; groups of bits-only blocks are kept whole."""
    unknown = sorted(set(configured) - set(groups))
    if unknown:
        raise SpaceError(
            f"space.min_depth.{unknown[0]}: policy {shape.backbone} has no such group; it has {', '.join(groups)}"
        )
    result = {}
    for group, indices in groups.items():
        elastic = {shape.blocks[index].elastic for index in indices}
        if len(elastic) > 1:
            raise SpaceError(f"policy {shape.backbone}: group {group} mixes elastic blocks and blocks of fixed size")
        least = configured.get(group, None if True in elastic else len(indices))
        if least is None:
            raise SpaceError(f"space.min_depth.{group}: this field is missing; give 1 to {len(indices)}")
        lowest = 1 if True in elastic else len(indices)
        if not lowest <= least <= len(indices):
            raise SpaceError(f"space.min_depth.{group}: expected {lowest} to {len(indices)} blocks, got {least}")
        result[group] = least
    return result


def blocks_always_kept(
    groups: Mapping[str, tuple[int, ...]],
    min_depth: Mapping[str, int],
    configured: Mapping[str, Literal["first", "ends"]],
) -> frozenset[int]:
    """Indices of the blocks that are never skipped: ends of groups, which evenly spread patterns keep anyway."""
    kept: set[int] = set()
    for group, which in configured.items():
        if group not in groups:
            raise SpaceError(f"space.always_kept.{group}: the policy has no such group; it has {', '.join(groups)}")
        ends = groups[group][:1] if which == "first" else {groups[group][0], groups[group][-1]}
        if len(ends) > min_depth[group]:
            raise SpaceError(
                f"space.always_kept.{group}: {which} are {len(ends)} blocks, but space.min_depth.{group} is "
                f"{min_depth[group]}; give at least {len(ends)} there"
            )
        kept.update(ends)
    return frozenset(kept)


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
