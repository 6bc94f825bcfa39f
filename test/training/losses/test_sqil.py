from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.losses.sqil import (
    Denoiser,
    SaliencyError,
    dimension_perturbation,
    patch_perturbation,
    saliency_timesteps,
    saliency_weights,
    sqil_loss,
    state_saliency,
)
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig

TINY = DiffusionPolicyTConfig(depth=2, heads=2, dim=32, ffn_ratio=2)
SIGNAL = torch.linspace(1.0, 0.1, 100)
SIGMA = (1.0 - SIGNAL.square()).sqrt()


@pytest.fixture(scope="module")
def network() -> DiffusionPolicyT:
    torch.manual_seed(0)
    network = DiffusionPolicyT(TINY).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def states(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.1, 2.0, TINY.observation_dim)
    observations = torch.randn(count, 2, TINY.observation_dim, generator=generator) * spread
    return observations, torch.rand(count, TINY.horizon, 2, generator=generator) * 2 - 1


def saliency(network: Denoiser, observations: Tensor, actions: Tensor, **options: Any) -> Tensor:
    options = {"timesteps": (6, 40), "generator": torch.Generator().manual_seed(3), **options}
    return state_saliency(network, observations, actions, signal=SIGNAL, sigma=SIGMA, **options)


@torch.no_grad()
def test_saliency_is_the_mean_over_time_steps_and_dimensions_of_half_the_squared_distance(
    network: DiffusionPolicyT,
) -> None:
    observations, actions = states(5)
    noise = torch.randn(2, TINY.horizon, 2, generator=torch.Generator().manual_seed(3))
    deviation = observations.double().reshape(-1, TINY.observation_dim).std(dim=0, correction=0).float()
    expected = torch.zeros(5)
    for n in range(5):
        for step, eps in zip((6, 40), noise, strict=True):
            noisy, when = SIGNAL[step] * actions[n : n + 1] + SIGMA[step] * eps, torch.tensor([step])
            base = network(noisy, when, observations[n : n + 1])
            for k in range(TINY.observation_dim):
                moved = observations[n : n + 1].clone()
                moved[:, :, k] += 0.1 * deviation[k]
                expected[n] += 0.5 * (network(noisy, when, moved) - base).square().sum() / TINY.observation_dim / 2
    torch.testing.assert_close(saliency(network, observations, actions), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("batch", [1, 21, 50, 63, 10_000])
def test_saliency_does_not_depend_on_the_batch_and_every_call_has_one_shape(
    network: DiffusionPolicyT, batch: int
) -> None:
    shapes, seen = set(), []

    def record(noisy: Tensor, timesteps: Tensor, observation: Tensor) -> Tensor:
        shapes.add((noisy.shape, timesteps.shape, observation.shape))
        return network(noisy, timesteps, observation)

    observations, actions = states(7)
    result = saliency(record, observations, actions, batch=batch, progress=seen.append)
    torch.testing.assert_close(result, saliency(network, observations, actions), rtol=1e-3, atol=1e-7)
    assert len(shapes) == 1
    assert sum(seen) == 7


@pytest.mark.parametrize("known", [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2], [3, 4], []])
def test_saliency_goes_on_with_what_is_known_bit_for_bit(network: DiffusionPolicyT, known: list[int]) -> None:
    observations, actions = states(7)
    whole, seen = saliency(network, observations, actions, batch=42), []
    into = torch.full((7,), float("nan"))
    into[known] = whole[known]
    assert saliency(network, observations, actions, batch=42, into=into, progress=seen.append) is into
    assert torch.equal(into, whole)
    assert sum(seen) == sum(min(2, 7 - first) for first in range(0, 7, 2) if not {first, min(first + 1, 6)} <= {*known})


