"""Under latency no action is repeated or left out and waiting is counted; without latency nothing changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.bench import chunking_rollout
from dcqfa_ros.bench.chunking_metrics import EpisodeTrack, mean_and_p95, mean_jerk
from dcqfa_ros.bench.chunking_rollout import roll_out
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.chunking import Continuation, Method
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.policy import PolicyRuntime
from test.runtime.conftest import tiny_files, tiny_spec
from training.evaluate import roll_out as evaluate_roll_out

SEEDS = (300_001, 300_002, 300_003)
HORIZON, PAST, EXECUTED, STEPS = 16, 1, 8, 60
AVAILABLE = HORIZON - PAST
OVERLAPPING = [method for method in Method if method.overlaps]


def spec(**diffusion: Any) -> BundleSpec:
    made, _ = tiny_spec()
    changed = made.diffusion.model_copy(update={"prefix": 9} | diffusion)
    return made.model_copy(update={"diffusion": changed})


class Rail:
    """A world in which the arm goes where it is told at once; the observation is the number of the action due."""

    def __init__(self) -> None:
        self.steps, self.at = 0, 0.0
        self.done, self.score_so_far = False, 0.0

    def reset(self, seed: int) -> None:
        self.seed = seed

    def observation(self) -> dict[str, np.ndarray]:
        position = np.array([self.at, self.seed], np.float32)
        return {"keypoints": np.zeros((9, 2), np.float32), "agent_position": position}

    def step(self, action: np.ndarray) -> Rail:
        self.steps, self.at = self.steps + 1, float(action[0]) + 1.0
        self.done = self.steps >= STEPS
        return self


class Counting:
    """A policy that says action n = n, and ``jump`` more with every chunk."""

    def __init__(self, jump: float = 0.0) -> None:
        self.jump = jump
        self.asked: list[tuple[int, tuple[int, ...]]] = []
        self.continuations: list[Continuation | None] = []

    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        seeds: Sequence[int],
        chunks: Sequence[int],
        steps: int | None = None,
        tokens: int | None = None,
        continuations: Sequence[Continuation | None] | None = None,
        actions: int | None = None,
    ) -> np.ndarray:
        assert actions is not None and actions <= AVAILABLE
        assert observation["agent_position"].shape == (len(seeds), 2, 2)
        self.asked.append((actions, tuple(chunks)))
        self.continuations.extend(continuations or [])
        first = observation["agent_position"][:, -1, :1]
        numbers = first + np.arange(actions, dtype=np.float32)
        aside = np.repeat(np.array(chunks, np.float32)[:, None] * self.jump, actions, axis=1)
        return np.stack([numbers, aside], axis=2)


def on_rails(policy: Any, method: Method, ticks: int, horizon: int = 0, seeds: Sequence[int] = (5,)) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking_rollout, "PushTWorld", Rail)
        return roll_out(policy, spec(), seeds, method, ticks, execution_horizon=horizon)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(Method)), st.integers(0, 40), st.integers(0, AVAILABLE))
def test_no_action_is_repeated_or_left_out(method: Method, ticks: int, horizon: int) -> None:
    (track,) = on_rails(Counting(), method, ticks, horizon)
    numbers = [float(target[0]) for target in track.targets]
    assert len(numbers) == track.steps == STEPS
    executed = [number for place, number in enumerate(numbers) if place == 0 or number != numbers[place - 1]]
    assert executed == list(range(len(executed)))
    assert track.starved == STEPS - len(executed)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(OVERLAPPING), st.integers(0, AVAILABLE // 2), st.integers(1, AVAILABLE))
def test_an_overlapping_method_never_starves_for_a_delay_that_fits_the_chunk(
    method: Method, ticks: int, horizon: int
) -> None:
    (track,) = on_rails(Counting(), method, ticks, horizon)
    assert track.starved == 0 and track.late == 0


@pytest.mark.parametrize(("ticks", "starved"), [(0, 0), (1, 6), (2, 12), (4, 20), (20, 40)])
def test_a_synchronous_arm_waits_after_each_chunk(ticks: int, starved: int) -> None:
    (track,) = on_rails(Counting(), Method.SYNCHRONOUS, ticks)
    assert track.starved == starved  # 8 actions, then ``ticks`` without, until 60 ticks are over


@pytest.mark.parametrize("method", OVERLAPPING)
def test_a_latency_longer_than_the_chunk_starves_and_is_counted(method: Method) -> None:
    (track,) = on_rails(Counting(), method, 20)
    # After 8 of 15 actions the next chunk is asked for: 7 more ticks, 13 without actions, then 8 that are left of it.
    assert (track.starved, track.chunks, track.late) == (13 + 13 + 3, 4, 0)


@pytest.mark.parametrize("method", [m for m in OVERLAPPING if m is not Method.ENSEMBLE])
def test_without_latency_overlapping_methods_execute_what_synchronous_execution_does(method: Method) -> None:
    policy = Counting(jump=3.0)
    (waiting,) = on_rails(policy, Method.SYNCHRONOUS, 0)
    (overlapping,) = on_rails(policy, method, 0)
    np.testing.assert_array_equal(overlapping.targets, waiting.targets)
    assert overlapping.chunks == waiting.chunks


@pytest.mark.parametrize("method", [m for m in Method if m is not Method.ENSEMBLE])
@pytest.mark.parametrize("ticks", [0, 1, 4])
def test_the_discontinuity_is_what_old_and_new_chunk_say_of_one_action(method: Method, ticks: int) -> None:
    (track,) = on_rails(Counting(jump=3.0), method, ticks)
    assert len(track.seams) >= 4
    assert mean_and_p95(track.seams) == (3.0, 3.0)


def test_an_ensemble_jumps_less() -> None:
    (track,) = on_rails(Counting(jump=3.0), Method.ENSEMBLE, 0, horizon=4)
    mean, _ = mean_and_p95(track.seams)
    assert mean is not None and 0.5 < mean < 3.0


@pytest.mark.parametrize("method", [m for m in Method if m.continues])
def test_methods_that_continue_are_told_what_will_have_been_executed(method: Method) -> None:
    policy = Counting()
    on_rails(policy, method, 2)
    known = [continuation for continuation in policy.continuations if continuation is not None]
    assert known and policy.continuations[0] is None
    for continuation in known:
        assert continuation.frozen == PAST + 2
        assert continuation.method is method
        np.testing.assert_array_equal(np.diff(continuation.previous[:, 0]), 1.0)  # actions one after the other


def test_before_the_first_chunk_the_cell_waits() -> None:
    (late,) = on_rails(Counting(), Method.ASYNCHRONOUS, 7)
    assert late.steps == STEPS
    assert float(late.targets[0][0]) == 0.0


def test_episodes_share_one_call_and_their_noise_is_numbered_by_chunk() -> None:
    policy = Counting()
    tracks = on_rails(policy, Method.ASYNCHRONOUS, 1, seeds=(5, 6, 7))
    assert [chunks for _, chunks in policy.asked] == [(n,) * 3 for n in range(tracks[0].chunks)]


def test_progress_reaches_the_full_length() -> None:
    done: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking_rollout, "PushTWorld", Rail)
        roll_out(Counting(), spec(), (1, 2), Method.SYNCHRONOUS, 0, progress=done.append)
    assert sum(done) == 2 * chunking_rollout.EPISODE_STEPS


@pytest.mark.parametrize("variant", ["fp32", "w8a8"])
def test_synchronous_execution_without_latency_scores_as_dcqfa_eval(
    variant: str,
) -> None:
    tiny, _ = tiny_spec()
    policy = PolicyRuntime(tiny, OnnxRuntimeEngine(tiny_files(quantized=variant == "w8a8"), threads=1, name=variant))
    expected = evaluate_roll_out(policy, SEEDS, history=2, steps=2)
    tracks = roll_out(policy, tiny, SEEDS, Method.SYNCHRONOUS, 0, steps=2)
    # The same episodes give scores that differ in the last bit from run to run, in dcqfa eval as well: physics engine.
    assert [track.score for track in tracks] == pytest.approx(expected.scores, rel=1e-12, abs=0.0)
    assert tuple(track.steps for track in tracks) == expected.steps
    assert max(expected.scores) > 0.0


def test_the_result_does_not_depend_on_the_other_seeds() -> None:
    class Towards(Counting):
        def predict(self, observation: Mapping[str, np.ndarray], *args: Any, **options: Any) -> np.ndarray:
            return np.repeat(observation["keypoints"][:, -1, :1], options["actions"], axis=1)

    def scores(seeds: Sequence[int]) -> list[float]:
        return [track.score for track in roll_out(Towards(), spec(), seeds, Method.ASYNCHRONOUS, 2)]

    together = scores(SEEDS[:2])
    assert together == scores(SEEDS[:1]) + scores(SEEDS[1:2])


def test_jerk_is_the_third_derivative() -> None:
    time = np.arange(50) / 10.0
    cubic = np.stack([time**3, np.zeros(50)], axis=1)
    assert mean_jerk(cubic, 10.0) == pytest.approx(6.0)
    assert mean_jerk(np.stack([2 * time**2, time], axis=1), 10.0) == pytest.approx(0.0, abs=1e-9)
    assert mean_jerk(cubic[:3], 10.0) is None
    assert mean_jerk(EpisodeTrack().targets, 10.0) is None


def test_nothing_compared_has_no_discontinuity() -> None:
    assert mean_and_p95([]) == (None, None)
