"""The last stage before the arm: what it relies on, what stops a move, which paths are refused, what stays latched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dcqfa_ros.drivers.arm_protocol import ArmReadiness, ArmState
from dcqfa_ros.drivers.kinematics import inovo_kinematics
from dcqfa_ros.safety.cartesian_limits import LimitError, MotionLimits, TwistLimiter, Workspace
from dcqfa_ros.safety.force_guard import ForceGuard
from dcqfa_ros.safety.joint_limits import INOVO_JOINT_SPEEDS, JointLimits
from dcqfa_ros.safety.stops import Stop, StopCode
from dcqfa_ros.safety.supervision import MAXIMUM_AGES, Ages, Command, SafetyStage, StillStoppedError
from dcqfa_ros.sim.inovo_motion import HOME
from test.safety.test_force_guard import LIMITS as FORCE

ARM = inovo_kinematics("short")
HERE = np.array(HOME, dtype=float)
BOX = Workspace.of([-0.4, 0.2, 0.1], [0.4, 0.6, 0.8])
NOW = 10_000_000_000
NONE = np.zeros(3)


def stage(**options: object) -> SafetyStage:
    limits = MotionLimits(0.1, 1.0, 20.0, 0.5, 4.0, 80.0)
    joints = JointLimits(ARM, INOVO_JOINT_SPEEDS, [-6.2] * 6, [6.2] * 6)
    ages = Ages(state=0.2, wrench=0.1, camera=0.5, command=0.5, observation=1.0)
    made = SafetyStage(TwistLimiter(limits, BOX, 0.01), joints, ForceGuard(FORCE), ages, ["wrist"], **options)
    made.feed_wrench(NONE, NONE, NOW)
    made.feed_camera("wrist", NOW)
    return made


def state(joints: np.ndarray = HERE, velocities: np.ndarray | None = None, **changes: object) -> ArmState:
    speeds = np.zeros(6) if velocities is None else velocities
    position, orientation = ARM.pose(joints)
    twist = ARM.jacobian(joints) @ speeds
    made = ArmState(
        NOW, ArmReadiness.READY, "", joints, speeds, position, orientation, twist[:3], twist[3:], None, None
    )
    return replace(made, **changes)


def test_each_thing_that_is_missing_stops_by_name() -> None:
    def code(now_ns: int, **changes: object) -> StopCode | None:
        stop = stage().check(state(**changes), now_ns, cameras=True)
        return stop.code if stop else None

    assert code(NOW) is None
    assert code(NOW + 150_000_000, stamp_ns=NOW + 150_000_000) is StopCode.WRENCH_LOST
    assert code(NOW, stamp_ns=NOW - 250_000_000) is StopCode.ARM_LOST
    for readiness, wanted in (
        (ArmReadiness.DISCONNECTED, StopCode.ARM_LOST),
        (ArmReadiness.STOPPED, StopCode.ESTOP),
        (ArmReadiness.SAFE_STOPPED, StopCode.SAFE_STOP),
        (ArmReadiness.FAULT, StopCode.ARM_FAULT),
        (ArmReadiness.OFF, StopCode.ARM_OFF),
    ):
        assert code(NOW, readiness=readiness) is wanted


def test_pictures_matter_only_to_those_who_look_at_them() -> None:
    made, later = stage(), NOW + 600_000_000
    made.feed_wrench(NONE, NONE, later)
    seen = state(stamp_ns=later)
    stop = made.check(seen, later, cameras=True)
    assert stop is not None and stop.code is StopCode.CAMERA_LOST and "camera wrist" in stop.text
    assert made.check(seen, later, cameras=False) is None
    made.feed_camera("wrist", later)
    assert made.check(seen, later, cameras=True) is None


def test_a_wrench_that_is_not_finite_is_no_sign_of_life() -> None:
    made, later = stage(), NOW + 150_000_000
    assert made.feed_wrench(np.array([0.0, np.nan, 0.0]), NONE, later).code is StopCode.WRENCH_NOT_FINITE
    stop = made.check(state(stamp_ns=later), later, cameras=False)
    assert stop is not None and stop.code is StopCode.WRENCH_LOST


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", range(6))
def test_a_twist_that_is_not_finite_stops(index: int, value: float) -> None:
    twist = np.zeros(6)
    twist[index] = value
    stop = stage().bound(Command(twist, NOW), state(), NOW)
    assert isinstance(stop, Stop) and stop.code is StopCode.NOT_FINITE


@pytest.mark.parametrize("name", ["position", "joints"])
def test_a_measured_state_that_is_not_finite_stops(name: str) -> None:
    values = np.full(6 if name == "joints" else 3, np.nan)
    stop = stage().bound(Command(np.full(6, 0.01), NOW), state(**{name: values}), NOW)
    assert isinstance(stop, Stop) and stop.code is StopCode.NOT_FINITE


def test_a_latched_stop_lets_nothing_through_and_outlives_its_stage() -> None:
    made = stage()
    made.latch.trip(Stop(StopCode.FORCE, "contact"))
    assert made.bound(Command(np.full(6, 0.01), NOW), state(), NOW) == Stop(StopCode.FORCE, "contact")
    successor = stage(latch=made.latch)
    assert "reset_stop" in str(successor.refusal(state(), NOW, cameras=False))
    assert successor.reset(state(), NOW) == Stop(StopCode.FORCE, "contact")
    assert successor.refusal(state(), NOW, cameras=False) is None


def test_a_stop_whose_cause_is_there_is_not_reset() -> None:
    made = stage()
    made.latch.trip(Stop(StopCode.ESTOP, "pressed"))
    with pytest.raises(StillStoppedError, match="estop"):
        made.reset(state(readiness=ArmReadiness.STOPPED), NOW)
    assert made.latch.held is not None


def test_a_move_is_stopped_where_it_leaves_what_was_allowed() -> None:
    def code(**changes: object) -> StopCode | None:
        stop = stage().supervise_move(state(**changes), NOW, 0.05)
        return stop.code if stop else None

    assert code() is None
    assert code(position=np.array([0.0, 0.7, 0.4])) is StopCode.WORKSPACE
    assert code(position=np.full(3, np.nan)) is StopCode.WORKSPACE
    assert code(linear=np.array([0.0, 0.12, 0.0])) is StopCode.SPEED
    assert code(linear=np.full(3, np.nan)) is StopCode.SPEED
    assert code(angular=np.array([0.0, 0.0, 0.9])) is StopCode.SPEED
    beyond = HERE.copy()
    beyond[5] = 6.3
    assert code(joints=beyond, velocities=np.array([0, 0, 0, 0, 0, 0.2])) is StopCode.JOINT_LIMIT
    assert code(joints=beyond, velocities=np.array([0, 0, 0, 0, 0, -0.2])) is None, "the way back"


def test_a_joint_path_is_examined_all_along() -> None:
    made = stage()

    def why(times: list[float], *offsets: list[float]) -> str | None:
        return made.refuse_joints(np.array(times), HERE + np.array(offsets), state())

    turn = [0, 0, 0, 0, 0, 0.4]
    assert why([1.0], turn) is None
    assert "would turn at 0.800 rad/s, limit 0.5" in str(why([0.5], turn))
    assert "would move at" in str(why([0.5, 1.0], [0.2, 0, 0, 0, 0, 0], [0.0] * 6)), "on the way, not at the end"
    assert "leaves the workspace" in str(why([20.0, 40.0], [1.5, 0, 0, 0, 0, 0], [0.0] * 6))


@pytest.mark.parametrize("name", list(MAXIMUM_AGES))
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, "beyond"])
def test_ages_out_of_range_are_refused(name: str, value: float | str) -> None:
    ages = dict.fromkeys(MAXIMUM_AGES, 0.1)
    with pytest.raises(LimitError, match=name):
        Ages(**{**ages, name: MAXIMUM_AGES[name] * 1.01 if value == "beyond" else value})
