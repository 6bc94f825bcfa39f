"""A policy of two narrow blocks with random weights of every kind, and its calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from test.training.conftest import demonstration_arrays, tiny_document, write_teacher
from training.baselines.calibration import Calibration, calibrate, calibration_data
from training.config import TrainConfig
from training.trained import TrainedPolicy, load_trained


def calibrated_policy(folder: Path, sampler: str = "ddim", prefix: int = 0) -> tuple[TrainedPolicy, Calibration]:
    """Write the policy to ``folder``, read it and calibrate on eight observations."""
    data = folder / "demonstrations.npz"
    np.savez(data, **demonstration_arrays())
    document = tiny_document(data)
    document["policy"].update(depth=2, heads=2, dim=16, prefix=prefix)
    document["diffusion"].update(sampler=sampler, steps=3)
    write_teacher(folder / "run", TrainConfig.model_validate(document, strict=False))
    policy = load_trained(folder / "run")
    return policy, calibrate(policy, calibration_data(policy), 8)
