"""Bytes of a bundle's variants against FP16: on disk, and by the paper's convention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcqfa_ros.bundle.schema import BundleSpec, VariantSpec
from dcqfa_ros.bundle.stored import loaded_bytes


@dataclass(frozen=True, slots=True)
class SizeRow:
    """Size of one variant.

    Attributes:
        variant: name.
        disk_bytes: of its files.
        paper_bytes: parameters x bits / 8 without scales.
        fp16_over_disk: how many times larger the whole policy is on disk in FP16; None where the bundle has it neither
            in FP16 nor, of which half is taken as if it were stored in float32, in FP32.
        fp16_over_paper: likewise by the paper's convention, where FP16 takes two bytes a parameter.
    """

    variant: str
    disk_bytes: int
    paper_bytes: int
    fp16_over_disk: float | None
    fp16_over_paper: float | None


def sizes(spec: BundleSpec, variants: Sequence[str]) -> tuple[SizeRow, ...]:
    """Sizes of the named variants of a bundle."""
    whole = [variant for variant in spec.variants if not is_smaller(spec, variant)]
    half = next((v.size.disk_bytes for v in whole if v.precision == "fp16"), None)
    if half is None:
        half = next((loaded_bytes(v) // 2 for v in whole if v.precision == "fp32"), None)
    parameters = max((v.size.parameters for v in whole), default=None)
    rows = []
    for name in variants:
        size = spec.variant(name).size
        rows.append(
            SizeRow(
                name,
                size.disk_bytes,
                size.paper_bytes,
                None if half is None else round(half / size.disk_bytes, 3),
                None if parameters is None else round(2 * parameters / size.paper_bytes, 3),
            )
        )
    return tuple(rows)


def is_smaller(spec: BundleSpec, variant: VariantSpec) -> bool:
    """Whether a variant is a subnet that lacks blocks, heads or channels of the whole policy."""
    if variant.blocks is None:
        return False
    size = spec.architecture
    return len(variant.blocks) < size.depth or any(
        (block.heads, block.ffn_dim) != (size.heads, size.ffn_dim) for block in variant.blocks
    )
