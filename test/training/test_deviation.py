from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.deviation import (
    DeviationError,
    Options,
    action_deviation,
    curve,
    excess,
    measure,
    parse_contender,
    state_deviations,
)
from training.deviation_plot import check_plot, plot
from training.evaluate import Contender
from training.rollouts import Trajectories
from training.search.plots import PlotError

Command = Callable[[str], Callable[..., tuple[int, str, str]]]
SEEDS = (7, 8)


def run_of(states: np.ndarray) -> Trajectories:
    count = len(states)
    return Trajectories(
        tuple(range(count)),
        states,
        np.full(count, states.shape[1] - 1),
        np.ones(count, int),
        np.zeros(count),
        {},
        np.zeros((count, 1, 8, 2), np.float32),
    )


angles = st.floats(-10, 10)


@settings(deadline=None)
@given(st.floats(-100, 100), st.floats(-100, 100), angles, angles)
def test_states_are_apart_by_their_distances_and_the_smaller_turn(x: float, y: float, one: float, other: float) -> None:
    first = np.array([[[10.0, 20.0, 200.0, 200.0, one]] * 2])
    second = np.array([[[10.0, 20.0 + y, 200.0 + x, 200.0, other]] * 2])
    found = state_deviations(run_of(first), run_of(second))
    assert found["agent_px"][0] == pytest.approx(abs(y)) and found["block_px"][0] == pytest.approx(abs(x))
    turned = found["block_deg"][0, 0]
    assert 0.0 <= turned <= 180.0 + 1e-9
    assert np.cos(np.radians(turned)) == pytest.approx(np.cos(one - other), abs=1e-9)
    swapped = state_deviations(run_of(second), run_of(first))
    assert all(np.allclose(found[name], swapped[name]) for name in found)
    if one == other:
        assert found["keypoints_px"][0] == pytest.approx(abs(x), abs=1e-3)


def test_runs_of_other_seeds_or_lengths_are_no_pair() -> None:
    states = np.zeros((2, 3, 5))
    with pytest.raises(ValueError, match="same seeds"):
        state_deviations(run_of(states), run_of(states[:1]))


def test_action_deviation_counts_calls_that_happened() -> None:
    first = np.zeros((1, 2, 8, 2), np.float32)
    second = first + np.array([3.0, 4.0], np.float32)
    found = action_deviation(first, second, np.array([[True, False]]))
    assert found[0, 0] == pytest.approx(5.0) and np.isnan(found[0, 1])


def test_a_curve_has_intervals_where_there_are_values() -> None:
    found = curve(np.array([[1.0, 2.0, np.nan], [3.0, np.nan, np.nan]]))
    assert found["mean"] == [2.0, 2.0, None] and found["n"] == [2, 1, 0]
    assert found["ci95"][1:] == [None, None]
    assert found["ci95"][0] == pytest.approx(12.706 * np.sqrt(2.0) / np.sqrt(2.0), rel=1e-3)


def test_excess_is_taken_in_pairs_over_the_calls_that_both_runs_have() -> None:
    own = np.array([[1.0, 5.0, np.nan], [2.0, 2.0, 8.0], [3.0, np.nan, np.nan]])
    shown = np.array([[1.0, 2.0, 9.0, 9.0], [1.0, np.nan, np.nan, np.nan], [1.0, 1.0, 1.0, 1.0]])
    assert excess(own, shown).tolist() == [1.5, 1.0, 2.0]
    assert excess(shown, own).tolist() == [-1.5, -1.0, -2.0]


