"""The denoising loop agrees with diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.bundle.schema import DiffusionSpec
from dcqfa_ros.runtime.denoising import DenoisingLoop
from dcqfa_ros.runtime.noise import chunk_noise, step_noise
from dcqfa_ros.runtime.schedule import alphas_cumprod, leading_timesteps, squared_cosine_betas

TOLERANCE = 1e-5
SHAPE = (3, 9, 2)


def spec(sampler: str, train_timesteps: int = 100, clip: float = 1.0) -> DiffusionSpec:
    return DiffusionSpec(
        train_timesteps=train_timesteps,
        beta_schedule="squared_cosine",
        prediction="epsilon",
        clip_sample=clip,
        sampler=sampler,
        steps=1,
    )


def reference(sampler: str, train_timesteps: int, clip: float, exact_tables: bool = False) -> Any:
    """Make diffusers' scheduler; ``exact_tables``: in float64, because float32 leaves 1 - alpha_bar few digits."""
    common = {
        "num_train_timesteps": train_timesteps,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": True,
        "clip_sample_range": clip,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
    }
    if sampler == "ddim":
        scheduler: Any = DDIMScheduler(**common, set_alpha_to_one=True, steps_offset=0)
    else:
        scheduler = DDPMScheduler(**common, variance_type="fixed_small")
    if exact_tables:
        scheduler.alphas_cumprod = torch.from_numpy(alphas_cumprod(squared_cosine_betas(train_timesteps)))
    return scheduler


def predicted_noise(x: np.ndarray, t: float) -> np.ndarray:
    """A stand-in for a network: depends on sample and time, and contracts, so that rounding does not grow."""
    return (0.8 * np.tanh(x) + 0.3 * np.sin(0.05 * t)).astype(np.float32)


class StandInEngine:
    """Reads the time step from a one-number "key and value" and answers with ``predicted_noise``."""

    name = "stand-in"

    def observation_kv(self, observation: np.ndarray) -> np.ndarray:
        return observation

    def timestep_kv(self, timesteps: np.ndarray) -> np.ndarray:
        return timesteps.astype(np.float32).reshape(-1, 1, 1, 1, 1, 1)

    def denoise(
        self, noisy: np.ndarray, timestep_kv: np.ndarray, observation_kv: np.ndarray, out: Any = None
    ) -> np.ndarray:
        result = predicted_noise(noisy, float(timestep_kv.item()))
        out[...] = result
        return out

    def close(self) -> None:
        """Nothing to release."""


def run(loop: DenoisingLoop, initial: np.ndarray, noises: list[np.ndarray]) -> np.ndarray:
    engine = StandInEngine()
    kv = engine.timestep_kv(loop.timesteps)
    return loop.run(engine, initial, kv, np.zeros((3, 1, 2, 1, 2, 1), np.float32), noises.__getitem__)


def reference_step(scheduler: Any, eps: np.ndarray, t: Any, x: np.ndarray, noise: np.ndarray) -> np.ndarray:
    ddim = isinstance(scheduler, DDIMScheduler)
    more: dict[str, Any] = {"eta": 0.0} if ddim else {"generator": Recorded(noise)}
    previous = scheduler.step(torch.from_numpy(eps), t, torch.from_numpy(x), **more).prev_sample
    result: np.ndarray = previous.to(torch.float32).numpy()
    return result


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("train_timesteps", [10, 100])
def test_whole_loop_equals_diffusers_for_every_step_count(sampler: str, train_timesteps: int) -> None:
    for steps in range(1, train_timesteps + 1):
        loop = DenoisingLoop(spec(sampler, train_timesteps), 9, 2, steps=steps, batch=3)
        initial = chunk_noise(steps, 0, SHAPE)
        noises = [step_noise(steps, 0, index, SHAPE) for index in range(steps)]
        scheduler = reference(sampler, train_timesteps, 1.0)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == loop.timesteps.tolist()
        x = initial
        for t, noise in zip(scheduler.timesteps, noises, strict=True):
            x = reference_step(scheduler, predicted_noise(x, float(t)), t, x, noise)
        assert np.abs(run(loop, initial, noises) - x).max() <= TOLERANCE


