from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch._inductor.config as inductor

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.errors import UserError
from training import evaluate as evaluate_module
from training.envs.pusht import PushTWorlds
from training.evaluate import EvaluationError, evaluate, find, roll_out
from training.export import bundle as bundle_module
from training.export.bundle import ExportOptions, export_bundle

ROOT = Path(__file__).parents[2]
SEEDS = (200_001, 200_002, 200_003)


@pytest.fixture(scope="module")
def bundle(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "policy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_module, "PARITY_SAMPLES", 4)
        export_bundle(trained_run, folder, ExportOptions(calibration=8))
    return folder


class PushTowards:
    """A policy without a network: drives to the block's first key point; counts its calls."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.chunks: list[tuple[int, ...]] = []

    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        seeds: Sequence[int],
        chunks: Sequence[int],
        steps: int | None = None,
    ) -> np.ndarray:
        assert observation["keypoints"].shape == (len(seeds), 2, 9, 2)
        assert observation["agent_position"].shape == (len(seeds), 2, 2)
        assert observation["agent_position"].dtype == np.float32
        self.batches.append(len(seeds))
        self.chunks.append(tuple(chunks))
        return np.repeat(observation["keypoints"][:, -1, :1], 8, axis=1)


def test_all_worlds_share_one_call_per_chunk() -> None:
    policy = PushTowards()
    result = roll_out(policy, SEEDS, history=2)
    assert policy.batches[0] == len(SEEDS)
    assert policy.chunks == [(chunk,) * batch for chunk, batch in enumerate(policy.batches)]
    assert len(policy.batches) <= 38  # 300 steps in chunks of 8
    assert all(0.0 <= score <= 1.0 for score in result.scores)
    assert all(steps == 300 or score == 1.0 for steps, score in zip(result.steps, result.scores, strict=True))


def test_the_result_is_repeatable_and_does_not_depend_on_the_other_seeds() -> None:
    alone = [roll_out(PushTowards(), [seed], history=2).scores[0] for seed in SEEDS]
    together = roll_out(PushTowards(), SEEDS, history=2)
    assert list(together.scores) == alone
    assert roll_out(PushTowards(), SEEDS, history=2) == together


def test_before_the_start_the_first_observation_repeats() -> None:
    worlds = PushTWorlds([200_001], history=3)
    (state,) = worlds.reset()
    position = state.history["agent_position"]
    np.testing.assert_array_equal(position[0], position[2])
    moved = worlds.step(0, np.full((1, 2), 256.0, np.float32)).history["agent_position"]
    np.testing.assert_array_equal(moved[:2], position[:2])
    assert (moved[2] != moved[1]).any()


def test_checkpoint_and_exported_bundle_score_alike(trained_run: Path, bundle: Path) -> None:
    from_checkpoint = evaluate(str(trained_run), None, SEEDS, steps=2)
    from_bundle = evaluate(str(bundle), "fp32", SEEDS, steps=2)
    np.testing.assert_allclose(from_checkpoint["scores"], from_bundle["scores"], atol=0.02)
    assert from_checkpoint["variant"] == "checkpoint"
    assert from_bundle["seeds"] == list(SEEDS)
    assert from_bundle["mean"] == pytest.approx(np.mean(from_bundle["scores"]))
    assert from_bundle == evaluate(str(bundle), "fp32", SEEDS, steps=2) | {"seconds": from_bundle["seconds"]}


@pytest.mark.parametrize("variant", ["fp32", "w8a8"])
def test_a_bundle_is_evaluated_without_torch(bundle: Path, variant: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from training.evaluate import evaluate\n"
        f"print(evaluate({str(bundle)!r}, {variant!r}, [200001], steps=1)['mean'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0.0 <= float(done.stdout) <= 1.0


def test_unknown_variants_and_other_tasks_are_refused(bundle: Path, trained_run: Path, tiny_bundle: Any) -> None:
    with pytest.raises(EvaluationError, match="it has fp32, w8a8"):
        evaluate(str(bundle), "w4a4", SEEDS)
    with pytest.raises(UserError, match=r"--variant fp32: .* has no variants"):
        evaluate(str(trained_run), "fp32", SEEDS)
    with pytest.raises(EvaluationError, match="at least 1"):
        evaluate(str(bundle), "fp32", [])


def test_the_eval_command_prints_mean_interval_scores_and_seeds(dcqfa: list[str], bundle: Path) -> None:
    command = [*dcqfa, "eval", str(bundle), "--seeds", "2", "--first-seed", "200000", "--steps", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["seeds"] == [200000, 200001]
    assert len(result["scores"]) == 2
    assert result["ci95"] >= 0.0
    assert result["variant"] == "fp32"


@pytest.mark.parametrize(
    "arguments",
    [
        ["absent_bundle"],
        ["absent_bundle", "--seeds", "0"],
        ["x", "--first-seed", "-1"],
        ["absent.pt"],
        ["absent_bundle", "--first-seed", "4294967290"],
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(dcqfa: list[str], arguments: list[str]) -> None:
    done = subprocess.run(
        [*dcqfa, "eval", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dcqfa: error: ")


def test_the_result_names_the_weights_it_belongs_to(bundle: Path, trained_run: Path) -> None:
    expected = load_bundle(bundle).spec.variant("w8a8").weights
    assert evaluate(str(bundle), "w8a8", SEEDS[:1], steps=1)["weights"] == expected
    assert evaluate(str(trained_run), None, SEEDS[:1], steps=1)["weights"] is None


def test_two_variants_are_compared_in_pairs_on_the_same_seeds(bundle: Path) -> None:
    result = evaluate(str(bundle), "fp32", SEEDS, steps=1, against="w8a8")
    alone = evaluate(str(bundle), "w8a8", SEEDS, steps=1)
    differences = np.subtract(result["scores"], alone["scores"])
    paired = result["paired"]
    assert paired["other"] == "w8a8"
    assert paired["mean"] == pytest.approx(differences.mean(), abs=1e-12)
    assert paired["ci95"] == pytest.approx(4.302652729911275 * differences.std(ddof=1) / np.sqrt(3), abs=1e-12)
    assert alone["paired"] is None


def test_a_comparison_that_makes_no_sense_is_refused_before_any_evaluation(
    bundle: Path, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "roll_out", lambda *_: pytest.fail("an episode was run"))
    for variant, other in ((None, "fp32"), ("w8a8", "w8a8"), ("w8a8", f"{bundle}:w8a8")):
        with pytest.raises(EvaluationError, match=f"--against {other}: expected another variant"):
            evaluate(str(bundle), variant, SEEDS, against=other)
    with pytest.raises(EvaluationError, match=r"--against w4a4: bundle .* it has fp32, w8a8"):
        evaluate(str(bundle), "fp32", SEEDS, against="w4a4")
    with pytest.raises(UserError, match=r"--against fp32: .* has no variants"):
        evaluate(str(trained_run), None, SEEDS, against="fp32")
    for other in (":fp32", f"{bundle}:"):
        with pytest.raises(EvaluationError, match="expected a variant or subnet, or TARGET:VARIANT"):
            evaluate(str(bundle), "fp32", SEEDS, against=other)
    with pytest.raises(EvaluationError, match=r"--against absent:fp32: .*no such bundle"):
        evaluate(str(bundle), "fp32", SEEDS, against="absent:fp32")
    with pytest.raises(EvaluationError, match=r"--steps 101: .* takes 1 to 100"):
        evaluate(str(bundle), "fp32", SEEDS, steps=101)


def test_seeds_beyond_the_legacy_generator_are_refused(bundle: Path) -> None:
    with pytest.raises(EvaluationError, match="start seeds are 0 to 4294967295"):
        evaluate(str(bundle), "fp32", range(4294967290, 4294967340))


def test_the_eval_command_prints_the_paired_difference(dcqfa: list[str], bundle: Path) -> None:
    options = ["--seeds", "2", "--first-seed", "200000", "--steps", "1", "--against", "w8a8"]
    command = [*dcqfa, "eval", str(bundle), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "against w8a8 (mean score" in done.stdout
    assert "95 % interval" in done.stdout


def test_more_seeds_than_fit_together_are_run_in_batches_with_the_same_result(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, network = roll_out(PushTowards(), SEEDS, history=2), evaluate(str(bundle), "fp32", SEEDS, steps=1)
    monkeypatch.setattr(evaluate_module, "WORLDS_TOGETHER", 2)
    policy = PushTowards()
    assert roll_out(policy, SEEDS, history=2) == together
    assert max(policy.batches) == 2 and policy.chunks.count((0,)) == 1 and policy.chunks.count((0, 0)) == 1
    batched = evaluate(str(bundle), "fp32", SEEDS, steps=1)
    np.testing.assert_allclose(batched["scores"], network["scores"], atol=0.02)


def test_subnets_are_variants_of_a_supernet_and_compared_in_pairs(supernet_run: Path) -> None:
    result = evaluate(str(supernet_run), "w4a4", SEEDS[:2], steps=1, against="d1-h.5-m1-fp8")
    alone = evaluate(str(supernet_run), "d1-h.5-m1-fp8", SEEDS[:2], steps=1)
    assert (result["variant"], result["subnet"]) == ("w4a4", "d2-h1-m2-w4a4")
    paired = result["paired"]
    assert (paired["other"], paired["other_subnet"]) == ("d1-h.5-m1-fp8", "d1-h.5-m1-fp8")
    assert paired["other_scores"] == alone["scores"]
    assert paired["mean"] == pytest.approx(np.subtract(result["scores"], alone["scores"]).mean(), abs=1e-12)
    default = evaluate(str(supernet_run), None, SEEDS[:1], steps=1)
    assert (default["variant"], default["subnet"]) == ("largest", "d2-h1-m2-fp32")


def test_a_subnet_is_compared_with_a_variant_of_a_bundle_on_the_same_seeds(supernet_run: Path, bundle: Path) -> None:
    result = evaluate(str(supernet_run), "w8a8", SEEDS[:2], steps=1, against=f"{bundle}:w8a8")
    expected = evaluate(str(bundle), "w8a8", SEEDS[:2], steps=1)
    paired = result["paired"]
    assert paired["other_scores"] == expected["scores"]
    assert paired["other_weights"] == expected["weights"]
    reverse = evaluate(str(bundle), "w8a8", SEEDS[:2], steps=1, against=f"{supernet_run}:w8a8")
    assert reverse["paired"]["mean"] == pytest.approx(-paired["mean"], abs=1e-12)
    assert reverse["paired"]["other_subnet"] == "d2-h1-m2-w8a8"


def test_unknown_subnets_and_two_names_of_one_subnet_are_refused_before_any_evaluation(
    supernet_run: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "roll_out", lambda *_: pytest.fail("an episode was run"))
    run = str(supernet_run)
    with pytest.raises(UserError, match="--variant w3a3: not in the search space"):
        evaluate(run, "w3a3", SEEDS)
    with pytest.raises(UserError, match="--against d9-h1-m2-fp8: not in the search space"):
        evaluate(run, "w4a4", SEEDS, against="d9-h1-m2-fp8")
    with pytest.raises(UserError, match=f"--against w2a2: not in the search space of {run}"):
        evaluate(str(bundle), "fp32", SEEDS, against=f"{run}:w2a2")
    for one, other in (("largest", "fp32"), (None, "largest"), ("w4a4", f"{run}/checkpoint.pt:d2-h1-m2-w4a4")):
        with pytest.raises(EvaluationError, match="expected another variant"):
            evaluate(run, one, SEEDS, against=other)
    with pytest.raises(EvaluationError, match="--compile: only subnets"):
        evaluate(str(bundle), "fp32", SEEDS, against="w8a8", compiled=True)
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(UserError, match=r"no C\+\+ compiler"):
        evaluate(run, "w4a4", SEEDS, compiled=True)


@pytest.mark.slow
def test_compilation_changes_predictions_by_rounding_only(supernet_run: Path) -> None:
    generator = np.random.default_rng(0)
    observation = {
        "keypoints": generator.uniform(100, 400, (3, 2, 9, 2)).astype(np.float32),
        "agent_position": generator.uniform(100, 400, (3, 2, 2)).astype(np.float32),
    }
    actions = []
    for compiled in (False, True):
        with find(str(supernet_run), "int.1h32w4a8.4h64w8a4", compiled=compiled).open() as policy:
            actions.append(policy.predict(observation, SEEDS, (0, 1, 2)))
    np.testing.assert_allclose(actions[1], actions[0], atol=1.0)  # px; codes on the edge between two may differ
