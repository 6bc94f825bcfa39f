"""A misspelt parameter in a file is an error with its place and, where there is one, the right name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcqfa_ros.paths import find_config
from dcqfa_ros.ros.parameter_files import ParameterFileError, check_parameter_files

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
