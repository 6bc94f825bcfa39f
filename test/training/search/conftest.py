"""A space, a modelled device and a made-up distance of its networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from training.conditions import Conditions
from training.cost import cost_tensors
from training.modelled_tables import ORIN_NX_16GB, modelled_table
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.search.teacher_distance import DistanceSource, TeacherDistance
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.subnet import Subnet
from training.supernet_checkpoint import load_supernet

QUARTERS = (0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="session")
def space() -> SearchSpace:
    """The space of the key-point policy, its first block always kept."""
    config = SpaceConfig(
        min_depth={"decoder": 2}, always_kept={"decoder": "first"}, head_ratios=QUARTERS, mlp_ratios=QUARTERS
    )
    return SearchSpace(diffusion_policy_t_shape(DiffusionPolicyTConfig(), 9), config)


@pytest.fixture(scope="session")
def conditions(space: SearchSpace) -> Conditions:
    """One modelled device."""
    return Conditions(space, {"orin": cost_tensors(modelled_table(ORIN_NX_16GB, space), space, 16)}, [])


class MadeUpDistance:
    """A distance that every layer adds to, and the networks it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Subnet] = []

    def distance(self, subnet: Subnet) -> float:
        total = 0.0
        for index, layer in enumerate(subnet.layers):
            if layer is None:
                total += 0.01 * (8 - index)
                continue
            total += 0.002 * (4 - layer.heads) + 0.001 * (4 - layer.mlp // 256)
            total += 0.0004 * (layer.w == 4) + 0.0008 * (layer.a == 4)
        return 1e-4 + total

    def __call__(self, subnets: Sequence[Subnet]) -> Iterator[float]:
        for subnet in subnets:
            self.asked.append(subnet)
            yield self.distance(subnet)


@pytest.fixture
def made_up() -> MadeUpDistance:
    """A fresh one."""
    return MadeUpDistance()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """This process computes as those that measure do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def teacher_distance(supernet_run: Path, one_thread: None) -> TeacherDistance:
    """The distance of the tiny supernet's subnets on eight windows."""
    supernet = load_supernet(supernet_run)
    return TeacherDistance(DistanceSource(supernet.path, supernet.meaning.config, 8), supernet)


@pytest.fixture
def four_subnets(teacher_distance: TeacherDistance) -> list[Subnet]:
    """Subnets of the tiny supernet with four different distances."""
    return [teacher_distance.supernet.space.parse(name) for name in ("largest", "w8a8", "w4a4", "smallest")]
