"""Random and damaged bytes on the line of the force/torque sensor."""

from __future__ import annotations

import dataclasses

import pytest

from dcqfa_ros.sim.fuzz_ft300s import fuzz
from test.faults.conftest import Figures, Sizes

pytestmark = pytest.mark.faults


@pytest.mark.timeout(900)
def test_damaged_bytes_make_no_false_wrench_and_recovery_takes_two_frames(sizes: Sizes, figures: Figures) -> None:
    report = fuzz(sizes.chunks, seed=2026)
    values = dataclasses.asdict(report)
    examples = values.pop("examples")
    figures.add("random or damaged byte chunks on the sensor's line", **values)
    assert report.chunks == sizes.chunks
    assert report.false_wrenches == 0, examples
    assert report.exceptions == 0, examples
    assert report.recovery_frames <= 2 and report.late_recoveries == 0, examples
    assert report.wrenches > sizes.chunks / 2, "the parser hears intact frames"
