"""Costs of subnets: the sums of section 4, from tables and from tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from training.cost import CostError, activation_bytes, cost, cost_tensors, fixed_bytes
from training.draws import stratified_subnet
from training.lut import CacheEffect, ExecutedForm, LookUpTable
from training.modelled_tables import ORIN_NX_16GB, modelled_table
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.space_counts import real_bytes
from training.subnet import Layer, Precision, Subnet

SPACE = SearchSpace(
    diffusion_policy_t_shape(DiffusionPolicyTConfig(), tokens=9),
    SpaceConfig(min_depth={"decoder": 2}, head_ratios=(0.25, 0.5, 0.75, 1.0), mlp_ratios=(0.25, 0.5, 0.75, 1.0)),
)
TABLE = modelled_table(ORIN_NX_16GB, SPACE)
CONTAINED = TABLE.model_copy(
    update={
        "forms": tuple(
            ExecutedForm(precision=f.precision, w=f.w, a=f.a, executed="int8", stored_bits=8)
            if f.precision is Precision.INT
            else f
            for f in TABLE.forms
        )
    }
)
CACHE = CacheEffect(low_bytes=500_000, high_bytes=2_500_000, ms_per_mb=0.05)
CACHED = CONTAINED.model_copy(
    update={
        "name": "cached",
        "fixed": tuple(
            row.model_copy(
                update={
                    "cache": CACHE,
                    "weight_copies": 2.5,
                    "workspace_bytes": 7_000_000,
                    "block_workspace_bytes": 40_000,
                }
            )
            for row in CONTAINED.fixed
        ),
    }
)
TENSORS = {id(table): cost_tensors(table, SPACE, 16) for table in (TABLE, CONTAINED, CACHED)}


def draw(seed: int) -> Subnet:
    return stratified_subnet(SPACE, Generator().manual_seed(seed), whole_network=False)


@pytest.mark.parametrize("table", [TABLE, CONTAINED, CACHED], ids=["packed", "in containers", "cached"])
@given(seed=st.integers(0, 10**6))
def test_tensors_and_table_tell_the_same_cost(table: LookUpTable, seed: int) -> None:
    subnet = draw(seed)
    told, summed = cost(table, SPACE.shape, subnet, 16), TENSORS[id(table)].total(subnet)
    assert summed.latency_ms == pytest.approx(told.latency_ms, rel=1e-6)
    assert summed.memory_bytes == pytest.approx(told.memory_bytes, rel=1e-6)


@given(seed=st.integers(0, 10**6))
def test_the_sum_over_layers_bounds_the_memory_by_less_than_one_activation_buffer(seed: int) -> None:
    subnet, tensors = draw(seed), TENSORS[id(TABLE)]
    picked = [(i, *tensors.indices(i, layer)) for i, layer in enumerate(subnet.layers) if layer is not None]
    bound = tensors.fixed_memory + sum(float(tensors.memory[place]) for place in picked)
    assert 0 <= bound - cost(TABLE, SPACE.shape, subnet, 16).memory_bytes < float(tensors.activation.max())


def test_latency_is_fixed_parts_and_keys_once_and_blocks_at_every_step() -> None:
    layer = Layer(2, 512, 8, 4)
    subnet = Subnet((layer, None, None, layer, None, None, None, None), Precision.INT)
    entry = TABLE.block(SPACE.shape.blocks[0], layer, "int8")
    fixed = TABLE.fixed_parts(SPACE.shape, Precision.INT)
    expected = fixed.encoder_ms + 2 * entry.kv_ms + 10 * (fixed.step_fixed_ms + 2 * entry.step_ms)
    assert cost(TABLE, SPACE.shape, subnet, 10).latency_ms == pytest.approx(expected)


def test_memory_is_weights_and_the_largest_activation_buffer_and_the_workspace() -> None:
    wide, narrow = Layer(4, 1024, 8, 8), Layer(1, 256, 4, 4)
    subnet = Subnet((wide, *(narrow,) * 7), Precision.INT)
    expected = real_bytes(SPACE.shape, subnet) + activation_bytes(SPACE.shape.blocks[0], 4, 1024)
    assert cost(TABLE, SPACE.shape, subnet, 16).memory_bytes == expected + TABLE.workspace_bytes


def test_weights_in_containers_take_the_memory_of_the_container() -> None:
    low, high = SPACE.smallest(w=4, a=4), SPACE.smallest(w=8, a=8)
    assert cost(CONTAINED, SPACE.shape, low, 16) == cost(CONTAINED, SPACE.shape, high, 16)
    assert cost(TABLE, SPACE.shape, low, 16).memory_bytes < cost(TABLE, SPACE.shape, high, 16).memory_bytes


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.FP8])
def test_whole_network_precisions_have_a_cost_too(precision: Precision) -> None:
    largest, integer = SPACE.largest(precision), SPACE.largest(Precision.INT, 8, 8)
    assert cost(TABLE, SPACE.shape, largest, 16).latency_ms > cost(TABLE, SPACE.shape, integer, 16).latency_ms
    with pytest.raises(CostError, match=r"use cost\(\)"):
        TENSORS[id(TABLE)].total(largest)


def test_fp8_that_executes_as_fp16_takes_its_memory() -> None:
    fp8, fp16 = (cost(TABLE, SPACE.shape, SPACE.largest(p), 16) for p in (Precision.FP8, Precision.FP16))
    assert fp8 == fp16


def test_networks_that_stay_in_the_cache_save_time_and_those_beyond_it_do_not() -> None:
    small = SPACE.uniform(2, 0.25, 0.25, Precision.INT, 8, 8)
    largest = SPACE.largest(Precision.INT, 8, 8)
    weights = real_bytes(SPACE.shape, small) - fixed_bytes(SPACE.shape)
    assert weights < CACHE.high_bytes
    saved = [
        cost(CONTAINED, SPACE.shape, s, 16).latency_ms - cost(CACHED, SPACE.shape, s, 16).latency_ms
        for s in (small, largest)
    ]
    assert saved == pytest.approx([16 * CACHE.saved_ms(weights), 0.0])
    assert saved[0] > 0.0


@given(low=st.integers(0, 10**7), more=st.integers(0, 10**7), sizes=st.lists(st.integers(0, 10**8), min_size=2))
def test_a_larger_network_is_never_streamed_less(low: int, more: int, sizes: list[int]) -> None:
    effect = CacheEffect(low_bytes=low, high_bytes=low + more, ms_per_mb=1.0)
    streamed = [size * effect.streamed(size) for size in sorted(sizes)]
    assert streamed == sorted(streamed)
    for size in sizes:
        assert 0.0 <= effect.streamed(size) <= 1.0
        assert effect.saved_ms(size) == pytest.approx((size - size * effect.streamed(size)) / 1e6)


def test_memory_counts_copies_and_the_workspace_of_each_block() -> None:
    subnet = SPACE.largest(Precision.INT, 8, 8)
    outside = fixed_bytes(SPACE.shape)
    blocks = real_bytes(SPACE.shape, subnet) - outside
    expected = outside + 2.5 * blocks + activation_bytes(SPACE.shape.blocks[0], 4, 1024) + 7_000_000 + 8 * 40_000
    assert cost(CACHED, SPACE.shape, subnet, 16).memory_bytes == pytest.approx(expected)


def test_what_the_space_does_not_offer_is_named() -> None:
    with pytest.raises(CostError, match="block 0: heads 5 is not in the space; it offers 1, 2, 3, 4"):
        TENSORS[id(TABLE)].total(Subnet((Layer(5, 256, 8, 8), *(None,) * 7), Precision.INT))
    with pytest.raises(CostError, match="steps: expected at least 1"):
        cost_tensors(TABLE, SPACE, 0)
    with pytest.raises(CostError, match="steps: expected at least 1"):
        cost(TABLE, SPACE.shape, SPACE.smallest(), 0)


def test_blocks_with_fewer_choices_repeat_their_last() -> None:
    whole = [replace(block, elastic=False, group="tower") for block in SPACE.shape.blocks[:2]]
    shape = replace(SPACE.shape, blocks=(*whole, *SPACE.shape.blocks[2:]))
    space = SearchSpace(shape, SPACE.config)
    tensors = cost_tensors(modelled_table(ORIN_NX_16GB, space), space, 16)
    assert tensors.latency.shape == (8, 4, 4, 2, 2)
    assert torch.equal(tensors.latency[1], tensors.latency[2, 3:, 3:].expand(4, 4, 2, 2))
    largest = SPACE.largest(Precision.INT, 4, 8)
    assert tensors.total(largest) == TENSORS[id(TABLE)].total(largest)
