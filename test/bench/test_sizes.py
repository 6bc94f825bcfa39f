"""Sizes against FP16."""

from __future__ import annotations

from typing import Any

import pytest

from dcqfa_ros.bench.sizes import sizes
from dcqfa_ros.bundle.schema import BlockSpec, BundleSpec, VariantSpec
from test.runtime.conftest import tiny_spec


def variant(spec: BundleSpec, **changes: Any) -> VariantSpec:
    return spec.variants[0].model_copy(update=changes)


def blocks(spec: BundleSpec, count: int, ffn_dim: int | None = None) -> tuple[BlockSpec, ...]:
    size = spec.architecture
    return tuple(BlockSpec(index=i, heads=size.heads, ffn_dim=ffn_dim or size.ffn_dim) for i in range(count))


def test_ratios_are_against_fp16_or_else_half_of_fp32() -> None:
    spec, _ = tiny_spec()
    fp32, w8a8 = sizes(spec, ["fp32", "w8a8"])
    assert fp32.fp16_over_disk == pytest.approx(0.5, abs=0.01)
    assert w8a8.fp16_over_disk == pytest.approx(fp32.disk_bytes / 2 / w8a8.disk_bytes, abs=0.01)
    half = variant(spec, name="half", precision="fp16")
    with_half = spec.model_copy(update={"variants": (*spec.variants, half)})
    assert sizes(with_half, ["half"])[0].fp16_over_disk == 1.0


def test_a_smaller_network_is_no_yardstick() -> None:
    spec, _ = tiny_spec()
    small = variant(spec, name="small", subnet="x", blocks=blocks(spec, 1, 1), precision="fp16")
    only_small = spec.model_copy(update={"variants": (small,)})
    assert sizes(only_small, ["small"])[0].fp16_over_disk is None
