"""The derivative that guided chunks run on the robot is the one PyTorch computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dcqfa_ros.bundle.schema import DiffusionSpec
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.ort_pullback import OnnxRuntimePullback
from training.export.calibration import quantize_policy
from training.export.diffusion_policy_t import export_graphs
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.torch_engine import TorchEngine

SMALL = {"depth": 2, "heads": 2, "dim": 32, "ffn_ratio": 2}


def make_network(prefix: int = 0) -> DiffusionPolicyT:
    torch.manual_seed(0)
    network = DiffusionPolicyT(DiffusionPolicyTConfig(**SMALL, prefix=prefix)).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return network


@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 16), (3, 9)])
def test_the_derived_graph_agrees_with_autograd(prefix: int, batch: int, tokens: int) -> None:
    network = make_network(prefix)
    generator = np.random.default_rng(tokens)
    channels = 2 + (prefix > 0)
    noisy, cotangent = (generator.standard_normal((batch, tokens, n)).astype(np.float32) for n in (channels, 2))
    observation = generator.uniform(-1, 1, (batch, 2, 20)).astype(np.float32)
    ours = TorchEngine(network)
    kv = ours.timestep_kv(np.array([37])).copy(), ours.observation_kv(observation).copy()
    leaf = torch.from_numpy(noisy).requires_grad_(True)
    prediction = network.denoise(leaf, *(torch.from_numpy(array) for array in kv))
    (expected,) = torch.autograd.grad(prediction, leaf, torch.from_numpy(cotangent))
    pullback = OnnxRuntimePullback(export_graphs(network, 100)["denoiser"], name="fp32")
    gradient = pullback.pull(noisy, *kv, cotangent)
    assert gradient.shape == noisy.shape and float(expected.abs().max()) > 1e-3
    np.testing.assert_allclose(gradient, expected.numpy(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_quantized_export_has_no_derivative(quantized_denoiser: bytes) -> None:
    with pytest.raises(EngineError, match=r"has no derivative here.*choose a variant in floating point"):
        OnnxRuntimePullback(quantized_denoiser, name="w8a8")


@pytest.fixture(scope="module")
def quantized_denoiser() -> bytes:
    diffusion = DiffusionSpec(
        train_timesteps=100,
        beta_schedule="squared_cosine",
        prediction="epsilon",
        clip_sample=1.0,
        sampler="ddim",
        steps=4,
    )
    observations = np.random.default_rng(0).uniform(-1, 1, (16, 2, 20)).astype(np.float32)
    return export_graphs(quantize_policy(make_network(), diffusion, observations, threads=1), 100)["denoiser"]
