"""The Push-T world: published conventions, determinism, and agreement with the environment and the demonstrations."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.sim.pusht import EPISODE_STEPS, EpisodeOverError, PushTWorld
from dcqfa_ros.sim.tee import (
    GOAL_POSE,
    OUTLINE_LOCAL,
    block_pose,
    key_points,
    legacy_state,
    state_to_reset_to,
    to_table,
)

Arrays = dict[str, Any]


def episode(data: Arrays, index: int) -> slice:
    """Rows of one demonstration."""
    ends = data["episode_ends"]
    return slice(0 if index == 0 else int(ends[index - 1]), int(ends[index]))


def some_actions(seed: int, count: int) -> np.ndarray:
    """Actions that wander over the whole table and hit the block."""
    random = np.random.RandomState(seed)
    return np.clip(256 + np.cumsum(random.randn(count, 2) * 60, axis=0), 0, 512)


def test_every_demonstration_starts_at_the_legacy_state_of_its_number(demonstrations: Arrays) -> None:
    world = PushTWorld()
    for index in range(len(demonstrations["episode_ends"])):
        recorded = demonstrations["state"][episode(demonstrations, index).start]
        np.testing.assert_allclose(world.reset(index), recorded, atol=1e-4)


@pytest.mark.parametrize("index", [0, 1, 57, 205])
def test_open_loop_replay_of_a_demonstration_stays_within_a_pixel(demonstrations: Arrays, index: int) -> None:
    rows = episode(demonstrations, index)
    states, actions = demonstrations["state"][rows], demonstrations["action"][rows]
    world = PushTWorld()
    state = world.reset(index)
    for recorded, action in zip(states, actions, strict=True):
        assert np.abs(state[:4] - recorded[:4]).max() < 1.0
        if world.done:
            break
        world.step(action)
        state = world.state


def test_key_points_are_those_of_the_demonstrations(demonstrations: Arrays) -> None:
    states = demonstrations["state"].astype(np.float64)
    ours = np.stack([key_points(state[2:]) for state in states])
    difference = np.abs(ours - demonstrations["keypoint"]).max(axis=(1, 2))
    assert np.median(difference) < 1e-4
    assert np.quantile(difference, 0.99) < 0.05
    # The recording took key points about one physics step (0.01 s) after the state, which shows where the block is
    # just being pushed, most of all at starts where agent and block overlap.
    assert difference.max() < 2.1


@pytest.mark.parametrize("seed", [0, 3, 100_000])
def test_a_step_is_bit_identical_to_the_published_environments(seed: int) -> None:
    world = PushTWorld(step_limit=10_000)
    from gym_pusht.envs.pusht import PushTEnv

    environment = PushTEnv(obs_type="state")
    start = legacy_state(seed)
    theirs, _ = environment.reset(options={"reset_to_state": start})
    np.testing.assert_array_equal(world.reset_to(start), theirs)
    for action in some_actions(seed, 150):
        ours = world.step(action)
        theirs, reward, terminated, _, info = environment.step(action)
        np.testing.assert_array_equal(world.state, theirs)
        assert (ours.coverage, min(ours.coverage / 0.95, 1.0), ours.done) == (info["coverage"], reward, terminated)
        if terminated:
            break


def test_equal_seeds_and_actions_give_bit_identical_episodes() -> None:
    traces = []
    for _ in range(2):
        world = PushTWorld()
        world.reset(100_001)
        for action in some_actions(7, 60):
            world.step(action)
        traces.append((world.state.tobytes(), world.score_so_far, world.observation()["keypoints"].tobytes()))
    assert traces[0] == traces[1]


def test_an_episode_does_not_depend_on_the_one_before() -> None:
    used, fresh = PushTWorld(), PushTWorld()
    used.reset(5)
    for action in some_actions(1, 40):
        used.step(action)
    for world in (used, fresh):
        world.reset(6)
        world.step((100.0, 100.0))
    np.testing.assert_array_equal(used.state, fresh.state)
    assert used.steps == fresh.steps == 1
    assert used.score_so_far == fresh.score_so_far


def test_observation_is_float32_pixels_of_the_present_state() -> None:
    world = PushTWorld()
    world.reset(2)
    observation = world.observation()
    assert list(observation) == ["keypoints", "agent_position"]  # the order of the policy's observation vector
    assert observation["keypoints"].shape == (9, 2)
    assert observation["keypoints"].dtype == np.float32
    assert observation["agent_position"].shape == (2,)
    assert observation["agent_position"].dtype == np.float32
    np.testing.assert_allclose(block_pose(observation["keypoints"])[:2], world.state[2:4], atol=1e-3)


def test_an_episode_ends_after_300_steps_and_refuses_more() -> None:
    world = PushTWorld()
    world.reset_to([50, 50, 400, 400, 0.0])
    results = [world.step((50.0, 50.0)) for _ in range(EPISODE_STEPS)]
    assert [result.done for result in results] == [False] * (EPISODE_STEPS - 1) + [True]
    with pytest.raises(EpisodeOverError, match="reset"):
        world.step((50.0, 50.0))
    world.reset(0)
    assert not world.step((50.0, 50.0)).done


def test_covering_the_goal_ends_the_episode_with_score_one() -> None:
    world = PushTWorld()
    # Setting the angle last turns the block about its centre of mass (the legacy order), which moves its origin.
    moved = world.reset_to([50, 50, *GOAL_POSE])[2:4] - GOAL_POSE[:2]
    world.reset_to([50, 50, *(GOAL_POSE[:2] - moved), GOAL_POSE[2]])
    assert world.coverage == pytest.approx(1.0)
    assert world.score_so_far == 0.0  # as published, only steps count
    result = world.step((50.0, 50.0))
    assert result.done
    assert result.score_so_far == 1.0
    assert result.steps == 1


def test_score_is_the_best_coverage_so_far_over_095() -> None:
    world = PushTWorld()
    world.reset(0)
    best = 0.0
    for action in some_actions(3, 80):
        result = world.step(action)
        best = max(best, result.coverage)
        assert result.score_so_far == min(1.0, best / 0.95)
        if result.done:
            break


@pytest.mark.parametrize("action", [(np.nan, 1.0), (1.0, np.inf), (1.0,), (1.0, 2.0, 3.0), ((1.0, 2.0),)])
def test_a_bad_action_is_refused_and_moves_nothing(action: Any) -> None:
    world = PushTWorld()
    before = world.reset(0)
    with pytest.raises(ValueError, match="action"):
        world.step(action)
    np.testing.assert_array_equal(world.state, before)
    assert world.steps == 0


@pytest.mark.parametrize("state", [[0.0] * 4, [0.0] * 6, [0, 0, 0, 0, np.nan]])
def test_a_bad_start_state_is_refused(state: list[float]) -> None:
    with pytest.raises(ValueError, match="state"):
        PushTWorld().reset_to(state)


def test_a_world_is_reset_to_a_state_that_another_one_reports() -> None:
    world, other = PushTWorld(), PushTWorld()
    for seed in (3, 5, 11):
        world.reset(seed)
        for action in ([200.0, 300.0], [250.0, 260.0], [300.0, 220.0]):
            world.step(action)
        there = other.reset_to(state_to_reset_to(world.state))
        assert there[2:] == pytest.approx(world.state[2:], abs=0.5)  # one physics step of 0.01 s later
    start = other.reset_to(state_to_reset_to([60.0, 60.0, 200.0, 300.0, 2.0]))
    assert start == pytest.approx([60.0, 60.0, 200.0, 300.0, 2.0], abs=1e-9)


@pytest.mark.parametrize("state", [[1.0] * 4, [0.0, 0.0, 0.0, 0.0, float("nan")]])
def test_a_bad_state_has_no_reset(state: list[float]) -> None:
    with pytest.raises(ValueError, match="state: expected"):
        state_to_reset_to(state)


def test_a_world_that_was_never_reset_has_no_state_and_takes_no_step() -> None:
    world = PushTWorld()
    assert world.done
    with pytest.raises(EpisodeOverError):
        _ = world.state
    with pytest.raises(EpisodeOverError):
        world.step((0.0, 0.0))


def test_step_limit_and_seed_are_checked() -> None:
    with pytest.raises(ValueError, match="step_limit"):
        PushTWorld(0)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed"):
            legacy_state(seed)


IMPORTED_QUIETLY = """
import os
from dcqfa_ros.sim.pusht import PushTWorld
PushTWorld().reset(0)
import pygame
assert not pygame.display.get_init(), "a display was opened"
print(os.environ["SDL_VIDEODRIVER"])
"""


@pytest.mark.parametrize(("chosen", "expected"), [(None, "dummy"), ("offscreen", "offscreen")])
def test_the_simulator_opens_no_window_prints_nothing_and_keeps_the_users_choice(
    chosen: str | None, expected: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("SDL_VIDEODRIVER", "PYGAME_HIDE_SUPPORT_PROMPT")}
    if chosen is not None:
        environment["SDL_VIDEODRIVER"] = chosen
    result = subprocess.run(
        [sys.executable, "-c", IMPORTED_QUIETLY],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{expected}\n", "")


def test_importing_the_world_does_not_load_the_simulator() -> None:
    code = "import sys, dcqfa_ros.sim.pusht; print([m for m in ('pygame', 'gym_pusht', 'shapely') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_the_drawn_outline_is_the_shape_that_collides() -> None:
    world = PushTWorld()
    world.reset(0)
    from shapely.geometry import Polygon

    drawn = Polygon(to_table(OUTLINE_LOCAL, world.state[2:]))
    collides = world._geometry(world._env.block)
    assert drawn.intersection(collides).area == pytest.approx(drawn.area)
    assert collides.area == pytest.approx(drawn.area)


@settings(max_examples=60, deadline=None)
@given(st.floats(-600, 600), st.floats(-600, 600), st.floats(-10, 10))
def test_block_pose_inverts_key_points(x: float, y: float, theta: float) -> None:
    fitted = block_pose(key_points((x, y, theta)))
    np.testing.assert_allclose(fitted[:2], (x, y), atol=1e-3)
    assert abs(np.angle(np.exp(1j * (fitted[2] - theta)))) < 1e-5


@pytest.mark.parametrize("points", [np.zeros((8, 2)), np.full((9, 2), np.nan)])
def test_block_pose_refuses_what_are_not_nine_key_points(points: np.ndarray) -> None:
    with pytest.raises(ValueError, match="keypoints"):
        block_pose(points)
