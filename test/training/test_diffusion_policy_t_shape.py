from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig, parameter_count
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.policy_shape import PolicyShape, linear_size
from training.space_counts import flops, parameters
from training.subnet import Layer, Precision, Subnet

configs = st.builds(
    lambda heads, half, **sizes: DiffusionPolicyTConfig(heads=heads, dim=2 * half * heads, **sizes),
    heads=st.integers(1, 4),
    half=st.integers(4, 6),
    observation_dim=st.integers(1, 6),
    action_dim=st.integers(1, 4),
    horizon=st.integers(2, 7),
    observation_horizon=st.integers(1, 3),
    depth=st.integers(1, 3),
    ffn_ratio=st.integers(1, 4),
)


def whole(shape: PolicyShape) -> Subnet:
    """The policy at full size."""
    return Subnet(tuple(Layer(block.heads, block.mlp, 32, 32) for block in shape.blocks), Precision.FP32)


def test_the_published_key_point_network_has_8965122_parameters() -> None:
    shape = diffusion_policy_t_shape(DiffusionPolicyTConfig())
    assert parameters(shape, whole(shape)) == 8_965_122
    assert (shape.backbone, len(shape.blocks), shape.blocks[7].name) == ("diffusion_policy_t", 8, "blocks.7")


@settings(deadline=None, max_examples=25)
@given(configs)
def test_the_shape_has_the_parameters_of_the_network(config: DiffusionPolicyTConfig) -> None:
    network, shape = DiffusionPolicyT(config), diffusion_policy_t_shape(config)
    assert parameters(shape, whole(shape)) == parameter_count(network)
    for block in shape.blocks:
        module = network.get_submodule(block.name)
        linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
        assert linears.keys() == {linear.name for linear in block.linears}
        for linear in block.linears:
            assert linear_size(block, linear, Layer(block.heads, block.mlp, 8, 8)) == (
                linears[linear.name].in_features,
                linears[linear.name].out_features,
            )
            assert linear.bias == (linears[linear.name].bias is not None)


@settings(deadline=None, max_examples=15)
@given(configs, st.data())
def test_operations_are_those_that_pytorch_counts(config: DiffusionPolicyTConfig, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, config.horizon))
    network, shape = DiffusionPolicyT(config).eval(), diffusion_policy_t_shape(config, tokens)
    with torch.no_grad():
        time = network.timestep_keys_values(torch.zeros(1, dtype=torch.long))
        observation = torch.zeros(1, config.observation_horizon, config.observation_dim)
        with FlopCounterMode(display=False) as per_chunk:
            keys_values = network.observation_keys_values(observation)
        with FlopCounterMode(display=False) as per_step:
            network.denoise(torch.zeros(1, tokens, config.action_dim), time, keys_values)
    assert flops(shape, whole(shape)) == (per_chunk.get_total_flops(), per_step.get_total_flops())


def test_fewer_tokens_change_the_work_but_not_the_network() -> None:
    config = DiffusionPolicyTConfig()
    short, full = diffusion_policy_t_shape(config, 9), diffusion_policy_t_shape(config)
    assert {block.tokens for block in short.blocks} == {9}
    assert parameters(short, whole(short)) == parameters(full, whole(full))
    chunk, step = flops(short, whole(short))
    assert chunk == flops(full, whole(full))[0] and step < flops(full, whole(full))[1]


def test_only_keys_and_values_of_the_observations_run_once_per_chunk() -> None:
    block = diffusion_policy_t_shape(DiffusionPolicyTConfig()).blocks[0]
    assert {(linear.name, linear.tokens) for linear in block.linears if linear.stage == "chunk"} == {
        ("cross_attn.k", 2),
        ("cross_attn.v", 2),
    }
    assert block.memory_tokens == 3  # the time token besides


@pytest.mark.parametrize("tokens", [0, 17])
def test_tokens_beyond_the_horizon_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"tokens: expected 1 to the horizon 16, got {tokens}"):
        diffusion_policy_t_shape(DiffusionPolicyTConfig(), tokens)
