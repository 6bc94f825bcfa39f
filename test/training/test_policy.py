from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.config import load_config
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig, parameter_count

ROOT = Path(__file__).parents[2]
TINY = DiffusionPolicyTConfig(depth=2, heads=2, dim=32, ffn_ratio=2)


@pytest.fixture
def network() -> DiffusionPolicyT:
    torch.manual_seed(0)
    network = DiffusionPolicyT(TINY).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(batch, TINY.horizon, TINY.action_dim, generator=generator)
    return noisy, torch.randint(100, (1,), generator=generator), torch.randn(batch, 2, 20, generator=generator)


def test_the_published_key_point_network_has_8965122_parameters() -> None:
    config = load_config(ROOT / "config/training/pusht_keypoints.yaml").policy
    assert parameter_count(DiffusionPolicyT(config)) == 8_965_122


@torch.no_grad()
def test_the_three_parts_compose_to_the_whole_network(network: DiffusionPolicyT) -> None:
    noisy, timestep, observation = inputs()
    whole = network(noisy, timestep.expand(3), observation)
    parts = network.denoise(noisy, network.timestep_keys_values(timestep), network.observation_keys_values(observation))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 9, 15])
def test_fewer_tokens_give_the_same_noise_for_those_computed(network: DiffusionPolicyT, tokens: int) -> None:
    noisy, timestep, observation = inputs()
    kv = network.timestep_keys_values(timestep), network.observation_keys_values(observation)
    torch.testing.assert_close(
        network.denoise(noisy[:, :tokens], *kv), network.denoise(noisy, *kv)[:, :tokens], rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_the_first_action_does_not_see_the_newest_observation(network: DiffusionPolicyT) -> None:
    noisy, timestep, observation = inputs()
    changed = observation.clone()
    changed[:, 1] += 1.0  # memory is [t, o_-1, o_0]; action 0 sees t and o_-1
    before, after = (network(noisy, timestep.expand(3), o) for o in (observation, changed))
    torch.testing.assert_close(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1:], after[:, 1:], atol=1e-3)
