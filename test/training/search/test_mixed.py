from __future__ import annotations

from collections.abc import Sequence

import pytest

from training.search.mixed import LEVELS, average_bits, greedy_path, search_bits, whole_space
from training.search.nsga import Genetics
from training.space import SearchSpace
from training.subnet import Precision, Subnet


def costly(subnet: Subnet) -> float:
    """Late blocks suffer most, activations more than weights, and neighbours at four bits more than alone."""
    total, before = 1e-4, False
    for index, layer in enumerate(subnet.layers):
        assert layer is not None
        total += 1e-3 * (index + 1) * ((layer.w == 4) + 3 * (layer.a == 4))
        both = layer.a == 4
        total += 0.02 * (both and before)
        before = both
    return total


def distances(subnets: Sequence[Subnet]) -> list[float]:
    return [costly(subnet) for subnet in subnets]


def test_only_bits_vary(space: SearchSpace) -> None:
    whole = whole_space(space)
    assert set(whole.gene_sizes[1:]) == {1, 2} and whole.shallowest == (8,)
    largest = space.largest(Precision.INT, 4, 8)
    assert whole.name(largest) == space.name(largest)


@pytest.mark.parametrize(("name", "bits"), [("w8a8", 8.0), ("w4a4", 4.0), ("w4a8", 6.0), ("w8a4", 6.0)])
def test_average_bits_are_those_of_weights_and_activations(space: SearchSpace, name: str, bits: float) -> None:
    assert average_bits(space, space.parse(name)) == pytest.approx(bits)


def test_greedy_allocation_demotes_what_hurts_least_first(space: SearchSpace) -> None:
    path = greedy_path(whole_space(space), distances)
    assert len(path) == 17
    assert space.name(path[0]) == space.name(space.parse("w8a8"))
    assert space.name(path[-1]) == space.name(space.parse("w4a4"))
    bits = [average_bits(space, subnet) for subnet in path]
    assert bits == sorted(bits, reverse=True)
    assert [layer.w for layer in path[1].layers if layer] == [4, 8, 8, 8, 8, 8, 8, 8]
    assert all(layer is not None and layer.w == 4 for layer in path[10].layers[:6])


def test_the_search_is_nowhere_worse_than_greedy_or_uniform_allocation(space: SearchSpace) -> None:
    outcome = search_bits(space, distances, Genetics(40, 30, 0))
    rows = outcome.compared()
    assert [row["bits"] for row in rows] == list(LEVELS)
    for row in rows:
        assert row["searched"]["bits"] <= row["bits"] + 1e-6
        for method in ("greedy", "uniform"):
            assert row["searched"]["distance"] <= row[method]["distance"] + 1e-12
    middle = rows[2]
    assert middle["searched"]["distance"] < 0.9 * middle["uniform"]["distance"]
    assert [a.bits for a in outcome.searched] == sorted(a.bits for a in outcome.searched)
    better = [a.distance for a in outcome.searched]
    assert better == sorted(better, reverse=True)
