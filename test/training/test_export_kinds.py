"""Policies that take known tokens, and few-step ones, as bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.verify import verify_bundle
from dcqfa_ros.runtime.chunking import Continuation, Method
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.policy import PolicyRuntime
from training.checkpoint import load_checkpoint, save_checkpoint
from training.config import load_config, override
from training.data.episodes import read_demonstrations
from training.data.normalizer import concatenate_normalizers, normalize
from training.evaluate import evaluate
from training.export import bundle as bundle_module
from training.export.bundle import ExportOptions, export_bundle
from training.export.calibration import denoise_chunks, known_tokens, training_observations
from training.torch_engine import TorchEngine
from training.trained import load_trained
from training.warm_start import load_policy_weights

from .conftest import write_teacher

PREFIX = 8
KINDS = ("prefix", "fewstep", "both")


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of each kind, with random weights large enough for the flag and nonlinearities to show."""
    folder = tmp_path_factory.mktemp(request.param)
    config = load_config(trained_run.parent / "tiny.yaml")
    if request.param != "fewstep":
        config = override(config, policy={"prefix": PREFIX})
    write_teacher(folder, config)
    if request.param != "prefix":  # as its trainer would leave it: the network is one and the same
        payload = load_checkpoint(folder / "checkpoint.pt")
        few = {"diffusion": payload["config"]["diffusion"] | {"sampler": "consistency", "steps": 4}}
        payload["config"] |= few | {"consistency": {"skip": 5}, "warm_start": str(trained_run)}
        save_checkpoint(folder / "checkpoint.pt", {k: v for k, v in payload.items() if k != "format"})
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    before, bundle_module.PARITY_SAMPLES = bundle_module.PARITY_SAMPLES, 8
    try:
        export_bundle(run, run / "bundle", ExportOptions(calibration=64))
    finally:
        bundle_module.PARITY_SAMPLES = before
    return run / "bundle"


def policy(folder: Path, variant: str) -> PolicyRuntime:
    bundle = load_bundle(folder)
    files = {role: bundle.read(variant, role) for role in ("encoder", "timestep", "denoiser")}
    return PolicyRuntime(bundle.spec, OnnxRuntimeEngine(files, name=variant))


def observation(rows: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {
        "keypoints": generator.uniform(100, 400, (rows, 2, 9, 2)).astype(np.float32),
        "agent_position": generator.uniform(100, 400, (rows, 2, 2)).astype(np.float32),
    }


def test_the_bundle_says_what_its_network_takes_and_verifies(run: Path, exported: Path) -> None:
    spec, config = load_bundle(exported).spec, load_trained(run).config
    assert verify_bundle(exported).ok
    assert spec.diffusion.prefix == config.policy.prefix
    assert spec.diffusion.sampler == config.diffusion.sampler
    full, small = spec.variants
    assert full.parity.max_abs <= 1e-4 and small.parity.export_rms <= small.parity.tolerance_export_rms
    assert full.size.paper_bytes == 4 * full.size.parameters


@pytest.mark.parametrize("variant", ["fp32", "w8a8"])
def test_what_is_known_is_kept_and_changes_the_rest(exported: Path, variant: str) -> None:
    runtime = policy(exported, variant)
    seen = observation(3)
    previous = np.random.default_rng(4).uniform(100, 400, (12, 2)).astype(np.float32)

    def predict(continuations: Any = None) -> np.ndarray:
        return runtime.predict(seen, [1, 2, 3], [0, 0, 0], continuations=continuations).copy()

    if runtime.spec.diffusion.prefix == 0:
        with pytest.raises(PolicyError, match=r"diffusion\.prefix"):
            predict([Continuation(previous, 4, 8, Method.TRAINED), None, None])
        return
    free = predict()
    held = predict([Continuation(previous, 4, 8, Method.TRAINED), None, Continuation(previous, 0, 8, Method.TRAINED)])
    np.testing.assert_allclose(held[0, :3], previous[1:4], atol=1e-3)  # token 0 lies before the observation
    assert np.abs(held[0, 3:] - free[0, 3:]).max() > 1.0
    np.testing.assert_allclose(held[1:], free[1:], atol=1e-3)


def test_the_run_and_its_bundle_predict_alike(run: Path, exported: Path) -> None:
    bundle, trained = policy(exported, "fp32"), load_trained(run)
    ours = PolicyRuntime(trained.meaning.specification(), TorchEngine(trained.network))
    for steps in (None, 1, 2):
        first, second = (runtime.predict(observation(4), [1, 2, 3, 4], [0] * 4, steps) for runtime in (ours, bundle))
        np.testing.assert_allclose(first, second, atol=0.05)  # px


def test_both_are_evaluated_in_closed_loop(run: Path, exported: Path) -> None:
    first, second = (evaluate(str(target), None, [200_001], steps=1) for target in (run, exported))
    assert first["sampler"] == second["sampler"] == load_bundle(exported).spec.diffusion.sampler
    assert abs(first["mean"] - second["mean"]) < 0.05


def test_the_bundle_gives_back_its_weights(run: Path, exported: Path) -> None:
    original, config = load_trained(run).network.state_dict(), load_trained(run).config.policy
    state = load_policy_weights(exported, config)
    assert np.allclose(state["action_embedding.weight"], original["action_embedding.weight"], rtol=1e-6)
    assert list(state) == list(original)


def test_calibration_sees_known_tokens_of_every_length(run: Path) -> None:
    trained = load_trained(run)
    meaning, demonstrations = trained.meaning, read_demonstrations(trained.config.data)
    known = known_tokens(meaning, demonstrations, 60, 5)
    if trained.config.policy.prefix == 0:
        assert known is None
        return
    assert known is not None and set(known.length.tolist()) == set(range(PREFIX + 1))
    observed = training_observations(meaning, demonstrations, 60, 5)
    diffusion = meaning.specification().diffusion
    chunks = denoise_chunks(TorchEngine(trained.network), diffusion, trained.config.policy, observed, known=known)
    for chunk, action, length in zip(chunks, known.action, known.length, strict=True):
        assert np.array_equal(chunk[:length], action[:length])
        assert length == 16 or (chunk[length:] != action[length:]).any()
    # What is known belongs to what is observed: token 0 is the action of the oldest observed time step.
    states = normalize(demonstrations.observation, concatenate_normalizers(meaning.observation_norms, meaning.shapes))
    rows = {tuple(row): index for index, row in enumerate(normalize(demonstrations.action, meaning.action_norm))}
    for action, seen in zip(known.action, observed, strict=True):
        assert np.array_equal(states[rows[tuple(action[0])]], seen[0])
    again = known_tokens(meaning, demonstrations, 60, 5)
    assert again is not None and np.array_equal(again.length, known.length)
