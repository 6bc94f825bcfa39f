from __future__ import annotations

from collections import Counter
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.draws import Phase, stratified_subnet, tilted
from training.space import SearchSpace
from training.space_counts import flops, mean_bits
from training.subnet import Precision


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), bits=st.booleans(), width=st.booleans(), depth=st.booleans())
def test_draws_are_in_the_space_and_repeat_with_the_generator(
    space: SearchSpace, seed: int, bits: bool, width: bool, depth: bool
) -> None:
    phase = Phase(bits, width, depth)
    subnet = stratified_subnet(space, torch.Generator().manual_seed(seed), phase)
    space.check(subnet)
    assert subnet == stratified_subnet(space, torch.Generator().manual_seed(seed), phase)
    largest = space.largest()
    for layer, full in zip(subnet.layers, largest.layers, strict=True):
        assert layer is not None or depth
        if layer is not None and full is not None:
            assert width or (layer.heads, layer.mlp) == (full.heads, full.mlp)
            assert bits or (layer.w, layer.a) == (8, 8)


def test_groups_keep_their_least_depth(small_space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        small_space.check(stratified_subnet(small_space, generator))


@pytest.mark.parametrize(("which", "ends"), [("first", {0}), ("ends", {0, 7})])
def test_blocks_that_are_always_kept_are_never_skipped_and_the_others_evenly(
    space: SearchSpace, which: Literal["first", "ends"], ends: set[int]
) -> None:
    config = space.config.model_copy(update={"always_kept": {"decoder": which}})
    fixed, generator = SearchSpace(space.shape, config), torch.Generator().manual_seed(1)
    skipped: Counter[int] = Counter()
    for _ in range(600):
        subnet = stratified_subnet(fixed, generator)
        fixed.check(subnet)
        skipped.update(set(range(8)) - set(subnet.kept))
    assert set(skipped) == set(range(8)) - ends
    assert max(skipped.values()) < 1.3 * min(skipped.values())


def test_depths_are_drawn_evenly(space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(1)
    depths = Counter(stratified_subnet(space, generator).depth for _ in range(2100))
    assert sorted(depths) == list(range(2, 9))
    assert min(depths.values()) > 220 and max(depths.values()) < 380


def test_the_extremes_are_not_starved(space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(2)
    subnets = [stratified_subnet(space, generator, whole_network=False) for _ in range(2000)]
    full = flops(space.shape, space.largest())[1]
    shares = torch.tensor([flops(space.shape, subnet)[1] / full for subnet in subnets])
    assert shares.quantile(0.99) > 0.85  # 0.59 for independent draws
    bits = [mean_bits(space.shape, subnet) for subnet in subnets]
    assert sum(b == 4 for b in bits) > 60 and sum(b == 8 for b in bits) > 60
    uniform = [len({(s.w, s.a) for s in subnet.layers if s is not None}) == 1 for subnet in subnets]
    assert sum(uniform) > 100


def test_whole_network_precisions_are_drawn_only_where_wanted(space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(4)
    drawn = Counter(stratified_subnet(space, generator).precision for _ in range(1000))
    assert set(drawn) == set(Precision) and 0.08 < 1 - drawn[Precision.INT] / 1000 < 0.17
    for phase, whole in ((Phase(bits=False), True), (Phase(), False)):
        drawn = Counter(stratified_subnet(space, generator, phase, whole_network=whole).precision for _ in range(100))
        assert set(drawn) == {Precision.INT}


@given(
    choices=st.lists(st.integers(1, 2000), min_size=1, max_size=6, unique=True).map(sorted),
    target=st.floats(0.0, 1.0),
)
def test_tilted_probabilities_have_the_wanted_mean(choices: list[int], target: float) -> None:
    probabilities = tilted(choices, target)
    assert sum(probabilities) == pytest.approx(1.0) and min(probabilities) >= 0.0
    if len(choices) > 1:
        mean = sum(p * c for p, c in zip(probabilities, choices, strict=True))
        assert (mean - choices[0]) / (choices[-1] - choices[0]) == pytest.approx(target, abs=1e-3)
