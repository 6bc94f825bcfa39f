"""W8A8 against a published library, where it is installed."""

from __future__ import annotations

import pytest

from training.baselines import BaselineError, find_baseline, parse_bits
from training.baselines.calibration import Calibration
from training.baselines.modelopt import CHECKED, PACKAGE, check_possible, cross_check, library
from training.baselines.quality import held_out
from training.data.policy_data import PolicyData
from training.trained import TrainedPolicy


@pytest.fixture
def installed() -> None:
    """The library; a test that needs it is reported as skipped where it is absent."""
    try:
        library()
    except BaselineError:
        pytest.skip(f"not exercised: {PACKAGE} is not installed (docs/baselines.md)")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("method", CHECKED)
@pytest.mark.parametrize("static", [False, True])
def test_eight_bits_are_as_far_from_the_policy_as_the_librarys(
    method: str, static: bool, teacher: TrainedPolicy, teacher_data: PolicyData, calibration: Calibration
) -> None:
    bits = parse_bits("w8a8")
    network = find_baseline(method).quantize(teacher, bits, calibration, static=static).network
    measure = held_out(teacher, teacher_data, 64)
    check = cross_check(teacher.network, network, method, bits, calibration, measure, static)
    assert check["distance"] == pytest.approx(check["library_distance"], rel=0.01 if method == "rtn" else 0.5)
    if method == "rtn":
        assert check["between"] < 0.05 * check["distance"]


@pytest.mark.parametrize(
    ("method", "bits", "options", "message"),
    [
        ("awq", "w8a8", {}, "expected one of rtn, smoothquant"),
        ("rtn", "w4a4", {}, "expected w8a8"),
        ("smoothquant", "w8a8", {"alpha": 0.7}, "option alpha"),
    ],
)
def test_what_the_library_is_not_asked_is_refused(
    method: str, bits: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(BaselineError, match=message):
        check_possible(method, parse_bits(bits), options)
