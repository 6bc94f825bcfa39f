"""A tiny policy with weights of every kind, its data and its calibration."""

from __future__ import annotations

from typing import Any

import pytest

from training.baselines.calibration import Calibration, calibrate, calibration_data
from training.data.policy_data import PolicyData
from training.trained import TrainedPolicy, load_trained


@pytest.fixture(scope="session")
def teacher(supernet_files: Any) -> TrainedPolicy:
    """The full-precision policy of two blocks with four heads on 32 channels."""
    return load_trained(supernet_files.teacher)


@pytest.fixture(scope="session")
def teacher_data(teacher: TrainedPolicy) -> PolicyData:
    """Its demonstrations."""
    return calibration_data(teacher)


@pytest.fixture(scope="session")
def calibration(teacher: TrainedPolicy, teacher_data: PolicyData) -> Calibration:
    """Eight observations over four denoising steps."""
    return calibrate(teacher, teacher_data, 8)
