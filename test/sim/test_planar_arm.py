"""The simulated arm behaves as its driver protocol says."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from dcqfa_ros.drivers.protocols import ArmDriver, DriverError
from dcqfa_ros.sim.cell_state import CellStateError, CellStateReader, cell_state_name
from dcqfa_ros.sim.planar_arm import SimulatedPlanarArm
from dcqfa_ros.sim.pusht import PushTWorld


@pytest.fixture
def arm() -> SimulatedPlanarArm:
    driver: ArmDriver = SimulatedPlanarArm()
    driver.connect()
    assert isinstance(driver, SimulatedPlanarArm)
    return driver


def test_a_connected_arm_shows_a_start_state_without_moving(arm: SimulatedPlanarArm) -> None:
    first = arm.observe()
    assert first.step == 0
    assert first.score == 0.0
    assert not first.done
    np.testing.assert_array_equal(first.target, first.agent)
    assert arm.observe() is first


def test_ticks_are_the_worlds_steps(arm: SimulatedPlanarArm) -> None:
    world = PushTWorld()
    world.reset(100_000)
    arm.reset(100_000)
    for action in ((100.0, 200.0), (120.0, 220.0), (300.5, 300.25)):
        expected = world.step(action)
        seen = arm.step(np.array(action, dtype=np.float32))
        np.testing.assert_array_equal(seen.keypoints, world.observation()["keypoints"])
        np.testing.assert_array_equal(seen.agent, world.observation()["agent_position"])
        np.testing.assert_array_equal(seen.target, np.array(action, dtype=np.float32))
        assert (seen.step, seen.coverage, seen.score) == (expected.steps, expected.coverage, expected.score_so_far)


def test_hold_keeps_the_last_target_and_before_the_first_command_the_position(arm: SimulatedPlanarArm) -> None:
    start = arm.reset(1)
    held = arm.hold()
    assert held.step == 1
    np.testing.assert_allclose(held.agent, start.agent, atol=1e-6)
    arm.step(np.array([256.0, 256.0]))
    for _ in range(20):
        held = arm.hold()
    np.testing.assert_allclose(held.agent, [256.0, 256.0], atol=0.5)
    np.testing.assert_array_equal(held.target, np.array([256.0, 256.0]))


def test_after_the_end_the_cell_stands_still_until_it_is_reset() -> None:
    arm = SimulatedPlanarArm(step_limit=2)
    arm.connect()
    arm.reset(0)
    arm.hold()
    final = arm.hold()
    assert final.done
    assert arm.step(np.array([0.0, 0.0])) is final
    assert arm.hold() is final
    assert arm.reset(0).step == 0
    assert not arm.hold().done


def test_a_bad_action_moves_nothing(arm: SimulatedPlanarArm) -> None:
    before = arm.observe()
    for action in ([np.nan, 0.0], [0.0], [0.0, np.inf]):
        with pytest.raises(ValueError, match="simulated planar arm: action"):
            arm.step(np.array(action))
    assert arm.observe() is before


def test_an_unconnected_or_closed_arm_says_so() -> None:
    arm = SimulatedPlanarArm()
    for call in (arm.observe, arm.hold, lambda: arm.reset(0), lambda: arm.step(np.zeros(2))):
        with pytest.raises(DriverError, match="connect"):
            call()
    arm.connect()
    arm.connect()
    arm.close()
    arm.close()
    with pytest.raises(DriverError, match="connect"):
        arm.observe()


def test_observations_cannot_be_written_to(arm: SimulatedPlanarArm) -> None:
    seen = arm.observe()
    for array in (seen.agent, seen.keypoints, seen.target):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0.0


def test_a_shared_cell_shows_every_state_and_is_gone_after_close() -> None:
    name = cell_state_name(0, f"/test_arm_{os.getpid()}")
    arm = SimulatedPlanarArm(shared_as=name)
    reader = CellStateReader(name)
    with pytest.raises(CellStateError, match="no simulated cell"):
        reader.read()
    before = time.monotonic_ns()
    arm.connect()
    try:
        assert reader.read().target is None
        second = SimulatedPlanarArm(shared_as=name)
        with pytest.raises(CellStateError, match="another simulated cell"):
            second.connect()
        with pytest.raises(DriverError, match="connect"):
            second.observe()
        observation = arm.step(np.array([10.0, 20.0]))
        shown = reader.read()
        np.testing.assert_array_equal(shown.state[:2].astype(np.float32), observation.agent)
        np.testing.assert_array_equal(shown.target, [10.0, 20.0])
        assert before <= shown.stamp_ns == observation.stamp_ns
    finally:
        arm.close()
    with pytest.raises(CellStateError, match="gone"):
        reader.read()
    with pytest.raises(CellStateError, match="no simulated cell"):
        reader.read()