def test_a_network_does_not_depart_from_its_equal(supernet_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(supernet_run, tmp_path / "copy")
    options = Options(SEEDS, horizon=20, steps=1)
    entry = measure([f"{copy}:w4a4"], f"{supernet_run}:w4a4", options)["contenders"][0]
    for name, values in entry["curves"].items():
        assert max(values["mean"]) == pytest.approx(0.0, abs=0.05), name
    for kind in ("own_states", "teacher_states"):
        assert entry["action_px"][kind]["mean"] == pytest.approx([0.0] * 3, abs=0.05)
    assert entry["action_px"]["excess"]["mean"] == pytest.approx(0.0, abs=0.05)


def test_networks_of_other_chunks_or_histories_are_no_pair(supernet_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*given: Any, **options: Any) -> Contender:
        found = parse(*given, **options)
        if found.subnet != "d2-h1-m2-w4a4":
            return found
        action = found.spec.action.model_copy(update={k: v for k, v in fields.items() if k != "history"})
        history = {k: v for k, v in fields.items() if k == "history"}
        keys = {name: key.model_copy(update=history) for name, key in found.spec.observations.items()}
        return replace(found, spec=found.spec.model_copy(update={"action": action, "observations": keys}))

    parse, contenders = parse_contender, [f"{supernet_run}:w8a8", f"{supernet_run}:w4a4"]
    monkeypatch.setattr("training.deviation.parse_contender", changed)
    fields: dict[str, int] = {}
    for other, message in (
        ({"executed": 4}, "executes 4 actions a call, the teacher 8"),
        ({"horizon": 12}, "predicts chunks of 12 actions, the teacher 16"),
        ({"history": 1}, "takes 1 observations a call, the teacher 2"),
    ):
        fields = other
        with pytest.raises(DeviationError, match=f":w4a4: {message}"):
            measure(contenders, str(supernet_run), Options(SEEDS))


def test_a_network_departs_from_another(supernet_run: Path, trained_run: Path) -> None:
    options = Options(SEEDS, horizon=20, steps=1)
    result = measure([f"{supernet_run}:w4a4", f"{supernet_run}:fp32"], f"{supernet_run}:w8a8", options)
    low, full = result["contenders"]
    for entry in (low, full):
        curves = entry["curves"]["keypoints_px"]
        assert len(curves["mean"]) == 21 and curves["mean"][0] == 0.0 and curves["n"] == [2] * 21
        assert len(entry["action_px"]["own_states"]["mean"]) == 3
        assert entry["action_px"]["own_states"]["mean"][0] == pytest.approx(
            entry["action_px"]["teacher_states"]["mean"][0], rel=0.05
        )
        assert entry["area"]["agent_px"]["mean"] > 0.0
        curves = [entry["action_px"][kind]["mean"] for kind in ("own_states", "teacher_states")]
        # no episode ends, so here it is the mean of the difference of the curves
        expected = np.mean(np.subtract(*curves))
        assert entry["action_px"]["excess"]["mean"] == pytest.approx(expected) and expected != 0.0
    difference = full["area"]["keypoints_px"]["mean"] - low["area"]["keypoints_px"]["mean"]
    assert low["paired"] is None and full["paired"]["mean"] == pytest.approx(difference)
    assert json.loads(json.dumps(result)) == result
    with pytest.raises(DeviationError, match="same network as --teacher"):
        measure([f"{supernet_run}:w4a4"], f"{supernet_run}:w4a4", options)
    with pytest.raises(DeviationError, match="--steps 101"):
        measure([f"{supernet_run}:w4a4"], str(trained_run), Options(SEEDS, steps=101))


def test_names_of_policies_that_are_none_are_refused(supernet_run: Path) -> None:
    assert parse_contender(str(supernet_run)).subnet == "d2-h1-m2-fp32"
    with pytest.raises(DeviationError, match="expected POLICY or POLICY:VARIANT"):
        parse_contender(":w4a4")
    with pytest.raises(Exception, match="w2a2"):
        parse_contender(f"{supernet_run}:w2a2")


@pytest.mark.parametrize(
    "fields", [{"seeds": (1,)}, {"seeds": (1, 2**32)}, {"seeds": SEEDS, "horizon": 0}, {"seeds": SEEDS, "horizon": 301}]
)
def test_impossible_measurements_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(DeviationError, match=r"seeds|--horizon"):
        Options(**fields)


def test_the_command_writes_json_and_a_picture(in_process: Command, supernet_run: Path, tmp_path: Path) -> None:
    run = in_process("deviation")
    code, output, _ = run(
        f"{supernet_run}:w4a4", "--teacher", f"{supernet_run}:fp32", "--seeds", 2, "--horizon", 9, "--steps", 1,
        "--out", tmp_path / "curves.json", "--plot", tmp_path / "curves.png", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(output) == json.loads((tmp_path / "curves.json").read_text())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    code, text, _ = run(
        f"{supernet_run}:w4a4", "--teacher", f"{supernet_run}:fp32", "--seeds", 2, "--horizon", 9, "--steps", 1
    )
    found = json.loads(output)["contenders"][0]["action_px"]["excess"]
    assert code == 0 and f"excess {found['mean']:.2f} +- {found['ci95']:.2f} px" in text
    for arguments, message in (
        ((f"{supernet_run}:w4a4", "--teacher", str(supernet_run), "--seeds", 1), "--seeds: expected at least 2"),
        ((f"{supernet_run}:w4a4", "--teacher", str(supernet_run), "--plot", "x.gif"), "expected a file name"),
        ((f"{supernet_run}:w4a4", "--teacher", str(supernet_run), "--out", "nowhere/x.json"), "no folder nowhere"),
        (("nothing", "--teacher", str(supernet_run)), "nothing"),
    ):
        code, _, errors = run(*arguments)
        assert code == 2 and message in errors


def test_a_picture_needs_a_known_suffix_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "x.bmp", tmp_path / "nowhere/x.png"):
        with pytest.raises(PlotError, match="--plot"):
            check_plot(path)
    with pytest.raises(PlotError):
        plot({}, tmp_path / "x.txt")
