from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.conditions import Conditions
from training.draws import stratified_subnet
from training.search.nsga import Genes, Genetics, evolve
from training.search.nsga import _Mutation as Mutation
from training.space import SearchSpace
from training.subnet import Precision, Subnet


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_repaired_genes_are_canonical_genes_of_the_space(space: SearchSpace, seed: int) -> None:
    genes, random = Genes(space), np.random.default_rng(seed)
    rows = genes.repaired(random.integers(0, genes.sizes, size=(20, len(genes.sizes))), random)
    subnets = genes.decode(rows)
    for subnet in subnets:
        space.check(subnet)
        assert subnet.precision is Precision.INT
    assert np.array_equal(genes.encode(subnets), rows)
    assert np.array_equal(genes.repaired(rows, random), rows)


LISTED = {"min_depth": {}, "depths": {"decoder": (2, 5, 8)}, "always_kept": {"decoder": "ends"}}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_repaired_genes_keep_a_number_of_blocks_from_the_list(space: SearchSpace, seed: int) -> None:
    listed = SearchSpace(space.shape, space.config.model_copy(update=LISTED))
    genes, random = Genes(listed), np.random.default_rng(seed)
    rows = genes.repaired(random.integers(0, genes.sizes, size=(20, len(genes.sizes))), random)
    assert {subnet.depth for subnet in genes.decode(rows)} <= {2, 5, 8}  # decoding checks the ends, too
    assert np.array_equal(genes.repaired(rows, random), rows)


def test_repairs_leave_the_bits_of_blocks_of_fixed_size_alone(space: SearchSpace) -> None:
    tower = replace(space.shape.blocks[0], group="tower", elastic=False)
    shape = replace(space.shape, blocks=(tower, tower, *space.shape.blocks[2:]))
    partly = SearchSpace(shape, space.config.model_copy(update={"always_kept": {}}))
    genes, random = Genes(partly), np.random.default_rng(0)
    rows = genes.encode([partly.largest(Precision.INT)]).repeat(50, 0)
    genes.blocks(rows)[:, :2, 0] = 0
    assert genes.decode(genes.repaired(rows, random)) == [partly.largest(Precision.INT)] * 50


def test_a_number_between_two_of_the_list_goes_to_the_nearer_one_more_often(space: SearchSpace) -> None:
    listed = SearchSpace(space.shape, space.config.model_copy(update=LISTED))
    genes, random = Genes(listed), np.random.default_rng(0)
    rows = genes.encode([listed.largest(Precision.INT)]).repeat(600, 0)
    genes.blocks(rows)[:, 3, 0] = 0
    depths = [subnet.depth for subnet in genes.decode(genes.repaired(rows, random))]
    assert set(depths) == {5, 8} and 340 < depths.count(8) < 460  # two thirds


def test_a_search_repeats_with_its_seed_and_improves(space: SearchSpace, conditions: Conditions, made_up) -> None:
    condition = conditions.between("orin", 0.5)
    budgets = (condition.latency_ms, condition.memory_bytes)
    seen: list[Subnet] = []

    def objectives(subnets: list[Subnet]) -> np.ndarray:
        seen.extend(subnets)
        costs = [condition.costs.total(subnet) for subnet in subnets]
        return np.array(
            [(made_up.distance(s), c.latency_ms, c.memory_bytes) for s, c in zip(subnets, costs, strict=True)]
        )

    def best(generations: int, seed: int = 3) -> tuple[float, list[Subnet]]:
        seen.clear()
        evolve(space, [], objectives, budgets, Genetics(32, generations, seed))
        fitting = [subnet for subnet in seen if condition.fits(subnet)]
        return min(made_up.distance(subnet) for subnet in fitting), list(seen)

    assert best(12)[1] == best(12)[1]
    assert best(12)[1] != best(12, seed=4)[1]
    assert best(40)[0] < 0.8 * best(2)[0]


def test_given_networks_are_in_the_first_generation(space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(0)
    given_networks = [stratified_subnet(space, generator, whole_network=False) for _ in range(5)]
    seen: list[Subnet] = []

    def objectives(subnets: list[Subnet]) -> np.ndarray:
        seen.extend(subnets)
        return np.ones((len(subnets), 3))

    evolve(space, given_networks, objectives, (2.0, 2.0), Genetics(8, 2))
    assert set(given_networks) <= set(seen[:8])


def test_one_gene_changes_on_average_and_blocks_that_come_back_are_of_any_width(space: SearchSpace) -> None:
    genes, random = Genes(space), np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    rows = genes.encode([stratified_subnet(space, generator, whole_network=False) for _ in range(400)])
    mutated = Mutation(genes, random)._do(None, rows)
    before, after = genes.blocks(rows), genes.blocks(mutated)
    back = (before[..., 0] == 0) & (after[..., 0] == 1)
    changed = (before != after) & ~back[..., None]
    assert 0.8 < changed.sum() / len(rows) + back.sum() / len(rows) < 1.25
    assert after[back][:, 1].mean() > 1.0  # heads, 0 to 3


def test_a_space_smaller_than_the_population_is_searched_to_its_end(space: SearchSpace) -> None:
    config = space.config.model_copy(
        update={"min_depth": {"decoder": 8}, "head_ratios": (1.0,), "mlp_ratios": (0.5, 1.0), "weight_bits": (8,)}
    )
    small = SearchSpace(space.shape, config.model_copy(update={"activation_bits": (8,)}))
    seen: set[Subnet] = set()

    def objectives(subnets: list[Subnet]) -> np.ndarray:
        seen.update(subnets)
        return np.array([(sum(layer.mlp for layer in s.layers if layer), 1.0, 1.0) for s in subnets], dtype=float)

    evolve(small, [], objectives, (2.0, 2.0), Genetics(300, 30))
    assert len(seen) > 0.9 * 2**8
