"""Identification of the tool's load: exact on clean data, honest about noise, refuses what does not determine it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.safety.tool_load import GRAVITY, ToolLoad, ToolLoadError, rotation_matrix
from dcqfa_ros.safety.tool_load_files import (
    Recorded,
    RecordingError,
    group,
    load_readings,
    save_parameters,
    save_readings,
)
from dcqfa_ros.safety.tool_load_guide import guide
from dcqfa_ros.safety.tool_load_identification import (
    MAX_CONDITION,
    IdentificationError,
    Standstill,
    directions,
    excitation,
    identify,
    standstill,
)

TOOL = ToolLoad(1.3, (0.01, -0.02, 0.07), (2.0, -1.0, 4.0, 0.1, -0.2, 0.05))
S = float(np.sqrt(0.5))
POSES = ((1, 0, 0, 0), (S, S, 0, 0), (S, -S, 0, 0), (S, 0, S, 0), (S, 0, -S, 0), (S, 0, 0, S), (0, 0, 0, 1))


def reading(quaternion, load: ToolLoad = TOOL) -> np.ndarray:
    gravity = rotation_matrix(quaternion).T @ np.array([0, 0, -GRAVITY])
    force = load.mass * gravity
    return np.concatenate([force, np.cross(load.centre_of_mass, force)]) + load.bias


def at(quaternion, load: ToolLoad = TOOL, noise: float = 0.0, rng=None) -> Standstill:
    extra = 0.0 if rng is None else rng.normal(0, noise, 6) * [1, 1, 1, 0.1, 0.1, 0.1]
    return Standstill(tuple(map(float, quaternion)), tuple(reading(quaternion, load) + extra), 200)


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0.1, 5.0),
    st.tuples(*[st.floats(-0.2, 0.2)] * 3),
    st.tuples(*[st.floats(-20, 20)] * 6),
)
def test_any_tool_is_found_exactly_without_noise(mass: float, centre, bias) -> None:
    load = ToolLoad(mass, centre, bias)
    found = identify([at(q, load) for q in POSES])
    assert found.load.mass == pytest.approx(mass, abs=1e-6)
    np.testing.assert_allclose(found.load.centre_of_mass, centre, atol=1e-6)
    np.testing.assert_allclose(found.load.bias, bias, atol=1e-6)
    assert found.force_residual_n < 1e-6
    assert found.torque_condition < MAX_CONDITION
    assert found.orientations == len(POSES)


def test_noise_is_answered_by_residuals_and_errors_of_its_size() -> None:
    rng = np.random.default_rng(0)
    results = [identify([at(q, noise=0.2, rng=rng) for q in POSES]) for _ in range(40)]
    off = np.std([r.load.mass for r in results])
    assert np.mean([r.mass_error_kg for r in results]) == pytest.approx(off, rel=0.5)
    assert np.mean([r.force_residual_n for r in results]) == pytest.approx(0.18, abs=0.05)
    assert np.mean([r.load.mass for r in results]) == pytest.approx(TOOL.mass, abs=0.02)


def test_the_sensors_mounting_is_honoured_and_a_wrong_one_refused() -> None:
    turned = (0.0, 0.0, S, S)
    mounting = rotation_matrix(turned)
    seen = []
    for q in POSES:
        gravity = (rotation_matrix(q) @ mounting).T @ np.array([0, 0, -GRAVITY])
        force = TOOL.mass * gravity
        seen.append(Standstill(q, tuple(np.concatenate([force, np.cross(TOOL.centre_of_mass, force)]) + TOOL.bias), 1))
    assert identify(seen, turned).load.mass == pytest.approx(TOOL.mass)
    with pytest.raises(
        IdentificationError, match=r"the forces miss those of a rigid tool by .* sensor_rotation is wrong"
    ):
        identify(seen)


def test_a_sensor_the_wrong_way_round_is_named() -> None:
    flipped = [replace(at(q), wrench=tuple(-v for v in at(q).wrench)) for q in POSES]
    with pytest.raises(IdentificationError, match="the mass comes out as -1"):
        identify(flipped)


def test_nothing_on_the_sensor_is_no_tool_and_no_error() -> None:
    found = identify([at(q, ToolLoad(0.0, bias=TOOL.bias)) for q in POSES])
    assert found.load.mass == pytest.approx(0.0, abs=1e-9)
    assert found.load.centre_of_mass == (0.0, 0.0, 0.0)


def small_tilts(degrees: float) -> list[Standstill]:
    half = np.radians(degrees) / 2
    c, s = np.cos(half), np.sin(half)
    return [at(q) for q in ((1, 0, 0, 0), (c, 0, 0, s), (c, 0, 0, -s), (c, 0, s, 0), (c, 0, -s, 0))]


@pytest.mark.parametrize(
    ("standstills", "words"),
    [
        ([], "no standstill yet, expected at least 4"),
        ([at(q) for q in POSES[:3]], "3 standstills, expected at least 4"),
        ([at(POSES[0])] * 6, "gravity turns by 0 degrees at most.*tilt the tool further"),
        (small_tilts(10), "gravity turns by 20 degrees at most"),
        (small_tilts(20), "hardly determine centre of mass and torque bias.*sensor's z axis"),
    ],
)
def test_poor_excitation_is_refused_by_name(standstills: list[Standstill], words: str) -> None:
    with pytest.raises(IdentificationError, match=f"poor excitation: .*{words}"):
        identify(standstills)


def test_turning_about_the_vertical_adds_nothing() -> None:
    about = [(np.cos(a), np.sin(a), 0.0, 0.0) for a in np.linspace(0, 1.5, 8)]
    assert excitation(directions([at(q) for q in about]))[2].startswith("gravity turns by 0 degrees")


def test_a_moving_arm_or_load_is_no_standstill() -> None:
    steady = [reading(POSES[0])] * 40
    assert standstill([POSES[0]] * 40, steady).problem == ""
    assert standstill([POSES[0], tuple(-v for v in POSES[0])] * 20, steady).problem == "", "the same orientation"
    assert "the arm turned by 90.0 degrees" in standstill([POSES[0]] * 20 + [POSES[1]] * 20, steady).problem
    shaken = [row + np.array([0, 0, 3.0 * (n % 2), 0, 0, 0]) for n, row in enumerate(steady)]
    bad = standstill([POSES[0]] * 40, shaken)
    assert "Fz is noisy" in bad.problem
    with pytest.raises(IdentificationError, match=r"standstill 2 of 7: Fz is noisy.*record it again"):
        identify([at(POSES[0]), bad, *(at(q) for q in POSES[2:])])
    with pytest.raises(ToolLoadError, match="standstill: expected"):
        standstill([POSES[0]], [[1.0] * 5])


def recording(labels: bool) -> list[Recorded]:
    return [
        Recorded(tuple(map(float, q)), tuple(reading(q).tolist()), str(n) if labels else None)
        for n, q in enumerate(POSES)
        for _ in range(3)
    ]


@pytest.mark.parametrize("labels", [True, False])
def test_a_recording_survives_its_file_and_groups_into_standstills(tmp_path: Path, labels: bool) -> None:
    path = tmp_path / "r.jsonl"
    save_readings(path, recording(labels))
    readings = load_readings(path)
    assert readings == recording(labels)
    standstills = group(readings)
    assert [s.readings for s in standstills] == [3] * len(POSES)
    assert identify(standstills).load.mass == pytest.approx(TOOL.mass)
    rows = ["qx,qy,qz,qw,fx,fy,fz,mx,my,mz"] + [",".join(map(str, (*r.orientation, *r.wrench))) for r in readings]
    (tmp_path / "r.csv").write_text("\n".join(rows))
    assert identify(group(load_readings(tmp_path / "r.csv"))).load.mass == pytest.approx(TOOL.mass)


GOOD = {"orientation": [0, 0, 0, 1], "force": [0, 0, 0], "torque": [0, 0, 0]}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("r.jsonl", "{", "line 1: no JSON"),
        ("r.jsonl", "[1]", "line 1: expected an object"),
        (
            "r.jsonl",
            json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "force": [1, 2]}),
            "line 2: force: expected 3 numbers",
        ),
        ("r.jsonl", json.dumps({**GOOD, "torque": [1, 2, "x"]}), "line 1: torque: expected 3 numbers"),
        ("r.jsonl", json.dumps({**GOOD, "orientation": [0, 0, 0, 0]}), "line 1: orientation: expected a unit quat"),
        ("r.jsonl", json.dumps({**GOOD, "force": [0, float("nan"), 0]}), "line 1: expected finite numbers"),
        ("r.jsonl", "1" * 5000, "line 1: no JSON"),
        ("r.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("r.jsonl", json.dumps({**GOOD, "force": [0, 10**400, 0]}), "line 1: force: expected finite numbers"),
        ("r.jsonl", "\n", "holds no reading"),
        ("r.csv", "qx,qy\n1,2", "column qz is missing"),
        ("r.csv", "qx,qy,qz,qw,fx,fy,fz,mx,my,mz\n0,0,0,1,0,0,zero,0,0,0", "line 2: fz: expected a number, got 'zero'"),
        ("r.csv", "qx,qy,qz,qw,fx,fy,fz,mx,my,mz\n" + "9" * 200_000, "line 2: no CSV"),
        ("r.txt", "", r"expected a file that ends in \.jsonl or \.csv"),
    ],
)
def test_a_broken_recording_is_refused_by_line_and_field(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecordingError, match=words):
        load_readings(tmp_path / name)


def test_a_missing_recording_and_a_folder_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"nowhere\.csv: cannot be read"):
        load_readings(tmp_path / "nowhere.csv")
    with pytest.raises(RecordingError, match="cannot be written"):
        save_readings(tmp_path / "no/r.jsonl", [])


def test_the_parameter_file_is_wrench_nodes_and_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "tool_load.yaml"
    path.write_text("old")
    save_parameters(path, identify([at(q) for q in POSES]), (0.0, 0.0, 0.0, 1.0))
    parameters = yaml.safe_load(path.read_text())["/**/wrench_node"]["ros__parameters"]
    assert parameters["mass"] == pytest.approx(1.3)
    assert parameters["centre_of_mass"] == pytest.approx([0.01, -0.02, 0.07])
    assert parameters["bias"] == pytest.approx(list(TOOL.bias))
    assert parameters["sensor_rotation"] == [0.0, 0.0, 0.0, 1.0]
    assert [p.name for p in tmp_path.iterdir()] == ["tool_load.yaml"]


class Arm:
    """Readings of an arm that an operator turns to the next of ``poses`` before each record."""

    def __init__(self, poses) -> None:
        self._poses = iter(poses)

    def record(self, count: int) -> list[Recorded]:
        pose = next(self._poses)
        if pose is None:  # somebody touches the tool
            touched = [reading(POSES[0]) + np.array([0, 0, 9 * (n % 2), 0, 0, 0]) for n in range(count)]
            return [Recorded(POSES[0], tuple(wrench), None) for wrench in touched]
        return [Recorded(tuple(map(float, pose)), tuple(reading(pose).tolist()), None)] * count


def test_the_guide_takes_standstills_until_they_determine_the_load() -> None:
    said: list[str] = []
    questions: list[str] = []
    arm = Arm([POSES[0], None, POSES[0], POSES[0], POSES[0], POSES[1], POSES[3], POSES[4]])
    standstills, readings = guide(arm, lambda q: questions.append(q) or "", said.append, wanted=4, samples=30)
    assert len(standstills) == 7, "three more than wanted, because gravity was the same in five of them"
    assert len(readings) == 7 * 30
    assert "standstill 1 of 4: the tool straight down" in questions[0]
    assert sum("not used: Fz is noisy" in text for text in said) == 1
    assert any("still missing: " in text for text in said)
    assert identify(standstills).load.mass == pytest.approx(TOOL.mass)


def test_an_operator_who_ends_early_or_never_turns_the_arm_hears_what_is_missing() -> None:
    answers = iter(["", "", "q"])
    with pytest.raises(
        IdentificationError, match="poor excitation after 2 standstills: 2 standstills, expected at least 4"
    ):
        guide(Arm(POSES), lambda _: next(answers), lambda _: None)

    def gone(_: str) -> str:
        raise EOFError

    with pytest.raises(IdentificationError, match="poor excitation after 0 standstills"):
        guide(Arm(POSES), gone, lambda _: None)
    with pytest.raises(IdentificationError, match="poor excitation after 12 standstills: gravity turns by 0 degrees"):
        guide(Arm([POSES[0]] * 50), lambda _: "", lambda _: None, wanted=4)
