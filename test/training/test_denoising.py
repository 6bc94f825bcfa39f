"""The update on tensors is that of the loop that robots run."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from dcqfa_ros.bundle.schema import DiffusionSpec
from dcqfa_ros.runtime.denoising import DenoisingLoop
from training.denoising import SamplerUpdate


def _spec(sampler: Literal["ddim", "ddpm"]) -> DiffusionSpec:
    return DiffusionSpec(
        train_timesteps=100,
        beta_schedule="squared_cosine",
        prediction="epsilon",
        clip_sample=1.0,
        sampler=sampler,
        steps=5,
    )


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_chunk_is_denoised_as_the_runtime_does_it(sampler: Literal["ddim", "ddpm"]) -> None:
    spec = _spec(sampler)
    rng = np.random.default_rng(0)
    loop, update = DenoisingLoop(spec, tokens=3, action_dim=2, batch=4), SamplerUpdate(spec, 5)
    loop.sample[:] = rng.standard_normal(loop.sample.shape, np.float32)
    x = torch.from_numpy(loop.sample.copy())
    assert update.timesteps.tolist() == loop.timesteps.tolist()
    for index in range(5):
        predicted, fresh = (rng.standard_normal(loop.sample.shape, np.float32) for _ in range(2))
        loop.prediction[:] = predicted
        loop.step(index, fresh)
        x = update(x, torch.from_numpy(predicted), index, torch.from_numpy(fresh))
        np.testing.assert_allclose(x.numpy(), loop.sample, atol=1e-6)
    assert (update.sigma > 0).any() == (sampler == "ddpm")


def test_gradients_flow_where_the_clean_sample_is_not_clipped() -> None:
    spec = _spec("ddim")
    x = torch.tensor([0.1, 1e6]).view(1, 2, 1).requires_grad_()
    SamplerUpdate(spec, 5)(x, torch.zeros(1, 2, 1), 4).sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0, 0] != 0.0
    assert x.grad[0, 1, 0] == 0.0
