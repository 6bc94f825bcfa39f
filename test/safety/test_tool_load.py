"""Bias, weight, filter and zero of the force/torque sensor."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcqfa_ros.safety.tool_load import (
    GRAVITY,
    ZERO_SAMPLES,
    LowPass,
    ToolLoad,
    ToolLoadError,
    WrenchCompensation,
    ZeroRefusedError,
    rotation_matrix,
)

PERIOD_NS = 10_000_000
DOWN = np.array([1.0, 0.0, 0.0, 0.0])  # the sensor's z points at the floor
TOOL = ToolLoad(1.5, (0.01, -0.02, 0.08), (3.0, -2.0, 1.0, 0.1, 0.2, -0.3))
QUATERNIONS = arrays(np.float64, 4, elements=st.floats(-1, 1)).filter(lambda q: np.linalg.norm(q) > 0.1)


def free(load: ToolLoad, quaternion: np.ndarray) -> np.ndarray:
    """What the sensor reads of the free tool, from first principles."""
    gravity = rotation_matrix(quaternion).T @ np.array([0.0, 0.0, -GRAVITY])
    force = load.mass * gravity
    return np.concatenate([force, np.cross(load.centre_of_mass, force)]) + load.bias


def fill(
    c: WrenchCompensation,
    raw: np.ndarray,
    orientation: np.ndarray | None = None,
    count: int = ZERO_SAMPLES,
    first: int = 1,
) -> None:
    for number in range(first, first + count):
        c.update(number * PERIOD_NS, raw, orientation)


@given(QUATERNIONS, arrays(np.float64, 6, elements=st.floats(-100, 100)))
def test_bias_and_weight_are_taken_off_at_every_orientation(quaternion: np.ndarray, contact: np.ndarray) -> None:
    quaternion = quaternion / np.linalg.norm(quaternion)
    wrench = WrenchCompensation(TOOL).update(1, free(TOOL, quaternion) + contact, quaternion)
    np.testing.assert_allclose(wrench, contact, atol=1e-9)


def test_a_tool_that_hangs_down_pulls_along_the_sensors_z() -> None:
    weight = ToolLoad(1.0, (0.0, 0.1, 0.05)).weight(rotation_matrix(DOWN))
    np.testing.assert_allclose(weight, [0, 0, GRAVITY, 0.1 * GRAVITY, 0, 0], atol=1e-12)


def test_the_sensors_mounting_turns_gravity() -> None:
    quarter = [0.0, 0.0, math.sqrt(0.5), math.sqrt(0.5)]
    lying = np.array([0.0, math.sqrt(0.5), 0.0, math.sqrt(0.5)])  # the tool's z along the world's x
    wrench = WrenchCompensation(ToolLoad(1.0), quarter).update(1, np.zeros(6), lying)
    np.testing.assert_allclose(-wrench[:3], [0, -GRAVITY, 0], atol=1e-12)


def test_without_an_orientation_only_the_bias_is_taken_off() -> None:
    c = WrenchCompensation(TOOL)
    assert c.needs_orientation
    np.testing.assert_allclose(c.update(1, free(TOOL, DOWN), None), free(TOOL, DOWN) - TOOL.bias)


def test_zeroing_takes_the_mean_and_not_the_weight() -> None:
    rng = np.random.default_rng(0)
    c = WrenchCompensation(TOOL)
    drift = np.array([0.5, -0.4, 0.3, 0.02, -0.03, 0.01])
    for number in range(1, ZERO_SAMPLES + 1):
        c.update(number * PERIOD_NS, free(TOOL, DOWN) + drift + rng.normal(0, 0.05, 6) * [1, 1, 1, 0.1, 0.1, 0.1], DOWN)
    np.testing.assert_allclose(c.take_zero(), drift, atol=0.02)
    tilted = np.array([0.5, 0.5, 0.5, 0.5])
    stamp = (ZERO_SAMPLES + 1) * PERIOD_NS
    np.testing.assert_allclose(c.update(stamp, free(TOOL, tilted) + drift, tilted), np.zeros(6), atol=0.02)
    np.testing.assert_allclose(c.take_zero(), drift, atol=0.02, err_msg="a zero does not add to the one before")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: np.array([0, 0, 0.02 * n, 0, 0, 0]), "Fz is noisy|Fz changes"),
        (lambda n: np.array([0, 2.0 * (n % 2), 0, 0, 0, 0]), "Fy is noisy by 1 N, expected at most 0.5"),
        (lambda n: np.array([0, 0, 0, 0, 0, 0.08 * (n > 100)]), "Mz changes by 0.08 N m, expected at most 0.05"),
    ],
)
def test_zeroing_refuses_a_load_that_moves_or_is_noisy_and_keeps_the_old_zero(change, words: str) -> None:
    c = WrenchCompensation(ToolLoad())
    for number in range(1, ZERO_SAMPLES + 1):
        c.update(number * PERIOD_NS, change(number), None)
    with pytest.raises(ZeroRefusedError, match=words):
        c.take_zero()
    assert not c.zero.any()


def test_zeroing_refuses_too_few_readings_a_gap_a_turning_arm_and_a_weight_of_unknown_direction() -> None:
    c = WrenchCompensation(TOOL)
    fill(c, free(TOOL, DOWN), DOWN, 50)
    with pytest.raises(ZeroRefusedError, match=f"50 of {ZERO_SAMPLES} readings in a row"):
        c.take_zero()
    fill(c, free(TOOL, DOWN), DOWN, 60, first=100)
    with pytest.raises(ZeroRefusedError, match=f"60 of {ZERO_SAMPLES} readings in a row"):
        c.take_zero()
    c.forget()
    fill(c, free(TOOL, DOWN), None)
    with pytest.raises(ZeroRefusedError, match=r"mass is 1\.5 kg but tcp_pose does not come"):
        c.take_zero()
    c.forget()
    for number in range(1, ZERO_SAMPLES + 1):
        angle = math.radians(0.01 * number)
        turning = np.array([math.cos(angle / 2), math.sin(angle / 2), 0.0, 0.0])
        c.update(number * PERIOD_NS, free(TOOL, turning), turning)
    with pytest.raises(ZeroRefusedError, match="the arm turned by"):
        c.take_zero()


def test_the_filter_has_its_cut_off_and_begins_anew_after_a_gap() -> None:
    def gain(hz: float) -> float:
        low_pass, out = LowPass(5.0), []
        for n in range(1, 4001):
            t = n * 1e-3
            out.append(low_pass.update(int(t * 1e9), np.array([math.sin(2 * math.pi * hz * t)]))[0])
        return float(np.abs(out[2000:]).max())

    assert gain(0.2) == pytest.approx(1.0, abs=0.01)
    assert gain(5.0) == pytest.approx(math.sqrt(0.5), abs=0.03)
    assert gain(50.0) == pytest.approx(0.1, abs=0.03)
    low_pass = LowPass(1.0)
    low_pass.update(1, np.array([100.0]))
    assert low_pass.update(PERIOD_NS, np.array([0.0]))[0] > 90
    assert low_pass.update(PERIOD_NS + 500_000_000, np.array([7.0]))[0] == 7.0


def test_the_noise_covariance_does_not_count_slow_changes() -> None:
    rng = np.random.default_rng(1)
    c = WrenchCompensation(ToolLoad())
    assert c.noise_covariance() is None
    deviation = np.array([0.1, 0.2, 0.3, 0.01, 0.02, 0.03])
    for n in range(1, ZERO_SAMPLES + 1):
        c.update(n * PERIOD_NS, rng.normal(0, deviation) + 0.05 * n, None)
    covariance = c.noise_covariance()
    assert covariance is not None and covariance.shape == (6, 6)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), deviation, rtol=0.25)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ToolLoad(-0.1), "mass: expected 0 to 30 kg"),
        (lambda: ToolLoad(math.nan), "mass: expected 0 to 30 kg"),
        (lambda: ToolLoad(1.0, (0.0, 0.0)), "centre_of_mass: expected 3 numbers"),
        (lambda: ToolLoad(1.0, (0.0, 0.0, 2.0)), r"centre_of_mass: expected 3 numbers within \+-1 "),
        (lambda: ToolLoad(bias=(0.0,) * 5 + (math.inf,)), "bias: expected 6 numbers"),
        (lambda: rotation_matrix([0, 0, 0, 0]), "orientation: expected a unit quaternion"),
        (lambda: rotation_matrix([math.nan, 0, 0, 1]), "orientation: expected a unit quaternion"),
        (lambda: WrenchCompensation(ToolLoad(), (1.0, 0.0)), "sensor_rotation: expected a unit quaternion"),
        (lambda: LowPass(-1.0), "low_pass_hz: expected 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, words: str) -> None:
    with pytest.raises(ToolLoadError, match=words):
        make()
