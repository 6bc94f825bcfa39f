"""The Fast DDS profile is given where it helps, never over a user's own choice, and a small /dev/shm is reported."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest

from dcqfa_ros.paths import find_config
from dcqfa_ros.ros import fastdds
from dcqfa_ros.ros.fastdds import PROFILE_VARIABLE, image_transport, shared_memory_free, use_image_profile

MIB = 2**20


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Set how many MiB the file system behind /dev/shm has free."""

    def set_free(mib: int) -> None:
        monkeypatch.setattr(fastdds.os, "statvfs", lambda _: SimpleNamespace(f_bavail=mib * MIB // 4096, f_frsize=4096))

    set_free(1024)
    return set_free


def test_the_profile_says_the_sizes_the_code_relies_on() -> None:
    root = ElementTree.parse(find_config(fastdds.PROFILE_NAME)).getroot()
    values = {element.tag.split("}")[1]: (element.text or "").strip() for element in root.iter()}
    assert int(values["segment_size"]) == fastdds.SEGMENT_BYTES
    assert int(values["maxMessageSize"]) == fastdds.MESSAGE_BYTES
    assert values["useBuiltinTransports"] == "false"


def test_an_image_publisher_gets_our_profile(free) -> None:
    environment: dict[str, str] = {"HOME": "/home/user"}
    transport = use_image_profile(environment)
    assert (transport.profile, transport.problem) == ("dcqfa", None)
    assert Path(environment[PROFILE_VARIABLE]) == find_config(fastdds.PROFILE_NAME)
    assert use_image_profile(environment).profile == "dcqfa", "a launcher may have set it already"


def test_a_users_own_profile_is_kept_and_said_so(free, tmp_path: Path) -> None:
    own = tmp_path / "own.xml"
    own.write_text("<profiles/>")
    environment = {PROFILE_VARIABLE: str(own)}
    transport = use_image_profile(environment)
    assert (transport.profile, transport.problem, environment) == ("user", None, {PROFILE_VARIABLE: str(own)})
    assert str(own) in transport.message
    assert "kept" in transport.message


def test_a_users_profile_that_does_not_exist_is_a_problem(free, tmp_path: Path) -> None:
    transport = image_transport({PROFILE_VARIABLE: str(tmp_path / "none.xml")})
    assert transport.profile == "user"
    assert "does not exist" in (transport.problem or "")


def test_a_profile_in_the_working_directory_is_kept(free, tmp_path: Path) -> None:
    (tmp_path / "DEFAULT_FASTRTPS_PROFILES.xml").write_text("<profiles/>")
    transport = image_transport({}, working_directory=tmp_path)
    assert transport.profile == "user"
    assert transport.environment == {}


@pytest.mark.parametrize("rmw", ["rmw_cyclonedds_cpp", "rmw_zenoh_cpp"])
def test_another_rmw_is_kept_and_said_so(free, rmw: str) -> None:
    environment = {"RMW_IMPLEMENTATION": rmw}
    transport = use_image_profile(environment)
    assert (transport.profile, transport.rmw) == ("none", rmw)
    assert rmw in transport.message
    assert PROFILE_VARIABLE not in environment


@pytest.mark.parametrize("rmw", ["rmw_fastrtps_cpp", "rmw_fastrtps_dynamic_cpp", ""])
def test_every_fast_dds_rmw_gets_the_profile(free, rmw: str) -> None:
    assert image_transport({"RMW_IMPLEMENTATION": rmw}).profile == "dcqfa"


def test_small_shared_memory_is_reported_with_the_cure(free) -> None:
    free(20)
    environment = {PROFILE_VARIABLE: str(find_config(fastdds.PROFILE_NAME))}
    transport = use_image_profile(environment)
    assert transport.profile == "none"
    assert transport.problem is not None
    assert "20 MiB free, expected at least 36 MiB" in transport.problem
    assert "--shm-size" in transport.problem
    assert PROFILE_VARIABLE not in environment, "the profile would only make Fast DDS fail"


def test_missing_shared_memory_is_reported(tmp_path: Path) -> None:
    transport = image_transport({}, folder=tmp_path / "none")
    assert transport.shared_memory_free is None
    assert "does not exist" in (transport.problem or "")


def test_free_bytes_are_those_of_the_file_system(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    assert shared_memory_free(tmp_path) == pytest.approx(stat.f_bavail * stat.f_frsize, rel=0.2)
