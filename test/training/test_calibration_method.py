"""``supernet.calibration_method`` in a supernet's run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training.checkpoint import CheckpointError, load_checkpoint
from training.config import TrainConfig
from training.supernet import SupernetTrainer

Config = Callable[..., TrainConfig]


def steps(trainer: SupernetTrainer) -> dict[str, Any]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if name.endswith("log_step")}


def test_the_method_of_the_configuration_gives_the_first_steps_and_no_other(
    supernet_config: Config, tmp_path: Path
) -> None:
    default, *others = (
        steps(SupernetTrainer(supernet_config(supernet=fields), tmp_path))
        for fields in ({}, {"calibration_method": "mse"}, {"calibration_method": "min_max"})
    )
    same, wide = others
    assert all(torch.equal(step, same[name]) for name, step in default.items())
    assert sum(float((wide[name] - step).sum()) for name, step in default.items()) > 0.0


def test_a_run_of_before_the_field_goes_on_and_one_of_another_method_is_refused(
    supernet_config: Config, supernet_run: Path, tmp_path: Path
) -> None:
    payload = load_checkpoint(supernet_run / "checkpoint.pt")
    del payload["config"]["supernet"]["calibration_method"]
    torch.save(payload, tmp_path / "checkpoint.pt")
    assert SupernetTrainer(supernet_config(), tmp_path).step == 6
    with pytest.raises(CheckpointError, match=r"differs in supernet\.calibration_method\)"):
        SupernetTrainer(supernet_config(supernet={"calibration_method": "min_max"}), tmp_path)
