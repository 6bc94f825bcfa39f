"""Noise levels and coefficients of the consistency sampler; the others' agree with diffusers (test_denoising.py)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.bundle.schema import DiffusionSpec, consistency_levels
from dcqfa_ros.runtime.denoising import DenoisingLoop, SamplerCoefficients
from dcqfa_ros.runtime.schedule import (
    alphas_cumprod,
    consistency_boundary,
    consistency_timesteps,
    squared_cosine_betas,
)


def spec(steps: int = 4, train_timesteps: int = 100, prefix: int = 0) -> DiffusionSpec:
    return DiffusionSpec(
        train_timesteps=train_timesteps,
        beta_schedule="squared_cosine",
        prediction="epsilon",
        clip_sample=1.0,
        sampler="consistency",
        steps=steps,
        prefix=prefix,
    )


@given(st.integers(1, 300), st.data())
def test_steps_descend_from_the_highest_level_in_equal_parts(levels: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, levels))
    timesteps = consistency_timesteps(levels, steps)
    assert timesteps.shape == (steps,) and timesteps.dtype == np.int64
    assert timesteps[0] == levels - 1 and timesteps[-1] >= 0
    parts = -np.diff(np.append(timesteps, -1))
    assert parts.min() >= 1 and parts.max() - parts.min() <= 1


def test_four_and_two_steps_of_a_hundred_levels() -> None:
    assert consistency_timesteps(consistency_levels(100), 4).tolist() == [89, 67, 44, 22]
    assert consistency_timesteps(consistency_levels(100), 2).tolist() == [89, 44]


@pytest.mark.parametrize("steps", [0, 91])
def test_steps_beyond_the_levels_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 90, got {steps}"):
        SamplerCoefficients.of(spec(), steps)


def test_the_clean_sample_is_returned_as_it_is_and_noisier_ones_are_predicted() -> None:
    skip, out = consistency_boundary(np.array([-1, 0, 99]))
    assert (skip[0], out[0]) == (1.0, 0.0)
    assert np.all(skip[1:] < 0.01) and np.all(out[1:] > 0.99)
    assert skip[1] > skip[2] and out[1] < out[2]


@given(st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_a_step_is_the_consistency_function_and_the_noise_of_the_next_level(steps: int, seed: int) -> None:
    c = SamplerCoefficients.of(spec(), steps)
    alpha_bar = alphas_cumprod(squared_cosine_betas(100))
    generator = np.random.default_rng(seed)
    x, eps = generator.standard_normal((2, steps))
    signal, sigma = np.sqrt(alpha_bar[c.timesteps]), np.sqrt(1.0 - alpha_bar[c.timesteps])
    skip, out = consistency_boundary(c.timesteps)
    expected = skip * x + out * (x - sigma * eps) / signal
    np.testing.assert_allclose(c.from_sample * x + c.from_noise * eps, expected, rtol=1e-5, atol=1e-4)
    following = np.append(alpha_bar[c.timesteps[1:]], 1.0)
    np.testing.assert_allclose(c.to_clean**2, following, atol=1e-6)
    np.testing.assert_allclose(c.sigma**2, 1.0 - following, atol=1e-6)
    assert not c.to_direction.any() and c.sigma[-1] == 0.0 and c.to_clean[-1] == 1.0


class KnowsTheAnswer:
    """An engine whose noise is what makes every sample mean one clean chunk."""

    name = "stand-in"

    def __init__(self, clean: np.ndarray) -> None:
        self.clean, self.levels, self.inputs = clean, [], []
        self.alpha_bar = alphas_cumprod(squared_cosine_betas(100))

    def denoise(
        self, noisy: np.ndarray, timestep_kv: np.ndarray, observation_kv: np.ndarray, out: np.ndarray
    ) -> np.ndarray:
        level = int(timestep_kv.item())
        self.levels.append(level)
        self.inputs.append(noisy[..., :2].copy())
        signal, sigma = np.sqrt(self.alpha_bar[level]), np.sqrt(1.0 - self.alpha_bar[level])
        np.copyto(out, (noisy[..., :2] - signal * self.clean) / sigma)
        return out


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_loop_adds_fresh_noise_between_predictions_and_ends_clean(steps: int) -> None:
    generator = np.random.default_rng(0)
    clean = generator.uniform(-0.9, 0.9, (3, 9, 2)).astype(np.float32)
    noise = generator.standard_normal((steps, 3, 9, 2)).astype(np.float32)
    loop, engine = DenoisingLoop(spec(), 9, 2, steps=steps, batch=3), KnowsTheAnswer(clean)
    kv = loop.timesteps.astype(np.float32).reshape(-1, 1, 1, 1)
    result = loop.run(engine, noise[0], kv, kv, lambda step: noise[step])  # type: ignore[arg-type]
    np.testing.assert_allclose(result, clean, atol=0.005)  # the boundary's share of the sample
    assert engine.levels == consistency_timesteps(90, steps).tolist()
    for step, level in list(enumerate(engine.levels))[1:]:
        signal, sigma = np.sqrt(engine.alpha_bar[level]), np.sqrt(1.0 - engine.alpha_bar[level])
        np.testing.assert_allclose(engine.inputs[step], signal * clean + sigma * noise[step - 1], atol=0.01)


def test_fresh_noise_is_needed() -> None:
    loop = DenoisingLoop(spec(), 9, 2, batch=1)
    noise = np.zeros((1, 9, 2), np.float32)
    with pytest.raises(ValueError, match="consistency needs step_noise"):
        loop.run(KnowsTheAnswer(noise), noise, noise, noise)  # type: ignore[arg-type]
