"""A wrong but well-formed variant is found before it may move anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.parity import SAMPLES, ParityError, ParityLog, fixed_chunks, fixed_observation
from dcqfa_ros.runtime.policy import PolicyRuntime
from test.runtime.conftest import tiny_files, tiny_spec

SPEC, _ = tiny_spec()
BUNDLE = Bundle(SPEC, Path("tiny"))
Predict = Callable[..., np.ndarray]


def predictor(quantized: bool) -> Predict:
    runtime = PolicyRuntime(SPEC, OnnxRuntimeEngine(tiny_files(quantized)))
    return lambda observation, seed, chunk: runtime.predict(observation, [seed], [chunk])[0]


FULL, REDUCED = predictor(False), predictor(True)


def mirrored(observation: dict[str, np.ndarray], seed: int, chunk: int) -> np.ndarray:
    """Well-formed, finite, within the limits, and wrong."""
    return 512.0 - FULL(observation, seed, chunk)


def with_record(index: int = 0, **changes: object) -> Bundle:
    document = SPEC.model_dump(mode="json")
    document["variants"][index]["parity"].update(changes)
    return Bundle(BundleSpec.model_validate_json(json.dumps(document)), Path("tiny"))


def test_fixed_observations_are_the_same_everywhere_and_fill_the_normalised_range() -> None:
    first, second = fixed_observation(SPEC, 0), fixed_observation(SPEC, 1)
    assert first["keypoints"].shape == (1, 2, 9, 2) and first["keypoints"].dtype == np.float32
    assert np.array_equal(first["keypoints"][0, 0], first["keypoints"][0, 1])
    assert not np.array_equal(first["keypoints"], second["keypoints"])
    np.testing.assert_allclose(first["agent_position"][0, 0], PINNED, rtol=1e-6)
    every = np.stack([fixed_observation(SPEC, n)["keypoints"] for n in range(SAMPLES)])
    assert 0.0 <= every.min() < 60.0 and 450.0 < every.max() <= 512.0


PINNED = [453.01474, 290.84006]


def test_variants_of_one_policy_agree() -> None:
    log = ParityLog()
    first, accept = log.check(BUNDLE, "fp32", "onnxruntime/fp32", FULL)
    assert first.rms is None and first.against == ""
    accept()
    second, _ = log.check(BUNDLE, "w8a8", "onnxruntime/w8a8", REDUCED)
    assert second.against == "onnxruntime/fp32" and 0.0 < second.rms < second.allowed


def test_the_last_accepted_engine_counts_and_one_that_never_ran_does_not() -> None:
    log = ParityLog()
    log.check(BUNDLE, "fp32", "onnxruntime/fp32", FULL)
    assert log.check(BUNDLE, "w8a8", "onnxruntime/w8a8", REDUCED)[0].rms is None


def test_a_wrong_but_well_formed_variant_is_refused_with_figures() -> None:
    log = ParityLog()
    bundle = with_record(1, rms=0.01)
    log.check(bundle, "fp32", "onnxruntime/fp32", FULL)[1]()
    with pytest.raises(ParityError, match=r"w8a8 computes other actions than onnxruntime/fp32.* allowed is 0\.06"):
        log.check(bundle, "w8a8", "onnxruntime/w8a8", mirrored)
    with pytest.raises(ParityError, match=r"openvino/fp32 computes .* allowed is 0\.05"):
        log.check(bundle, "fp32", "openvino/fp32", mirrored)


def test_chunks_that_the_bundle_records_are_what_the_first_engine_is_compared_with() -> None:
    recorded = with_record(fixed_chunks=fixed_chunks(SPEC, FULL).ravel().tolist())
    found, _ = ParityLog().check(recorded, "fp32", "onnxruntime/fp32", FULL)
    assert found.rms == pytest.approx(0.0, abs=1e-6) and found.against == "its bundle records"
    with pytest.raises(ParityError, match="its bundle records"):
        ParityLog().check(recorded, "fp32", "onnxruntime/fp32", mirrored)
    with pytest.raises(ParityError, match="has 3 entries, expected 64"):
        ParityLog().check(with_record(fixed_chunks=[0.0] * 3), "fp32", "onnxruntime/fp32", FULL)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6, -1e6])
def test_actions_far_outside_the_limits_and_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(ParityError, match=r"action 'y' is .* px for a fixed observation; its limits are 0 to 512"):
        fixed_chunks(SPEC, lambda *_: np.array([[0.0, value]] * 8, np.float32))


def test_another_bundle_of_the_same_contract_is_not_compared() -> None:
    log = ParityLog()
    log.check(BUNDLE, "fp32", "onnxruntime/fp32", FULL)[1]()
    assert log.check(Bundle(SPEC, Path("other")), "fp32", "onnxruntime/other:fp32", mirrored)[0].rms is None
