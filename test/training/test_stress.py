from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dcqfa_ros.sim.pusht import PushTWorld
from training.envs.pusht import World
from training.stress import (
    KEPT_PX,
    NUDGE_EVERY,
    STANDARD,
    DelayedActions,
    NoisyObservations,
    NudgedBlock,
    Stress,
)

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=8, deadline=None)


def actions(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(50, 450, (count, 2)).astype(np.float32)


def play(world: World, seed: int, count: int) -> list[tuple[float, ...]]:
    """States, observations and scores of an episode under actions that depend on the seed alone."""
    world.reset(seed)
    rows = []
    for action in actions(seed, count):
        if world.done:
            break
        observed = np.concatenate([values.ravel() for values in world.observation().values()])
        result = world.step(action)
        # The simulator keeps the T's shapes in a set: their order moves the last bit of a coverage, never of a state.
        rows.append((*world.state, *observed.tolist(), round(result.score_so_far, 12), float(result.steps)))
    return rows


@few
@given(seed=seeds)
def test_level_zero_of_every_stress_is_the_published_world_bit_for_bit(seed: int) -> None:
    plain = play(PushTWorld(), seed, 12)
    for wrapped in (
        NoisyObservations(PushTWorld(), 0.0),
        DelayedActions(PushTWorld(), 0),
        NudgedBlock(PushTWorld(), 0),
    ):
        assert play(wrapped, seed, 12) == plain
    assert play(STANDARD.world(), seed, 12) == plain
    assert isinstance(STANDARD.world(), PushTWorld)


@few
@given(seed=seeds)
def test_a_stressed_episode_repeats_bit_for_bit_and_does_not_remember_the_one_before(seed: int) -> None:
    stress = Stress(observation_noise_px=5.0, action_delay_steps=3, block_nudge_px=20.0, episode_steps=600)
    world = stress.world()
    first = play(world, seed, NUDGE_EVERY + 3)
    play(world, seed ^ 1, 5)
    assert play(world, seed, NUDGE_EVERY + 3) == first


@few
@given(seed=seeds, level=st.floats(0.5, 20.0))
def test_noise_has_its_level_and_leaves_physics_and_score_alone(seed: int, level: float) -> None:
    noisy, plain = NoisyObservations(PushTWorld(), level), PushTWorld()
    errors = []
    noisy.reset(seed)
    plain.reset(seed)
    for action in actions(seed, 30):
        there = plain.observation()
        errors += [(values - there[key]).ravel() for key, values in noisy.observation().items()]
        assert noisy.step(action).score_so_far == pytest.approx(plain.step(action).score_so_far, abs=1e-12)
        np.testing.assert_array_equal(noisy.state, plain.state)
    assert np.std(np.concatenate(errors)) == pytest.approx(level, rel=0.2)  # 600 draws
    assert np.mean(np.concatenate(errors)) == pytest.approx(0.0, abs=0.25 * level)


@few
@given(seed=seeds, delay=st.integers(1, 6))
def test_a_delayed_world_is_the_plain_one_that_holds_first(seed: int, delay: int) -> None:
    late, plain = DelayedActions(PushTWorld(), delay), PushTWorld()
    held = np.asarray(late.reset(seed)[:2], np.float32)
    plain.reset(seed)
    commanded = actions(seed, 12)
    for action, arriving in zip(commanded, [*[held] * delay, *commanded], strict=False):
        late.step(action)
        plain.step(arriving)
        np.testing.assert_array_equal(late.state, plain.state)


def test_an_action_that_is_refused_does_not_advance_the_queue() -> None:
    world = DelayedActions(PushTWorld(), 1)
    world.reset(3)
    world.step(np.array([100.0, 100.0], np.float32))
    world.inner.reset(3)
    world._waiting[0] = np.array([np.nan, 0.0], np.float32)
    with pytest.raises(ValueError, match="action"):
        world.step(np.array([1.0, 1.0], np.float32))
    assert np.isnan(world._waiting[0]).any()


@few
@given(seed=seeds, level=st.floats(1.0, 40.0))
def test_a_nudge_moves_the_block_by_its_level_at_its_step_and_stays_in_range(seed: int, level: float) -> None:
    nudged, plain = NudgedBlock(PushTWorld(), level), PushTWorld()
    start = nudged.reset(seed)
    plain.reset(seed)
    hold = np.asarray(start[:2], np.float32)  # the agent stays, so nothing else moves the block
    for _ in range(NUDGE_EVERY):
        nudged.step(hold)
        plain.step(hold)
        np.testing.assert_array_equal(nudged.state, plain.state)
    before = nudged.state
    moves: list[tuple[np.ndarray, float]] = []
    original = nudged.inner.displace_block
    nudged.inner.displace_block = lambda shift, turn: (moves.append((shift, turn)), original(shift, turn))  # type: ignore[method-assign]
    nudged.step(hold)
    ((shift, turn),) = moves
    assert np.linalg.norm(shift) <= level + 1e-9
    assert abs(turn) == pytest.approx(level / 60.0)
    target = before[2:4] + shift
    inside = (KEPT_PX[0] <= target) & (target <= KEPT_PX[1])
    outward = np.abs(target - 250.0) > np.abs(before[2:4] - 250.0) + 1e-9
    assert (inside | ~outward).all()


def test_a_longer_episode_ends_at_its_own_limit() -> None:
    world = Stress(episode_steps=320).world()
    hold = np.asarray(world.reset(5)[:2], np.float32)
    for step in range(320):
        assert world.step(hold).done == (step == 319)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("observation_noise_px", -1.0),
        ("observation_noise_px", float("nan")),
        ("action_delay_steps", -1),
        ("action_delay_steps", 51),
        ("block_nudge_px", 151.0),
        ("episode_steps", 0),
        ("sideways", 1),
    ],
)
def test_levels_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        Stress.model_validate({field: value})


def test_the_description_names_every_level() -> None:
    stress = Stress(observation_noise_px=4.0, action_delay_steps=2, block_nudge_px=15.0, episode_steps=600)
    assert stress.described() == (
        "observations off by 4 px (standard deviation), actions 2 steps late, "
        "block nudged by 15 px every 50 steps, 600 steps"
    )
    assert STANDARD.described() == ""
