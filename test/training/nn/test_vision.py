from __future__ import annotations

import pytest
import torch

from training.nn.vision import ImageConfig, ImageEncoder, encoder_flops, encoder_parameters, spatial_softmax
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig, parameter_count
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.space_counts import parameters
from training.subnet import Layer, Precision, Subnet

TINY = ImageConfig(height=36, width=40, crop=34, channels=16, keypoints=4, features=6)
POLICY = DiffusionPolicyTConfig(
    observation_dim=2, horizon=6, depth=2, heads=2, dim=32, ffn_ratio=2, attention_dropout=0.0, image=TINY
)


def test_the_published_image_policy_has_its_number_of_parameters() -> None:
    config = DiffusionPolicyTConfig(observation_dim=2, horizon=10, attention_dropout=0.3, image=ImageConfig())
    with torch.device("meta"):
        assert parameter_count(DiffusionPolicyT(config)) == 20_172_450
    shape = diffusion_policy_t_shape(config)
    whole = Subnet((Layer(4, 1024, 32, 32),) * 8, Precision.FP32)
    assert parameters(shape, whole) == 20_172_450
    without = diffusion_policy_t_shape(DiffusionPolicyTConfig(observation_dim=66, horizon=10))
    assert shape.fixed_parameters - without.fixed_parameters == 11_197_088
    assert shape.fixed_flops_chunk - without.fixed_flops_chunk == 2 * encoder_flops(ImageConfig())
    assert shape.blocks == without.blocks


def test_the_counts_are_those_of_the_network() -> None:
    encoder = ImageEncoder(TINY)
    assert parameter_count(encoder) == encoder_parameters(TINY)
    counted = 0

    def count(module: torch.nn.Conv2d, args: object, output: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * module.weight.numel() * output.shape[-1] * output.shape[-2]

    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    assert encoder(torch.zeros(1, 3, 34, 34)).shape == (1, 6)
    assert counted + 2 * encoder.head.weight.numel() == encoder_flops(TINY)


def test_a_spatial_softmax_finds_where_a_map_is_active() -> None:
    maps = torch.full((1, 3, 5, 7), -50.0)
    maps[0, 0, 0, 6] = 50.0  # top right
    maps[0, 1, 4, 3] = 50.0  # bottom middle
    maps[0, 2] = 1.0  # everywhere
    expected = torch.tensor([[[1.0, -1.0], [0.0, 1.0], [0.0, 0.0]]])
    torch.testing.assert_close(spatial_softmax(maps), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(spatial_softmax(maps + 3.0), expected, atol=1e-6, rtol=0)
    assert spatial_softmax(maps.bfloat16()).dtype == torch.float32


def test_a_crop_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="crop 41 exceeds"):
        ImageConfig(height=48, width=40, crop=41)


def test_images_become_condition_tokens_of_both_policies() -> None:
    torch.manual_seed(0)
    plain = DiffusionPolicyT(POLICY).eval()
    elastic = ElasticDiffusionPolicyT(POLICY).eval()
    elastic.load_state_dict(plain.state_dict(), strict=False)
    observation = torch.randn(3, 2, POLICY.input_dim)
    noisy, timesteps = torch.randn(3, 6, 2), torch.tensor([0, 40, 99])
    expected = plain(noisy, timesteps, observation)
    torch.testing.assert_close(elastic(noisy, timesteps, observation), expected)
    split = plain.denoise(noisy, plain.timestep_keys_values(timesteps), plain.observation_keys_values(observation))
    torch.testing.assert_close(split, expected, atol=1e-5, rtol=1e-5)
    images = observation[..., 2:].reshape(6, 3, 34, 34)
    assert plain.image_encoder is not None
    joined = torch.cat([observation[..., :2], plain.image_encoder(images).reshape(3, 2, 6)], dim=-1)
    torch.testing.assert_close(plain.conditions(observation), joined)
    subnet = Subnet((Layer(1, 32, 8, 8), None), Precision.INT)
    alone = elastic.extract(subnet)
    elastic.activate(subnet)
    assert torch.equal(alone(noisy, timesteps, observation), elastic(noisy, timesteps, observation))


def test_a_policy_of_key_points_has_no_encoder() -> None:
    config = DiffusionPolicyTConfig()
    assert config.input_dim == config.condition_dim == 20
    with torch.device("meta"):
        network = DiffusionPolicyT(config)
    assert not any(name.startswith("image_encoder") for name in network.state_dict())
