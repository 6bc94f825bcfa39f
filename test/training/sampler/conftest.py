"""A search space with made-up devices, and a made-up loss of its subnets."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from training.conditions import Conditions
from training.cost import CostTensors, cost_tensors
from training.draws import stratified_subnet
from training.modelled_tables import ORIN_NX_16GB, modelled_table
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.policy_shape import BlockShape, LinearShape, PolicyShape
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.subnet import Subnet
from training.synthetic_tables import synthetic_tensors

QUARTERS = (0.25, 0.5, 0.75, 1.0)
NOISE = 0.0002  # paired spread
BITS = 0.0005  # effect of one layer's bits
Loss = Callable[[Subnet], float]


@pytest.fixture(scope="session")
def space() -> SearchSpace:
    """The space of the key-point policy."""
    config = SpaceConfig(min_depth={"decoder": 2}, head_ratios=QUARTERS, mlp_ratios=QUARTERS)
    return SearchSpace(diffusion_policy_t_shape(DiffusionPolicyTConfig(), 9), config)


@pytest.fixture(scope="session")
def small_space() -> SearchSpace:
    """Two encoder and three decoder blocks with two head counts, the decoder's at two widths: few enough to count."""

    def block(index: int, group: str, heads: int) -> BlockShape:
        linears = (
            LinearShape("o", heads * 4, 8, "heads", "full", True, "step", 5),
            LinearShape("fc1", 8, 16, "full", "mlp", True, "step", 5),
        )
        return BlockShape(f"blocks.{index}", group, group, 8, heads, 4, 16, 5, 0, linears, 16)

    blocks = (*(block(i, "encoder", 2) for i in range(2)), *(block(2 + i, "decoder", 4) for i in range(3)))
    config = SpaceConfig(
        min_depth={"encoder": 1, "decoder": 2},
        head_ratios=(0.5, 1.0),
        mlp_ratios=(1.0,),
        weight_bits=(4, 8),
        activation_bits=(8,),
    )
    return SearchSpace(PolicyShape("small", blocks, 10, 0, 0), config)


@pytest.fixture(scope="session")
def synthetic(space: SearchSpace) -> list[CostTensors]:
    """Made-up devices; training takes all but the last two."""
    return synthetic_tensors(space, torch.Generator().manual_seed(3), 402)


@pytest.fixture(scope="session")
def devices(space: SearchSpace, synthetic: list[CostTensors]) -> dict[str, CostTensors]:
    """A modelled device and two that stand for measured ones."""
    orin = cost_tensors(modelled_table(ORIN_NX_16GB, space), space, 16)
    return {"orin": orin, "first": synthetic[-2], "unseen": synthetic[-1]}


@pytest.fixture(scope="session")
def conditions(space: SearchSpace, devices: dict[str, CostTensors], synthetic: list[CostTensors]) -> Conditions:
    """Devices to train on, one held out."""
    return Conditions(space, devices, synthetic[:-2], held_out="unseen")


@pytest.fixture(scope="session")
def true_loss() -> Loss:
    """What a subnet loses: sensitivities of its layers, more where neighbours are skipped or both operands are few."""
    generator = torch.Generator().manual_seed(5)
    skip = (0.004 + 0.02 * torch.rand(8, generator=generator)).tolist()
    narrow = (0.004 * torch.rand(8, 2, generator=generator)).tolist()
    bits = (BITS * (0.5 + torch.rand(8, 2, generator=generator))).tolist()

    def loss(subnet: Subnet) -> float:
        total, skipped, before = 0.0, 0, False
        for index, layer in enumerate(subnet.layers):
            if layer is None:
                total += skip[index] * (1.5 if before else 1.0)
                skipped, before = skipped + 1, True
                continue
            before = False
            total += narrow[index][0] * (1 - layer.heads / 4) ** 2 + narrow[index][1] * (1 - layer.mlp / 1024) ** 2
            total += bits[index][0] * (layer.w == 4) + bits[index][1] * (layer.a == 4)
            total += 0.5 * BITS * (layer.w == layer.a == 4)
        return total + 0.002 * max(0, skipped - 3) ** 2

    return loss


@pytest.fixture(scope="session")
def pairs(space: SearchSpace, true_loss: Loss) -> tuple[list[Subnet], list[float]]:
    """Subnets and noisy losses as a run would log them."""
    generator = torch.Generator().manual_seed(7)
    subnets = [stratified_subnet(space, generator, whole_network=False) for _ in range(600)]
    noise = torch.randn(len(subnets), generator=generator).tolist()
    losses = [true_loss(subnet) + NOISE * value for subnet, value in zip(subnets, noise, strict=True)]
    assert all(math.isfinite(loss) for loss in losses)
    return subnets, losses
