"""A misspelt parameter in a file is an error with its place and, where there is one, the right name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcqfa_ros.paths import find_config
from dcqfa_ros.ros.parameter_files import (
    ParameterFileError,
    check_parameter_files,
    check_sections,
    node_parameters,
    section_matches,
)

KNOWN = {"control_rate", "limits.minimum", "use_sim_time"}


def check(tmp_path: Path, text: str, node: str = "arm_node") -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    check_parameter_files(["node", "--ros-args", "--params-file", str(file), "-r", "__ns:=/a"], node, KNOWN)


@pytest.mark.parametrize(
    "text",
    [
        "/**/arm_node: {ros__parameters: {control_rat: 1.0}}",
        "arm_node: {ros__parameters: {limits: {minimun: [0.0]}}}",
        "/a: {arm_node: {ros__parameters: {control_rat: 1.0}}}",
    ],
)
def test_a_misspelt_parameter_is_named_with_file_section_and_the_right_name(tmp_path, text):
    with pytest.raises(
        ParameterFileError, match=r"own.yaml: .*arm_node: .*did you mean (control_rate|limits.minimum)\?"
    ):
        check(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "/**/arm_node: {ros__parameters: {control_rate: 1.0, limits.minimum: [0.0], limits: {minimum: [1.0]}}}",
        "/**: {ros__parameters: {anything: 1}}",
        "/**/camera_node: {ros__parameters: {fps: 30.0}}",
        "",
        "[1, 2]",
        "not: [valid",
    ],
)
def test_what_is_right_or_meant_for_others_is_left_alone(tmp_path, text):
    check(tmp_path, text)


def test_a_missing_file_is_left_to_ros():
    check_parameter_files(["--params-file", "/nowhere.yaml"], "arm_node", KNOWN)


def test_the_shipped_file_names_only_nodes_of_the_graph():
    text = find_config("pusht_cell").read_text()
    for node in ("arm", "policy", "camera", "selector", "trial", "lifecycle_manager"):
        assert f"/**/{node}_node:" in text


# files given at bring-up


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/**/arm_nod: {ros__parameters: {rate: 1.0}}", r"/\*\*/arm_nod: no node .*; did you mean /\*\*/arm_node\?"),
        ("/arm_node: {ros__parameters: {rate: 1.0}}", r"/arm_node: .*nodes run in namespace /a: write /\*\*/arm_node"),
        ("/**/zebra: {ros__parameters: {rate: 1.0}}", "zebra: no node .*; there are arm_node, wrench_node"),
        ("arm_node: {rate: 1.0}", "/arm_node/rate: expected ros__parameters"),
        ("ros__parameters: {rate: 1.0}", "expected ros__parameters"),
        ("/**/arm_node: {ros__parameters: 3}", "expected ros__parameters"),
        ("[1, 2]", "expected sections such as"),
        ("not: [valid", "cannot be read as a parameter file"),
    ],
)
def test_a_file_that_no_node_would_take_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ParameterFileError, match=message):
        check_sections(file, "a", ["arm_node", "wrench_node"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/**/arm_node: {ros__parameters: {rate: 1.0}}",
        "/**: {ros__parameters: {rate: 1.0}}",
        "/a/arm_node: {ros__parameters: {rate: 1.0}}",
        "/a: {wrench_node: {ros__parameters: {rate: 1.0}}}",
        "/*/arm_node: {ros__parameters: {rate: 1.0}}",
        "/**/arm_node: {ros__parameters: }",
    ],
)
def test_a_file_for_the_nodes_of_the_cell_is_accepted(tmp_path: Path, text: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    check_sections(file, "a", ["arm_node", "wrench_node"])


def test_parameters_of_a_node_come_from_the_sections_that_match_it(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "/**: {ros__parameters: {x: 1}}\n/**/arm_node: {ros__parameters: {inovo: {port: 1}, y: 2}}\n"
        "/b/arm_node: {ros__parameters: {y: 3}}\n"
    )
    assert node_parameters(file, "/arm_node") == {"x": 1, "inovo.port": 1, "y": 2}
    assert node_parameters(file, "/b/arm_node") == {"x": 1, "inovo.port": 1, "y": 3}
    assert node_parameters(file, "/b/wrench_node") == {"x": 1}


def test_wildcards_of_sections() -> None:
    assert section_matches("/**/arm_node", "/arm_node")
    assert section_matches("/**/arm_node", "/a/b/arm_node")
    assert section_matches("/*/arm_node", "/a/arm_node")
    assert not section_matches("/*/arm_node", "/arm_node")
    assert not section_matches("/*/arm_node", "/a/b/arm_node")
    assert not section_matches("/**/arm_node", "/my_arm_node")
