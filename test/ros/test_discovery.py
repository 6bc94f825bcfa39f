"""Which Fast DDS profile a node's participant gets."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from dcqfa_ros.paths import find_config
from dcqfa_ros.ros.discovery import PROFILE_NAME, PROFILE_VARIABLE, discovery_profile


@pytest.mark.parametrize("before", [{}, {PROFILE_VARIABLE: ""}])
def test_our_profile_is_named_only_while_the_node_is_made(before: dict[str, str]) -> None:
    env = dict(before)
    with discovery_profile(env) as named:
        assert named
        assert Path(env[PROFILE_VARIABLE]) == find_config(PROFILE_NAME)
    assert env == before


def test_a_profile_chosen_by_the_user_is_kept() -> None:
    env = {PROFILE_VARIABLE: "/home/user/own.xml"}
    with discovery_profile(env) as named:
        assert not named
        assert env == {PROFILE_VARIABLE: "/home/user/own.xml"}


def test_a_profile_in_the_working_directory_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "DEFAULT_FASTRTPS_PROFILES.xml").touch()
    monkeypatch.chdir(tmp_path)
    env: dict[str, str] = {}
    with discovery_profile(env) as named:
        assert not named
        assert not env


def test_the_profile_is_the_default_of_every_participant() -> None:
    root = ElementTree.parse(find_config(PROFILE_NAME)).getroot()
    (participant,) = (e for e in root if e.tag.endswith("participant"))
    assert participant.attrib["is_default_profile"] == "true"
