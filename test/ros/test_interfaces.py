"""The interface table, its documentation and the QoS profiles."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

from dcqfa_ros.ros.interfaces import INTERFACES, OPTIONAL_PACKAGES, interface, markdown
from dcqfa_ros.ros.qos import PROFILES, qos

ROOT = Path(__file__).parents[2]


def test_the_documentation_is_generated_from_the_table() -> None:
    assert (ROOT / "docs" / "interfaces.md").read_text() == markdown(), (
        "run: python -m dcqfa_ros.ros.interfaces > docs/interfaces.md"
    )


def test_every_name_is_relative_and_every_key_and_name_unique() -> None:
    assert all(re.fullmatch(r"[a-z{][a-z0-9_/{}]*", e.name) for e in INTERFACES)
    assert len({e.key for e in INTERFACES}) == len({e.name for e in INTERFACES}) == len(INTERFACES)


def test_every_type_exists_and_every_profile_is_known() -> None:
    for entry in INTERFACES:
        assert entry.qos in PROFILES
        package = entry.type.split("/")[0]
        if package not in OPTIONAL_PACKAGES or importlib.util.find_spec(package) is not None:
            assert entry.message_class().__name__ == entry.type.split("/")[-1]


def test_placeholders_are_filled() -> None:
    assert interface("color").resolve(camera="front") == "front/color/image_raw"


def test_an_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"unknown interface 'nope'.*tcp_pose"):
        interface("nope")


def test_profiles_translate_and_reliability_can_be_replaced() -> None:
    assert qos("latched").durability == DurabilityPolicy.TRANSIENT_LOCAL
    assert qos("sensor").reliability == ReliabilityPolicy.BEST_EFFORT
    assert qos("sensor", "reliable").reliability == ReliabilityPolicy.RELIABLE
    with pytest.raises(ValueError, match="reliability: expected one of reliable, best_effort, got 'sometimes'"):
        qos("sensor", "sometimes")
    with pytest.raises(KeyError, match="unknown QoS profile 'nope'"):
        qos("nope")