@settings(deadline=None, max_examples=40)
@given(
    sampler=st.sampled_from(["ddim", "ddpm"]),
    train_timesteps=st.integers(1, 1000),
    share=st.floats(0.0, 1.0),
    clip=st.floats(0.1, 5.0),
    seed=st.integers(0, 2**32),
)
def test_every_step_equals_diffusers_formula_for_any_schedule(
    sampler: str, train_timesteps: int, share: float, clip: float, seed: int
) -> None:
    steps = 1 + round(share * (train_timesteps - 1))
    loop = DenoisingLoop(spec(sampler, train_timesteps, clip), 9, 2, steps=steps, batch=3)
    scheduler = reference(sampler, train_timesteps, clip, exact_tables=True)
    scheduler.set_timesteps(steps)
    for index in sorted({0, steps // 2, steps - 1}):
        x, eps = chunk_noise(seed, index, SHAPE), step_noise(seed, index, 0, SHAPE)
        noise = step_noise(seed, index, 1, SHAPE)
        loop.sample[...], loop.prediction[...] = x, eps
        loop.step(index, noise)
        expected = reference_step(scheduler, eps, scheduler.timesteps[index], x, noise)
        assert np.abs(loop.sample - expected).max() <= TOLERANCE


class Recorded(torch.Generator):
    """Carries the noise that the patched ``randn_tensor`` of diffusers hands out."""

    noise: np.ndarray

    def __new__(cls, noise: np.ndarray) -> Recorded:
        generator = super().__new__(cls)
        generator.noise = noise
        return generator

    def __init__(self, noise: np.ndarray) -> None:
        """Hold ``noise``."""


@pytest.fixture(autouse=True, scope="module")
def recorded_noise() -> Any:
    """Make diffusers' DDPM draw the noise of this project instead of torch's."""
    from diffusers.schedulers import scheduling_ddpm

    original = scheduling_ddpm.randn_tensor
    scheduling_ddpm.randn_tensor = lambda shape, generator, **_: torch.from_numpy(generator.noise)
    yield
    scheduling_ddpm.randn_tensor = original


@given(st.sampled_from([10, 50, 100, 1000]))
def test_schedule_equals_diffusers(train_timesteps: int) -> None:
    scheduler = DDPMScheduler(train_timesteps, beta_schedule="squaredcos_cap_v2")
    betas = squared_cosine_betas(train_timesteps)
    assert np.abs(betas - scheduler.betas.numpy()).max() <= 1e-6
    assert np.abs(alphas_cumprod(betas) - scheduler.alphas_cumprod.numpy()).max() <= 1e-6


def test_buffers_are_reused_and_runs_do_not_influence_each_other() -> None:
    loop = DenoisingLoop(spec("ddim"), 9, 2, steps=4, batch=3)
    initial = chunk_noise(1, 0, SHAPE)
    first = run(loop, initial, [])
    kept, given_noise = first.copy(), initial.copy()
    again = run(loop, initial, [])
    assert again is first
    assert np.array_equal(again, kept)
    assert np.array_equal(initial, given_noise)


def test_last_sample_lies_inside_the_clip_range() -> None:
    loop = DenoisingLoop(spec("ddim"), 9, 2, steps=16, batch=3)
    assert np.abs(run(loop, 10.0 * chunk_noise(2, 0, SHAPE), [])).max() <= 1.0


def test_ddpm_without_noise_is_refused() -> None:
    loop = DenoisingLoop(spec("ddpm"), 9, 2, steps=4, batch=3)
    engine = StandInEngine()
    with pytest.raises(ValueError, match="ddpm needs step_noise"):
        loop.run(engine, np.zeros(SHAPE, np.float32), engine.timestep_kv(loop.timesteps), np.zeros((3, 1), np.float32))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"steps": 0}, "denoising steps: expected 1 to 100, got 0"),
        ({"steps": 101}, "got 101"),
        ({"batch": 0}, "batch: expected at least 1"),
        ({"tokens": 0}, "tokens: expected at least 1"),
    ],
)
def test_sizes_out_of_range_are_refused(arguments: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DenoisingLoop(spec("ddim"), **{"tokens": 9, "action_dim": 2, **arguments})


def test_schedule_refuses_lengths_out_of_range() -> None:
    with pytest.raises(ValueError, match="train_timesteps"):
        squared_cosine_betas(0)
    with pytest.raises(ValueError, match="denoising steps"):
        leading_timesteps(10, 11)
