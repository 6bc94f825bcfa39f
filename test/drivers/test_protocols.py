"""What drivers hand out is immutable, and the drivers import no ROS."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from dcqfa_ros.drivers.protocols import CameraFrame, CameraIntrinsics, DriverError
from dcqfa_ros.errors import UserError


def test_frames_and_intrinsics_are_immutable_and_slotted() -> None:
    frame = CameraFrame(np.zeros((2, 2, 3), np.uint8), None, 1, 0)
    with pytest.raises(FrozenInstanceError):
        frame.number = 2  # type: ignore[misc]
    assert not hasattr(frame, "__dict__")
    assert not hasattr(CameraIntrinsics(1, 1, 1.0, 1.0, 0.0, 0.0), "__dict__")


def test_a_drivers_error_is_shown_to_the_user() -> None:
    assert issubclass(DriverError, UserError)


def test_drivers_simulation_and_trials_import_neither_ros_nor_torch() -> None:
    code = (
        "import sys\n"
        "import dcqfa_ros.drivers.protocols, dcqfa_ros.sim.planar_arm, dcqfa_ros.sim.camera, dcqfa_ros.sim.render\n"
        "import dcqfa_ros.trials.report, dcqfa_ros.trials.video, dcqfa_ros.trials.records\n"
        "print([m for m in ('rclpy', 'sensor_msgs', 'torch', 'training') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
