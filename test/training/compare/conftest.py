"""A comparison of tiny networks, and results that nobody played."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from training.compare.config import CompareConfig, load_compare
from training.trained import load_trained
from training.warm_start import state_sha256

SHA = {name: f"{number:064x}" for number, name in enumerate(("data", "policy", "weights", "artifact", "other"), 1)}


@pytest.fixture
def tiny_comparison(supernet_files: Any, supernet_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a factory of comparisons of a tiny policy and its supernet; arguments replace fields."""

    def write(**fields: Any) -> Path:
        teacher = load_trained(supernet_files.teacher)
        paper = tmp_path / "paper.yaml"
        paper.write_text(
            "tasks: {image: {label: a, metric: b, source: c, caveat: ours is tiny}}\n"
            "figures: [{task: image, method: DC-QFA, bits: w4a4, value: 0.77}]\n"
        )
        document = {
            "name": "tiny",
            "policy": str(supernet_files.teacher),
            "training": str(supernet_files.config),
            "policy_sha256": [state_sha256(teacher.network.state_dict())],
            "data_sha256": teacher.meaning.data_sha256,
            "reference": "full",
            "block": 1,
            "latency": {"table": str(supernet_files.tables[0])},
            "results": str(tmp_path / "committed.json"),
            "paper": str(paper),
            "seeds": {"some": {"first": 200_001, "count": 2}},
            "tasks": [
                {"name": "standard", "seeds": ["some"], "paper": "image"},
                {"name": "short", "seeds": ["some"], "stress": {"episode_steps": 40, "action_delay_steps": 1}},
            ],
            "entries": [
                {"name": "full", "method": "full precision", "bits": "fp32", "checkpoint": str(supernet_files.teacher)},
                {"name": "dcqfa", "method": "DC-QFA", "bits": "w4a4", "supernet": str(supernet_run), "subnet": "w4a4"},
            ],
            "pairs": [{"first": "dcqfa", "second": "full"}],
            "claims": [
                {
                    "text": "W4A4 is not worse",
                    "source": "the paper",
                    "kind": "not_worse",
                    "first": "dcqfa",
                    "second": "full",
                    "task": "standard",
                    "seeds": "some",
                    "paper_difference": -0.002,
                }
            ],
        }
        path = tmp_path / "tiny_comparison.yaml"
        path.write_text(yaml.safe_dump(document | fields, sort_keys=False))
        return path

    return write


def cell(entry: str, scores: list[float], **fields: Any) -> dict[str, Any]:
    """A played cell as the results hold it."""
    protocol = {
        "metric": "score",
        "task": "standard",
        "stress": {"episode_steps": 300},
        "steps": None,
        "simulator": {"gym-pusht": "0.1.8"},
    }
    made = {"entry": entry, "task": "standard", "seeds": "some", "first_seed": 7, "protocol": protocol}
    made |= {"weights": SHA["weights"], "artifact": SHA["artifact"], "scores": scores, "mean_steps": 100.0}
    return made | fields


def entry(name: str, **fields: Any) -> dict[str, Any]:
    """An entry's facts as the results hold them."""
    identity = {"kind": "bundle", "weights": SHA["weights"], "artifact": SHA["artifact"], "data": SHA["data"]}
    identity |= {"policy": SHA["policy"], "bits": "w4a4", "variant": None, "subnet": None, "baseline": None}
    identity |= {"baseline_bits": None, "options": {}, "seed": 0}
    made = {"name": name, "method": name, "bits": "w4a4", "identity": identity | fields.pop("identity", {})}
    made |= {"executed": "here", "device_executes": None, "sampler": "ddim", "denoising_steps": 16}
    made |= {"size": {"parameters": 9, "paper_mib": 1.0, "artifact_mib": 2.0, "artifact_of": "graphs"}}
    made |= {"cost": {"steps": 5, "hours": None, "teacher_calls": None, "policy_calls": None, "source": "s"}}
    return made | {"latency": None, "report": None, "note": None, "stated": []} | fields


def results_document(entries: list[dict[str, Any]], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Results with these entries, of which the first is the reference."""
    return {
        "format": 1,
        "name": "made-up",
        "written": "today",
        "reference": entries[0]["name"],
        "margin": 0.03,
        "data": SHA["data"],
        "policy": [SHA["policy"]],
        "versions": {"python": "3"},
        "entries": entries,
        "cells": cells,
    }


def loaded(path: Path) -> CompareConfig:
    """A comparison read back."""
    return load_compare(path)
