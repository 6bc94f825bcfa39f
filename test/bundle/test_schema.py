"""The schema says what a bundle can hold and refuses the rest by field."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from dcqfa_ros.bundle.document import dump_document, parse_document
from dcqfa_ros.bundle.schema import BundleSpec, TrainingRecord
from test.conftest import make_files, make_spec

Change = Callable[[dict[str, Any]], object]


def changed(change: Change) -> BundleSpec:
    document = copy.deepcopy(make_spec(make_files()).model_dump(mode="json"))
    change(document)
    return BundleSpec.model_validate(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(backbone="mdt_v"), "backbone"),
        (lambda d: d["architecture"].update(horizon=8), "differs from action.horizon 16"),
        (lambda d: d["architecture"].update(heads=3), "not a multiple of heads 3"),
        (lambda d: d["architecture"].update(depth=0), "architecture.depth"),
        (lambda d: d["diffusion"].update(timestep_spacing="trailing"), "timestep_spacing"),
        (lambda d: d["diffusion"].update(sampler="euler"), "'ddim', 'ddpm' or 'consistency'"),
        (lambda d: d["diffusion"].update(prefix=-1), "diffusion.prefix"),
        (lambda d: d["diffusion"].update(prefix=16), "prefix 16 leaves nothing to predict of action.horizon 16"),
        (lambda d: d["diffusion"].update(sampler="consistency", steps=91), "exceeds the 90 noise levels"),
        (lambda d: d["observations"]["agent_position"].update(names=["x"]), "names has 1 entries, expected 2"),
        (lambda d: d["observations"]["agent_position"].update(names=["x", "x"]), "names must differ"),
        (lambda d: d["variants"][0]["parity"].update(export_rms=1.0), "exceeds tolerance_export_rms"),
        (lambda d: d["variants"][0].update(calibration={"samples": 1, "seed": 0, "data_sha256": "f"}), "data_sha256"),
        (lambda d: d["training"].update(history=[{"step": 0}]), "history"),
    ],
)
def test_what_the_schema_cannot_describe_is_refused_by_field(change: Change, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        changed(change)


def test_origin_calibration_and_names_survive_a_file() -> None:
    segment = {"step": 0, "planned_steps": 5, "threads": 1, "compile": False, "device": "cpu", "torch": "2.13.0+cpu"}

    def fill(document: dict[str, Any]) -> None:
        document["observations"]["agent_position"]["names"] = ["x", "y"]
        document["variants"][1]["calibration"] = {"samples": 4, "seed": 1, "data_sha256": "a" * 64}
        document["training"].update(data_sha256="b" * 64, planned_steps=5, history=[segment])
        document["created_by"] = {"onnx": "1.23.2"}

    spec = changed(fill)
    assert parse_document(dump_document(spec), BundleSpec) == spec
    assert spec.training.history[0].planned_steps == 5


def test_a_bundle_without_the_newer_fields_of_the_sampler_takes_no_known_tokens() -> None:
    spec = changed(lambda document: document["diffusion"].pop("prefix"))
    assert spec.diffusion.prefix == 0 and spec.diffusion.most_steps == spec.diffusion.train_timesteps
    few = changed(lambda document: document["diffusion"].update(sampler="consistency", steps=90, prefix=15))
    assert (few.diffusion.most_steps, few.diffusion.prefix) == (90, 15)


def test_an_older_record_of_training_is_read() -> None:
    record = TrainingRecord(data="d", episodes=1, split="none", steps=1, batch=1, seed=0, command="dcqfa train")
    assert (record.data_sha256, record.planned_steps, record.history) == (None, None, ())
