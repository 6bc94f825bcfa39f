"""Which bundles can take each other's place while the robot runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dcqfa_ros.bundle.contract import contract_differences
from dcqfa_ros.bundle.schema import BundleSpec
from test.conftest import make_files, make_spec

OWN = make_spec(make_files())


def changed(path: str, value: Any) -> BundleSpec:
    """Return the specification with one field, or a key of a mapping, replaced; None removes it."""
    document = OWN.model_dump(mode="json")
    *way, last = path.split("/")
    place = document
    for name in way:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return BundleSpec.model_validate_json(json.dumps(document))


def test_a_bundle_can_take_its_own_place() -> None:
    assert contract_differences(OWN, OWN) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "other"),
        ("license", "MIT"),
        ("default_variant", "w8a8"),
        ("diffusion/steps", 4),
        ("diffusion/train_timesteps", 200),
        ("observations/keypoints/normalizer", {"kind": "identity"}),
        ("action/normalizer/offset", [-0.5, -0.5]),
        ("action/maximum", [500.0, 500.0]),
    ],
)
def test_what_belongs_to_the_weights_may_differ(path: str, value: Any) -> None:
    assert contract_differences(OWN, changed(path, value)) == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("observations/keypoints/rate_hz", 20.0, "observations.keypoints.rate_hz: 20.0, expected 10.0"),
        ("observations/keypoints/units", "m", "observations.keypoints.units: m, expected px"),
        ("observations/keypoints/frame", "world", "observations.keypoints.frame: world, expected table"),
        ("observations/keypoints/max_age_ms", 50.0, "observations.keypoints.max_age_ms: 50.0, expected 300.0"),
        ("observations/agent_position", None, "observations.agent_position: missing"),
        ("action/names", ["y", "x"], "action.names: y, x, expected x, y"),
        ("action/rate_hz", 5.0, "action.rate_hz: 5.0, expected 10.0"),
        ("action/mode", "delta", "action.mode: delta, expected absolute"),
        ("action/executed", 4, "action.executed: 4, expected 8"),
        ("action/first_executed", 0, "action.first_executed: 0, expected 1"),
        ("action/frame", "world", "action.frame: world, expected table"),
        ("diffusion/train_timesteps", 50, "diffusion.train_timesteps: 50, expected at least 100"),
    ],
)
def test_a_difference_that_the_graph_would_notice_is_named(path: str, value: Any, told: str) -> None:
    assert contract_differences(OWN, changed(path, value)) == [told]


def test_an_observation_that_nobody_provides_is_named() -> None:
    keys = OWN.model_dump(mode="json")["observations"]
    other = changed("observations", {**keys, "goal_position": keys["agent_position"]})
    assert contract_differences(OWN, other) == ["observations.goal_position: unknown here"]
