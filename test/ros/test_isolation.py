"""Domains, environments of child processes, one stack per namespace."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dcqfa_ros.ros import isolation
from dcqfa_ros.ros.isolation import (
    IsolationError,
    child_environment,
    claim_namespace,
    isolated_environment,
    localhost_environment,
)

BOOTSTRAP = "_ROS_WHEELS_BOOTSTRAP_COMPLETE"
LIBRARIES = str(Path(sys.prefix, "lib"))


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_lock_directory", lambda: tmp_path)


def test_two_isolated_graphs_get_different_domains_that_stay_on_this_host() -> None:
    with isolated_environment({}) as one, isolated_environment({}) as two:
        assert one.domain != two.domain
        assert one.env["ROS_DOMAIN_ID"] == str(one.domain)
        assert one.env["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
        assert "ROS_LOCALHOST_ONLY" not in one.env


def test_a_released_domain_can_be_had_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_LAST_DOMAIN", isolation._FIRST_DOMAIN)
    monkeypatch.setattr(isolation, "_domain_is_quiet", lambda domain: True)
    first = isolated_environment({})
    with pytest.raises(IsolationError, match="every ROS domain from 20 to 20 is in use"):
        isolated_environment({})
    first.release()
    first.release()
    isolated_environment({}).release()


def test_a_domain_in_which_something_runs_already_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_FIRST_DOMAIN", 101)
    monkeypatch.setattr(isolation, "_LAST_DOMAIN", 101)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
        participant.bind(("", 7400 + 250 * 101 + 10))
        with pytest.raises(IsolationError):
            isolated_environment({})


def test_humble_gets_its_own_variable_and_peers_elsewhere_are_dropped() -> None:
    env = localhost_environment({"ROS_DISTRO": "humble", "ROS_STATIC_PEERS": "10.0.0.1", "ROS_DISCOVERY_SERVER": "x"})
    assert env["ROS_LOCALHOST_ONLY"] == "1"
    assert "ROS_STATIC_PEERS" not in env
    assert "ROS_DISCOVERY_SERVER" not in env


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({BOOTSTRAP: "1"}, False),
        ({BOOTSTRAP: "1", "LD_LIBRARY_PATH": "/opt/other"}, False),
        ({BOOTSTRAP: "1", "LD_LIBRARY_PATH": f"/opt/other:{LIBRARIES}"}, True),
        ({"LD_LIBRARY_PATH": LIBRARIES}, False),
    ],
)
def test_a_child_gets_the_wheels_mark_only_with_its_library_path(given: dict[str, str], kept: bool) -> None:
    assert (BOOTSTRAP in child_environment(given)) is kept


def test_another_interpreter_gets_neither_the_mark_nor_this_environments_libraries(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.touch()
    env = child_environment({BOOTSTRAP: "1", "LD_LIBRARY_PATH": f"/opt/other:{LIBRARIES}"}, str(other))
    assert BOOTSTRAP not in env
    if sys.prefix != sys.base_prefix:
        assert env["LD_LIBRARY_PATH"] == "/opt/other"


@pytest.mark.parametrize("broken", [{BOOTSTRAP: "1"}, {}])
def test_a_child_can_import_rclpy_and_this_package_from_anywhere(tmp_path: Path, broken: dict[str, str]) -> None:
    base = {k: v for k, v in os.environ.items() if k not in (BOOTSTRAP, "LD_LIBRARY_PATH", "PYTHONPATH")}
    env = child_environment({**base, **broken})
    code = "import rclpy, dcqfa_ros.ros.node, json, test.support; json.dumps({})"  # test: the standard library's
    subprocess.run([sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
                   env=env, cwd=tmp_path, check=True)  # fmt: skip


def test_names_are_held_until_the_stack_ends() -> None:
    with claim_namespace(7, "a"):
        with (
            pytest.raises(
                IsolationError, match=rf"namespace /a of ROS domain 7 \(process {os.getpid()}\).*choose another"
            ),
            claim_namespace(7, "/a/"),
        ):
            pass
        with claim_namespace(7, "b"), claim_namespace(8, "a"), claim_namespace(7, ""):
            pass
    with claim_namespace(7, "a"):
        pass