def test_saliency_that_is_stopped_keeps_what_was_done(network: DiffusionPolicyT) -> None:
    observations, actions = states(7)
    into = torch.full((7,), float("nan"))

    def stop(_count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saliency(network, observations, actions, batch=42, into=into, progress=stop)
    whole = saliency(network, observations, actions, batch=42)
    assert torch.equal(into[:2], whole[:2]) and into[2:].isnan().all()


def test_saliency_takes_no_gradient_and_no_draw_but_the_generators(network: DiffusionPolicyT) -> None:
    observations, actions = states(3)
    before = torch.random.get_rng_state()
    first = saliency(network, observations, actions)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not first.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(first, saliency(network, observations, actions))
    other = saliency(network, observations, actions, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(first, other)


def test_a_policy_that_ignores_observations_has_no_saliency() -> None:
    observations, actions = states(4)
    assert torch.equal(saliency(lambda noisy, timesteps, observation: noisy, observations, actions), torch.zeros(4))


def test_the_first_tokens_of_a_causal_policy_alone_can_be_compared(network: DiffusionPolicyT) -> None:
    observations, actions = states(4)
    whole, part = (saliency(network, observations, actions, tokens=n) for n in (None, 9))
    assert (part < whole).all()
    assert torch.equal(whole, saliency(network, observations, actions, tokens=TINY.horizon))


def test_bf16_saliency_is_close(network: DiffusionPolicyT) -> None:
    observations, actions = states(16)
    exact, rounded = (saliency(network, observations, actions, autocast=on) for on in (False, True))
    assert torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.9


def test_what_cannot_be_computed_is_refused_by_name(network: DiffusionPolicyT) -> None:
    observations, actions = states(4)
    with pytest.raises(SaliencyError, match="4 observations but 3 action chunks"):
        saliency(network, observations, actions[:3])
    with pytest.raises(SaliencyError, match="4 observations but 3 known values"):
        saliency(network, observations, actions, into=torch.full((3,), float("nan")))
    with pytest.raises(SaliencyError, match=r"timesteps \(100,\)"):
        saliency(network, observations, actions, timesteps=(100,))
    with pytest.raises(SaliencyError, match="tokens 17"):
        saliency(network, observations, actions, tokens=17)
    broken = actions.clone()
    broken[2, 0, 0] = float("nan")
    with pytest.raises(SaliencyError, match="state 2 has SIS nan"):
        saliency(network, observations, broken)


def test_no_states_have_no_saliency_and_no_weights(network: DiffusionPolicyT) -> None:
    observations, actions = states(1)
    empty = saliency(network, observations[:0], actions[:0], perturbation=dimension_perturbation(observations))
    assert empty.shape == (0,)
    with pytest.raises(SaliencyError, match="0 states"):
        saliency_weights(empty)


def test_a_dimension_moves_alone_through_the_whole_history_by_its_own_deviation() -> None:
    observations, _ = states(200)
    batch = observations[:3]
    moved = dimension_perturbation(observations)(batch) - batch[:, None]
    deviation = observations.reshape(-1, TINY.observation_dim).std(dim=0, correction=0)
    expected = torch.diag(0.1 * deviation)[None, :, None, :].expand(3, -1, 2, -1)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


@given(st.integers(8, 24), st.integers(8, 24), st.integers(1, 8), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_patches_tile_the_image_and_are_filled_with_their_own_mean(
    height: int, width: int, grid: int, seed: int
) -> None:
    images = torch.rand(2, 2, 3, height, width, generator=torch.Generator().manual_seed(seed)) + 0.1
    filled = patch_perturbation(grid)(images)
    assert filled.shape == (2, grid * grid, 2, 3, height, width)
    # The mean colour of the whole image stays, and no pixel outside the patch changes.
    torch.testing.assert_close(
        filled.mean(dim=(-2, -1)), images.mean(dim=(-2, -1))[:, None].expand(-1, grid * grid, -1, -1)
    )
    changed = (filled != images[:, None]).sum(dim=1)
    assert changed.max() <= 1
    rows = torch.arange(height) * grid // height
    columns = torch.arange(width) * grid // width
    for k in (0, grid * grid - 1):
        inside = (rows[:, None] == k // grid) & (columns == k % grid)
        patch = filled[:, k][..., inside]
        torch.testing.assert_close(patch, images[..., inside].mean(dim=-1, keepdim=True).expand_as(patch))


def test_a_patch_that_shows_nothing_does_not_change() -> None:
    image = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(patch_perturbation()(image), image[:, None].expand(-1, 64, -1, -1, -1))


def test_patches_also_perturb_the_states_of_an_image_policy() -> None:
    images, actions = torch.rand(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), states(3)[1]
    images[1] = 0.5  # shows nothing

    def brightest(noisy: Tensor, timesteps: Tensor, observation: Tensor) -> Tensor:
        return noisy + observation.amax(dim=(1, 2, 3, 4))[:, None, None]

    result = saliency(brightest, images, actions, perturbation=patch_perturbation())
    assert result[1] < 1e-12
    assert (result[[0, 2]] > 0).all()


def test_an_image_smaller_than_the_grid_is_refused() -> None:
    with pytest.raises(SaliencyError, match="7 x 16"):
        patch_perturbation()(torch.zeros(1, 3, 7, 16))


@given(st.lists(st.floats(0.0, 1e6, width=32), min_size=1, max_size=200), st.floats(0.0, 100.0))
@settings(deadline=None)
def test_weights_are_two_for_at_most_the_share_above_the_percentile(values: list[float], percentile: float) -> None:
    saliency = torch.tensor(values)
    weights = saliency_weights(saliency, percentile)
    high = weights == 2.0
    assert bool((high | (weights == 1.0)).all())
    assert high.float().mean() <= 1.0 - percentile / 100.0 + 1.0 / len(values)
    if high.any() and not high.all():
        assert saliency[high].min() > saliency[~high].max()


def test_a_fifth_of_distinct_states_weighs_twice() -> None:
    weights = saliency_weights(torch.arange(100.0))
    assert weights.sum() == 120
    assert torch.equal(saliency_weights(torch.ones(10)), torch.ones(10))
    with pytest.raises(SaliencyError, match="percentile 101"):
        saliency_weights(torch.ones(3), 101.0)
    with pytest.raises(SaliencyError, match="finite"):
        saliency_weights(torch.tensor([1.0, float("nan")]))


def test_the_loss_is_the_task_plus_the_weighted_distance_to_the_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher, noise = (torch.randn(4, 16, 2, generator=generator) for _ in range(3))
    weights = torch.tensor([1.0, 2.0, 1.0, 2.0])
    total, task, distillation = sqil_loss(student, teacher, noise, weights)
    expected = sum(float(w) * float((s - t).square().mean()) for w, s, t in zip(weights, student, teacher, strict=True))
    assert float(task) == pytest.approx(float((student - noise).square().mean()), rel=1e-5)
    assert float(distillation) == pytest.approx(expected / 4, rel=1e-5)
    torch.testing.assert_close(total, task + distillation)
    assert float(sqil_loss(student, student, noise, weights)[2]) == 0.0


def test_only_the_student_gets_a_gradient_and_a_bf16_student_a_float32_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher, noise = (torch.randn(4, 16, 2, generator=generator).requires_grad_() for _ in range(3))
    total, _, _ = sqil_loss(student.bfloat16(), teacher, noise.detach(), torch.ones(4))
    assert total.dtype == torch.float32
    total.backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_shapes_that_disagree_are_refused() -> None:
    x = torch.zeros(4, 16, 2)
    with pytest.raises(ValueError, match=r"\(4, 9, 2\)"):
        sqil_loss(x, x[:, :9], x, torch.ones(4))
    with pytest.raises(ValueError, match="weights"):
        sqil_loss(x, x, x, torch.ones(4, 1))


@pytest.mark.parametrize("train_timesteps", [2, 3, 10, 100, 1000])
def test_the_fixed_time_steps_are_distinct_and_within_those_of_training(train_timesteps: int) -> None:
    steps = saliency_timesteps(train_timesteps)
    assert steps
    assert len(set(steps)) == len(steps)
    assert all(0 <= step < train_timesteps for step in steps)
    assert saliency_timesteps(100) == (3, 10)
