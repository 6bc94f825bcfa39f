"""What two policies must share so that one can take the place of the other while the robot runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.bundle.strict import StrictModel

_OWN = {
    "observations": {"normalizer", "color_jitter", "encoder"},
    "action": {"normalizer", "minimum", "maximum"},
}
"""What belongs to the weights: the worker normalises, and the arm has limits of its own."""


def contract_differences(own: BundleSpec, other: BundleSpec) -> list[str]:
    """Return in what ``other`` differs from the contract of ``own``; empty where it can take its place.

    The contract is what the graph around the policy was set up for: keys, shapes, types, units, frames, histories,
    rates and age limits of the observations; space, names, units, frame, rate, horizon and executed part of the
    actions. Normalisers, weights, networks and variants may differ.

    Returns:
        ``<field>: <of other>, expected <of own>`` each, in the order of ``bundle.yaml``.
    """
    found = []
    for key in {**own.observations, **other.observations}:
        mine, theirs = own.observations.get(key), other.observations.get(key)
        if mine is None or theirs is None:
            found.append(f"observations.{key}: {'missing' if theirs is None else 'unknown here'}")
        else:
            found += _differences(f"observations.{key}", mine, theirs, _OWN["observations"])
    found += _differences("action", own.action, other.action, _OWN["action"])
    least, most = own.diffusion.train_timesteps, other.diffusion.train_timesteps
    if most < least:  # the number of denoising steps, which may be set while the policy runs, was checked against it
        found.append(f"diffusion.train_timesteps: {most}, expected at least {least}")
    return found


def _differences(field: str, own: StrictModel, other: StrictModel, left_out: set[str]) -> Iterator[str]:
    mine, theirs = own.model_dump(mode="json"), other.model_dump(mode="json")
    for name in {**mine, **theirs}:
        if name not in left_out and mine.get(name) != theirs.get(name):
            yield f"{field}.{name}: {_shown(theirs.get(name))}, expected {_shown(mine.get(name))}"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
