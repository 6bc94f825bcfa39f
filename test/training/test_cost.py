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
from training.lut import ExecutedForm, LookUpTable
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
TENSORS = {table.forms: cost_tensors(table, SPACE, 16) for table in (TABLE, CONTAINED)}


def draw(seed: int) -> Subnet:
    return stratified_subnet(SPACE, Generator().manual_seed(seed), whole_network=False)


@pytest.mark.parametrize("table", [TABLE, CONTAINED], ids=["packed", "in containers"])
@given(seed=st.integers(0, 10**6))
def test_tensors_and_table_tell_the_same_cost(table: LookUpTable, seed: int) -> None:
    subnet = draw(seed)
    told, summed = cost(table, SPACE.shape, subnet, 16), TENSORS[table.forms].total(subnet)
    assert summed.latency_ms == pytest.approx(told.latency_ms, rel=1e-6)
    assert summed.memory_bytes == pytest.approx(told.memory_bytes, rel=1e-6)


@given(seed=st.integers(0, 10**6))
def test_the_sum_over_layers_bounds_the_memory_by_less_than_one_activation_buffer(seed: int) -> None:
    subnet, tensors = draw(seed), TENSORS[TABLE.forms]
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
        TENSORS[TABLE.forms].total(largest)


def test_fp8_that_executes_as_fp16_takes_its_memory() -> None:
    fp8, fp16 = (cost(TABLE, SPACE.shape, SPACE.largest(p), 16) for p in (Precision.FP8, Precision.FP16))
    assert fp8 == fp16


def test_a_working_set_beyond_the_cache_adds_time_to_floating_point_networks_only() -> None:
    rows = [
        row
        if row.precision is Precision.INT
        else row.model_copy(update={"working_set_bytes": 10_000_000, "working_set_ms_per_mb": 0.01})
        for row in TABLE.fixed
    ]
    table = TABLE.model_copy(update={"fixed": tuple(rows)})
    largest = SPACE.largest(Precision.FP32)
    weights = real_bytes(SPACE.shape, largest) - fixed_bytes(SPACE.shape, Precision.FP32)
    added = cost(table, SPACE.shape, largest, 16).latency_ms - cost(TABLE, SPACE.shape, largest, 16).latency_ms
    assert added == pytest.approx(16 * 0.01 * (weights / 1e6 - 10))
    small = SPACE.uniform(2, 0.25, 0.25, Precision.FP32, 8, 8)
    assert cost(table, SPACE.shape, small, 16) == cost(TABLE, SPACE.shape, small, 16)
    integer = SPACE.largest(Precision.INT, 8, 8)
    assert cost(table, SPACE.shape, integer, 16) == cost(TABLE, SPACE.shape, integer, 16)


def test_what_the_space_does_not_offer_is_named() -> None:
    with pytest.raises(CostError, match="block 0: heads 5 is not in the space; it offers 1, 2, 3, 4"):
        TENSORS[TABLE.forms].total(Subnet((Layer(5, 256, 8, 8), *(None,) * 7), Precision.INT))
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
    assert tensors.total(largest) == TENSORS[TABLE.forms].total(largest)
