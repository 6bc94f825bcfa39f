"""The policy turns raw observations into raw actions, repeatably, and refuses what must not be executed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.policy import PolicyError, PolicyRuntime
from test.runtime.conftest import observation, tiny_files, tiny_spec


def make_policy(quantized: bool = False, poison: bool = False, **changes: Any) -> PolicyRuntime:
    return PolicyRuntime(tiny_spec(**changes)[0], OnnxRuntimeEngine(tiny_files(quantized, poison), name="tiny"))


def with_sampler(sampler: str) -> dict[str, Any]:
    diffusion = tiny_spec()[0].diffusion.model_dump()
    return {"diffusion": diffusion | {"sampler": sampler}}


def rows(batch: dict[str, np.ndarray], index: slice) -> dict[str, np.ndarray]:
    return {key: value[index] for key, value in batch.items()}


@pytest.mark.parametrize("quantized", [False, True])
def test_actions_are_raw_units_of_the_executed_part(quantized: bool) -> None:
    actions = make_policy(quantized).predict(observation(batch=3), [1, 2, 3], [0, 0, 0])
    assert actions.shape == (3, 8, 2)
    assert actions.dtype == np.float32
    # scale 1/256 and offset -1: the clipped range [-1, 1] is 0 to 512 px
    assert actions.min() >= 0.0
    assert actions.max() <= 512.0
    assert actions.std() > 1.0


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_same_seed_and_chunk_give_the_same_actions(sampler: str) -> None:
    policy, again = make_policy(**with_sampler(sampler)), make_policy(**with_sampler(sampler))
    first = policy.predict(observation(), [7], [3])
    assert np.array_equal(first, policy.predict(observation(), [7], [3]))
    assert np.array_equal(first, again.predict(observation(), [7], [3]))
    assert not np.array_equal(first, policy.predict(observation(), [7], [4]))
    assert not np.array_equal(first, policy.predict(observation(), [8], [3]))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.sampled_from(["ddim", "ddpm"]), st.integers(1, 20))
def test_a_row_does_not_depend_on_the_batch_it_is_in(batch: int, sampler: str, steps: int) -> None:
    policy = make_policy(**with_sampler(sampler))
    many = observation(batch=batch)
    seeds, chunks = list(range(batch)), list(range(10, 10 + batch))
    together = policy.predict(many, seeds, chunks, steps)
    for row in range(batch):
        alone = policy.predict(rows(many, slice(row, row + 1)), seeds[row : row + 1], chunks[row : row + 1], steps)
        assert np.abs(alone[0] - together[row]).max() < 0.01  # px


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_tokens_computed_beyond_the_executed_change_nothing(sampler: str) -> None:
    policy = make_policy(**with_sampler(sampler))
    assert policy.required_tokens == 9
    fewest = policy.predict(observation(), [1], [0])
    for tokens in (9, 12, 16):
        assert np.abs(policy.predict(observation(), [1], [0], tokens=tokens) - fewest).max() < 0.01


def test_observation_and_step_count_matter() -> None:
    policy = make_policy()
    actions = policy.predict(observation(1), [1], [0])
    assert not np.array_equal(actions, policy.predict(observation(2), [1], [0]))
    assert not np.array_equal(actions, policy.predict(observation(1), [1], [0], steps=4))
    assert np.array_equal(actions, policy.predict(observation(1), [1], [0], steps=16))


def test_the_engine_meets_one_number_of_time_steps_whatever_steps_are_asked_for() -> None:
    engine = OnnxRuntimeEngine(tiny_files(), name="tiny")
    calls: list[np.ndarray] = []
    original = engine.timestep_kv

    def counted(timesteps: np.ndarray) -> np.ndarray:
        calls.append(timesteps)
        return original(timesteps)

    engine.timestep_kv = counted  # type: ignore[method-assign]
    spec = tiny_spec()[0]
    policy = PolicyRuntime(spec, engine)
    for steps in (16, 4, 100, 16, 4):
        for batch in (1, 2):
            policy.predict(observation(batch=batch), [0] * batch, [0] * batch, steps)
            loop, _, table = policy._loop(batch, policy.required_tokens, steps)
            np.testing.assert_array_equal(table, original(loop.timesteps))
    assert [list(call) for call in calls] == [list(range(spec.diffusion.train_timesteps))]


def test_earlier_result_is_not_overwritten_by_a_later_one() -> None:
    policy = make_policy()
    first = policy.predict(observation(1), [1], [0])
    kept = first.copy()
    policy.predict(observation(2), [2], [0])
    assert np.array_equal(first, kept)


@given(
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.integers(0, 1),
    st.integers(0, 1),
    st.integers(0, 8),
    st.integers(0, 1),
)
@settings(deadline=None, max_examples=20)
def test_value_that_is_not_finite_is_refused_by_key_and_element(
    value: float, row: int, step: int, point: int, axis: int
) -> None:
    bad = observation(batch=2)
    bad["keypoints"][row, step, point, axis] = value
    text = rf"'keypoints' is {value} at element \({point}, {axis}\) of history step {step}, batch row {row}; .* px"
    with pytest.raises(PolicyError, match=text):
        POLICY.predict(bad, [0, 1], [0, 0])


def test_network_output_that_is_not_finite_is_refused_by_action() -> None:
    policy = make_policy(poison=True)
    with pytest.raises(PolicyError, match="onnxruntime/tiny gave action 'x' = nan at action 0 of batch row 0"):
        policy.predict(observation(), [0], [0])


def replaced(**values: Any) -> dict[str, Any]:
    changed: dict[str, Any] = observation() | values
    return {key: value for key, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (replaced(keypoints=None), "lacks keypoints"),
        (
            replaced(image=np.zeros((1, 2, 3), np.float32)),
            "has unknown image; the policy takes keypoints, agent_position",
        ),
        (replaced(keypoints=np.zeros((1, 2, 9, 2))), "'keypoints': expected a float32 array, got float64"),
        (replaced(agent_position=[[1.0, 2.0]]), "'agent_position': expected a float32 array, got list"),
        (replaced(keypoints=np.zeros((1, 1, 9, 2), np.float32)), r"'keypoints': expected shape \('B', 2, 9, 2\)"),
        (replaced(keypoints=np.zeros((2, 9, 2), np.float32)), r"got \(2, 9, 2\)"),
        (replaced(keypoints=np.zeros((0, 2, 9, 2), np.float32)), r"got \(0, 2, 9, 2\)"),
        (replaced(agent_position=np.zeros((2, 2, 2), np.float32)), "batch of 2, but 1 in the keys before it"),
    ],
)
def test_wrong_observation_is_refused_by_key(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        POLICY.predict(bad, [0], [0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"seeds": [1, 2]}, "seeds: expected 1 entries"),
        ({"chunks": []}, "chunks: expected 1 entries"),
        ({"seeds": [-1]}, "noise seed: expected 0"),
        ({"steps": 0}, "denoising steps: expected 1 to 100, got 0"),
        ({"steps": 101}, "got 101"),
        ({"tokens": 8}, "tokens: expected 9 to 16, got 8"),
        ({"tokens": 17}, "got 17"),
    ],
)
def test_wrong_request_is_refused_by_argument(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        POLICY.predict(observation(), **{"seeds": [0], "chunks": [0], **arguments})


def test_observation_type_without_an_encoder_is_refused_when_the_policy_is_built() -> None:
    language = {
        "type": "language", "shape": [64], "dtype": "float32", "units": "-", "frame": "-", "rate_hz": 10.0,
        "max_age_ms": 300.0, "normalizer": {"kind": "identity"}, "model": "t5",
    }  # fmt: skip
    with pytest.raises(PolicyError, match="observation 'instruction' is language/float32"):
        make_policy(observations={"instruction": language})


def test_warm_up_prepares_tables_and_close_drops_them() -> None:
    policy = make_policy()
    policy.warm_up(steps=4)
    policy.close()
    with pytest.raises(PolicyError, match="is closed"):
        policy.predict(observation(), [0], [0], steps=4)


POLICY = make_policy()
