from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.draws import stratified_subnet
from training.predictor import AdvantageError, AdvantagePredictor, ChoiceIndex, rank_correlation
from training.space import SearchSpace
from training.subnet import Subnet


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_choice_numbers_round_trip(space: SearchSpace, small_space: SearchSpace, seed: int) -> None:
    for each in (space, small_space):
        index = ChoiceIndex(each)
        subnet = stratified_subnet(each, torch.Generator().manual_seed(seed), whole_network=False)
        numbers = index.encode(subnet)
        assert index.decode(numbers) == subnet
        assert all(n == index.count or bool(index.offered[block, n]) for block, n in enumerate(numbers))


def test_it_ranks_new_subnets_and_resolves_the_bits_of_one_layer(
    space: SearchSpace, pairs: tuple[list[Subnet], list[float]], true_loss: Callable[[Subnet], float]
) -> None:
    predictor = AdvantagePredictor(space)
    for begin in range(0, len(pairs[0]), 100):
        predictor.observe(pairs[0][begin : begin + 100], pairs[1][begin : begin + 100])
        predictor.fit()
    assert predictor.correlation() > 0.95  # predictions made before the pair was seen
    generator = torch.Generator().manual_seed(9)
    subnets = [stratified_subnet(space, generator, whole_network=False) for _ in range(300)]
    ranks = torch.stack([predictor.predict(subnets), torch.tensor([true_loss(s) for s in subnets]).double()])
    assert torch.corrcoef(ranks.argsort(dim=1).argsort(dim=1).double())[0, 1] > 0.97
    fewest, most = predictor.predict([space.parse("w4a4"), space.parse("w8a8")]).tolist()
    assert 0.3 < (fewest - most) / (true_loss(space.parse("w4a4")) - true_loss(space.parse("w8a8"))) < 2.0


def test_the_expectation_is_exact_for_a_single_subnet_and_a_mean_for_independent_layers(
    space: SearchSpace, pairs: tuple[list[Subnet], list[float]]
) -> None:
    predictor = AdvantagePredictor(space)
    predictor.observe(*pairs)
    predictor.fit()
    index, blocks = predictor.index, len(space.shape.blocks)
    for subnet in pairs[0][:20]:
        certain = torch.zeros(1, blocks, index.count + 1, dtype=torch.float64)
        certain[0, torch.arange(blocks), torch.tensor(index.encode(subnet))] = 1.0
        assert predictor.expected(certain).item() == pytest.approx(predictor.predict([subnet]).item(), abs=1e-12)
    generator = torch.Generator().manual_seed(2)
    marginals = torch.rand(blocks, index.count + 1, generator=generator, dtype=torch.float64).pow(8)
    marginals[:, -1] *= 8  # some blocks are skipped
    marginals = marginals / marginals.sum(dim=1, keepdim=True)
    drawn = torch.multinomial(marginals, 20_000, replacement=True, generator=generator).T
    subnets = [index.decode(numbers) for numbers in drawn.tolist()]
    predictions = predictor.predict(subnets)
    error = predictions.std().item() / len(subnets) ** 0.5
    assert predictor.expected(marginals[None]).item() == pytest.approx(predictions.mean().item(), abs=4 * error)


def test_it_follows_a_loss_that_changes_while_the_network_trains(space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(0)
    predictor = AdvantagePredictor(space, window=200)
    subnet = space.parse("w4a4")
    for level in (0.05, 0.002):
        for _ in range(100):
            others = [stratified_subnet(space, generator, whole_network=False) for _ in range(9)]
            predictor.observe([subnet, *others], [level] * 10)
    predictor.fit()
    assert predictor.predict([subnet]).item() == pytest.approx(0.002, rel=0.3)


def test_whole_network_precisions_have_a_level_of_their_own(space: SearchSpace) -> None:
    predictor = AdvantagePredictor(space)
    names = ["fp8", "w8a8", "fp16"] * 30
    predictor.observe([space.parse(name) for name in names], [0.001, 0.003, -0.001] * 30)
    predictor.fit()
    predicted = predictor.predict([space.parse(name) for name in names[:3]]).tolist()
    assert predicted == pytest.approx([0.001, 0.003, -0.001], abs=2e-4)


def test_the_log_gives_back_what_was_observed(space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(6)
    subnets = [stratified_subnet(space, generator) for _ in range(50)]
    predictor = AdvantagePredictor(space, log=30)
    predictor.observe(subnets, [0.001 * i for i in range(50)])
    assert len(predictor) == 30 and predictor.observed == 50
    assert predictor.pairs() == (subnets[20:], pytest.approx([0.001 * i for i in range(20, 50)]))


def test_losses_that_are_not_finite_are_refused_by_the_subnets_name(space: SearchSpace) -> None:
    predictor = AdvantagePredictor(space)
    with pytest.raises(AdvantageError, match=r"d8-h1-m4-w4a4: expected a finite number, got nan"):
        predictor.observe([space.parse("w4a4")], [float("nan")])
    with pytest.raises(AdvantageError, match=r"expected one per subnet \(1\), got 2"):
        predictor.observe([space.parse("w4a4")], [0.1, 0.2])
    assert len(predictor) == 0


def test_a_state_of_another_space_is_refused(space: SearchSpace, small_space: SearchSpace) -> None:
    with pytest.raises(AdvantageError, match=r"5 blocks, this space has .* over 8"):
        AdvantagePredictor(space).load_state_dict(AdvantagePredictor(small_space).state_dict())


def test_its_reference_follows_lists_of_depths_and_fixed_sizes(space: SearchSpace, small_space: SearchSpace) -> None:
    def skips(changed: SearchSpace) -> list[float]:
        return AdvantagePredictor(changed)._skip_share.tolist()

    assert skips(space) == [0.5] * 8
    listed = {"min_depth": {}, "depths": {"decoder": (2, 6, 8)}}
    config = space.config.model_copy(update=listed | {"always_kept": {"decoder": "first"}})
    assert skips(SearchSpace(space.shape, config)) == pytest.approx([0.0, *[1.0 - (1 + 5 + 7) / 21] * 7])
    tower = replace(small_space.shape.blocks[0], elastic=False)
    shape = replace(small_space.shape, blocks=(tower, tower, *small_space.shape.blocks[2:]))
    config = small_space.config.model_copy(update={"min_depth": {"decoder": 3}})
    assert skips(SearchSpace(shape, config)) == [0.0, 0.0, 0.5, 0.5, 0.5]


def test_blocks_of_two_groups_are_no_neighbours(small_space: SearchSpace) -> None:
    predictor = AdvantagePredictor(small_space)  # two encoder blocks, three of the decoder
    assert predictor._neighbours.tolist() == [0, 2, 3]


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 300.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 1.0, 1.0], [3.0, 2.0, 1.0]) is None
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None


def test_alike_outcomes_correlate_with_nothing(space: SearchSpace, pairs: tuple[list[Subnet], list[float]]) -> None:
    predictor = AdvantagePredictor(space)
    predictor.observe(pairs[0][:20], [0.1] * 20)
    assert predictor.correlation() == 0.0
