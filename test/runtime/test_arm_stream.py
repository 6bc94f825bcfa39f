"""The control loop on the emulated arm, over its WebSocket: what moves it, what stops it, and that it stays stopped."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from dcqfa_ros.drivers.arm_protocol import ArmReadiness, MotionOutcome
from dcqfa_ros.runtime.arm_activity import Activity, CommandRefusal
from dcqfa_ros.runtime.arm_executor import ArmRefusedError
from dcqfa_ros.safety.stops import StopCode
from test.runtime.arm_cell import BOX, FORCE, ArmCell, wait_for

PERIOD = 33_333_333


def chunk(vx: float, n: int = 16) -> np.ndarray:
    rows = np.zeros((n, 6))
    rows[:, 0] = vx
    return rows


def test_a_twist_moves_the_arm_within_the_limits_and_the_deadman_stops_it() -> None:
    with ArmCell() as cell:
        assert cell.twist(0.05) is CommandRefusal.DISARMED
        cell.move(5.0)
        cell.stopped(StopCode.COMMAND_TIMEOUT)
        frames = cell.emulator.frames
        assert max(abs(f.values[0]) for f in frames if f.values) <= 0.1
        wait_for(lambda: not cell.emulator.frames[-1].moves, "the zero twist has been read")
        assert not cell.motion_after(cell.last)
        with pytest.raises(ArmRefusedError, match="reset_stop"):
            cell.stream.arm()
        assert cell.stream.reset_stop().code is StopCode.COMMAND_TIMEOUT
        cell.stops.clear()
        cell.move(-0.05)


def test_a_policy_chunk_is_streamed_and_its_end_brings_the_arm_to_rest() -> None:
    with ArmCell("policy") as cell:
        cell.stream.arm()
        now = time.monotonic_ns()
        assert cell.stream.submit_gripper_chunk("policy", now, np.zeros(16), now) is None
        assert cell.stream.submit_chunk("policy", now, PERIOD, chunk(0.05), now) is None
        assert cell.stream.submit_chunk("policy", now - 2 * 10**9, PERIOD, chunk(0.05), now) is CommandRefusal.OLD
        assert cell.stream.submit_chunk("policy", now + 10**9, PERIOD, chunk(0.05), now) is CommandRefusal.FUTURE
        start = cell.emulator.position[0]
        wait_for(lambda: cell.stream.snapshot().activity is Activity.HOLDING, "end of the chunk")
        assert abs(cell.emulator.position[0] - start) > 0.01
        assert cell.stream.player.consumed == 16
        cell.stopped(StopCode.COMMAND_TIMEOUT)
        wait_for(lambda: cell.driver.state().gripper < 0.9, "the gripper closes")


def test_executing_on_an_old_observation_stops() -> None:
    with ArmCell("policy", observation=0.3) as cell:
        cell.stream.arm()
        now = time.monotonic_ns()
        assert cell.stream.submit_chunk("policy", now, PERIOD, chunk(0.05, 100), now) is None
        cell.stopped(StopCode.OBSERVATION_AGE)


def _wrench_nan(cell: ArmCell) -> None:
    cell.force = np.array([0.0, np.nan, 0.0])


STOPS = {
    StopCode.ESTOP: lambda cell: cell.emulator.press_estop(),
    StopCode.SAFE_STOP: lambda cell: cell.emulator.trip(),
    StopCode.ARM_LOST: lambda cell: cell.emulator.drop_connections(0.3),
    StopCode.ARM_FAULT: lambda cell: cell.emulator.set_fault(7),
    StopCode.WRENCH_LOST: lambda cell: cell.sensing.clear(),
    StopCode.WRENCH_NOT_FINITE: _wrench_nan,
    StopCode.FORCE: lambda cell: setattr(cell, "force", np.array([0.0, 0.0, 40.0])),
    StopCode.NOT_FINITE: lambda cell: cell.twist(float("nan")),
    StopCode.OPERATOR_STOP: lambda cell: cell.stream.operator_stop("button"),
}


@pytest.mark.parametrize("code", list(STOPS))
def test_every_fault_stops_by_name_and_latches(code: StopCode) -> None:
    with ArmCell() as cell:
        cell.move()
        STOPS[code](cell)
        wait_for(lambda: cell.twist(0.05) is CommandRefusal.DISARMED, "stop")
        cell.stopped(code)
        wait_for(lambda: cell.driver.state().readiness.value != "disconnected", "connected")
        wait_for(lambda: not cell.emulator.is_moving, "rest")
        last = cell.last
        assert cell.twist(0.05) is CommandRefusal.DISARMED
        with pytest.raises(ArmRefusedError, match="reset_stop"):
            cell.stream.arm()
        assert not cell.motion_after(last)
        assert cell.stream.snapshot().latched


def test_a_contact_stop_is_reset_only_without_load() -> None:
    with ArmCell() as cell:
        cell.move()
        cell.force = np.array([40.0, 0.0, 0.0])
        cell.stopped(StopCode.FORCE)
        with pytest.raises(ArmRefusedError, match=r"under load: contact 40\.0 N"):
            cell.stream.reset_stop()
        cell.force = np.zeros(3)
        wait_for(lambda: cell.stage.guard.force == 0.0, "no load")
        cell.stream.reset_stop()
        cell.move()


def test_contact_backs_the_arm_away_along_the_normal_and_no_farther() -> None:
    with ArmCell(force=replace(FORCE, retreat_distance=0.01)) as cell:
        cell.move(0.05)
        # The tool points down: its z axis is -z of the world. The environment pushes it up.
        rotation = cell.stream._rotation
        cell.force = rotation.T @ np.array([0.0, 0.0, 40.0])
        wait_for(lambda: cell.stops, "stop")
        height = cell.emulator.position[2]
        wait_for(lambda: not cell.stream.armed, "end of the retreat")
        wait_for(lambda: not cell.emulator.is_moving, "rest")
        assert 0.007 < cell.emulator.position[2] - height < 0.014
        assert cell.stream.snapshot().latched and cell.stops[0].code is StopCode.FORCE


def _retreating(cell: ArmCell) -> None:
    """Touch, and wait until the arm backs away."""
    cell.move(0.05)
    cell.force = cell.stream._rotation.T @ np.array([0.0, 0.0, 40.0])
    wait_for(lambda: cell.stops and cell.emulator.twist[2] > 0.005, "retreat")


SLOW_RETREAT = replace(FORCE, retreat_distance=0.05, retreat_speed=0.02)
RETREAT_ENDS = {
    "a wrench that is not finite": (StopCode.WRENCH_NOT_FINITE, _wrench_nan),
    "no wrench": (StopCode.WRENCH_LOST, lambda cell: cell.sensing.clear()),
    "a push against it": (
        StopCode.FORCE,
        lambda cell: setattr(cell, "force", cell.stream._rotation.T @ np.array([0.0, 0.0, -20.0])),
    ),
    "the operator": (StopCode.OPERATOR_STOP, lambda cell: cell.stream.operator_stop("button")),
    "an emergency stop": (StopCode.ESTOP, lambda cell: cell.emulator.press_estop()),
}


@pytest.mark.parametrize("name", list(RETREAT_ENDS))
def test_a_retreat_ends_at_once_and_is_told(name: str) -> None:
    code, cause = RETREAT_ENDS[name]
    with ArmCell(force=SLOW_RETREAT) as cell:
        _retreating(cell)
        cause(cell)
        wait_for(lambda: not cell.stream.armed, "end of the retreat")
        wait_for(lambda: not cell.emulator.is_moving, "rest")
        last = cell.last
        assert [stop.code for stop in cell.stops] == [StopCode.FORCE, code]
        assert cell.stage.latch.held.code is StopCode.FORCE, "the first reason stays"
        time.sleep(0.1)
        assert not cell.motion_after(last)


def test_a_camera_that_sends_nothing_stops_a_policy_but_no_operator() -> None:
    with ArmCell("policy", camera=0.4, observation=5.0, stop=5.0) as cell:
        cell.stream.arm()
        now = time.monotonic_ns()
        assert cell.stream.submit_chunk("policy", now, PERIOD, chunk(0.02, 100), now) is None
        wait_for(lambda: cell.emulator.is_moving, "motion")
        cell.seeing.clear()
        assert "camera wrist" in cell.stopped(StopCode.CAMERA_LOST).text
        wait_for(lambda: not cell.emulator.is_moving, "rest")
        cell.stream.reset_stop()
        with pytest.raises(ArmRefusedError, match="camera_lost"):
            cell.stream.arm()
        cell.stream.lease.give("teleop")
        cell.stops.clear()
        cell.move()


def test_a_move_that_was_decided_on_before_a_stop_never_begins() -> None:
    with ArmCell("operator") as cell:
        cell.stream.arm()
        state, now = cell.driver.state(), time.monotonic_ns()
        free = threading.Event()
        cell.stream._jobs.put(lambda: free.wait(20.0) and None)
        goal = state.position + np.array([0.05, 0.0, 0.02])
        assert cell.stream.submit_pose("operator", goal, state.orientation, now, now)[0] is None
        cell.stream.operator_stop("button")
        last = cell.last
        free.set()
        wait_for(lambda: cell.moves, "answer")
        assert cell.moves[0][1].outcome is MotionOutcome.REJECTED and "stopped" in cell.moves[0][1].message
        assert not cell.stream.armed and not cell.motion_after(last)


def test_what_is_left_of_a_chunk_does_not_go_on_after_a_move() -> None:
    with ArmCell("policy", observation=5.0, camera=2.0) as cell:
        cell.stream.arm()
        rows = chunk(0.0, 200)
        rows[100:, 0] = 0.05
        now = time.monotonic_ns()
        assert cell.stream.submit_chunk("policy", now, PERIOD, rows, now) is None
        state, now = cell.driver.state(), time.monotonic_ns()
        goal = state.position + np.array([0.0, 0.0, 0.01])
        assert cell.stream.submit_pose("policy", goal, state.orientation, now, now)[0] is None
        assert cell.stream.player.remaining == 0


def test_a_defect_in_the_worker_or_the_control_thread_stops_the_arm() -> None:
    def fail() -> None:
        raise KeyError("made up")

    with ArmCell() as cell:
        cell.move()
        cell.stream._jobs.put(fail)
        assert "made up" in cell.stopped(StopCode.FAULT).text
        wait_for(lambda: not cell.emulator.is_moving, "rest")
        cell.stream.reset_stop()
        cell.stops.clear()
        cell.move()
        with pytest.raises(KeyError, match="made up"):
            cell.stream.run(threading.Event(), lambda *_: fail())
        assert "control thread" in cell.stopped(StopCode.FAULT).text
        wait_for(lambda: not cell.emulator.is_moving, "rest")


def test_a_flood_of_commands_does_not_speed_the_loop_up() -> None:
    with ArmCell() as cell:
        cell.move()
        sent, begin = cell.stream.sent, time.monotonic()
        while time.monotonic() - begin < 1.0:
            cell.twist(0.02)
            time.sleep(0.001)
        assert cell.stream.sent - sent <= 50 / 0.8 * (time.monotonic() - begin) + 2


def test_a_pose_is_approached_supervised_and_cancelled_by_force() -> None:
    with ArmCell("operator") as cell:
        cell.stream.arm()
        state = cell.driver.state()
        now = time.monotonic_ns()
        goal = state.position + np.array([0.05, 0.0, 0.02])
        refusal, text = cell.stream.submit_pose("operator", state.position + 5.0, state.orientation, now, now)
        assert refusal is CommandRefusal.LIMITS and "outside the workspace" in text
        assert cell.stream.submit_pose("operator", goal, state.orientation, now, now)[0] is None
        wait_for(lambda: cell.moves and cell.stream.snapshot().activity is Activity.WAITING, "end of the move")
        assert cell.moves[0][1].outcome is MotionOutcome.SUCCEEDED
        assert cell.emulator.position == pytest.approx(goal, abs=2e-3)
        now = time.monotonic_ns()
        assert cell.stream.submit_pose("operator", state.position, state.orientation, now, now)[0] is None
        wait_for(lambda: cell.emulator.is_moving, "second move")
        cell.force = np.array([0.0, 0.0, 40.0])
        cell.stopped(StopCode.FORCE)
        wait_for(lambda: not cell.emulator.is_moving, "rest")
        assert cell.moves[-1][1].outcome is MotionOutcome.CANCELLED


def test_joints_are_followed_only_inside_the_limits() -> None:
    with ArmCell("operator") as cell:
        cell.stream.arm()
        joints = cell.driver.state().joints
        now = time.monotonic_ns()

        def submit(times: list[float], offset: float) -> tuple[CommandRefusal | None, str]:
            return cell.stream.submit_joints(
                "operator", np.array(times), joints[None] + offset * np.eye(6)[5], now, now
            )

        assert "would move at" in submit([0.1], 1.0)[1]
        assert "would turn at" in submit([0.2], 0.2)[1]
        assert "move_timeout_s" in submit([21.0], 0.1)[1]
        assert submit([1.0], 0.2)[0] is None
        wait_for(lambda: cell.moves, "end of the move")
        assert cell.moves[0][1].outcome is MotionOutcome.SUCCEEDED
        assert cell.emulator.joints[5] == pytest.approx(joints[5] + 0.2, abs=5e-3)


def test_only_the_holder_of_the_lease_is_obeyed() -> None:
    with ArmCell() as cell:
        cell.move()
        assert cell.twist(0.1, source="operator") is CommandRefusal.SOURCE
        assert cell.stream.refused["source_without_lease"] == 1 and cell.stream.lease.refused["operator"] == 1


class Guardian:
    """A watchdog that can vanish."""

    def __init__(self) -> None:
        self.beats: list[bool] = []
        self.text: str | None = "the watchdog has never answered"

    def beat(self, armed: bool) -> None:
        self.beats.append(armed)

    def problem(self) -> str | None:
        return self.text


def test_without_a_watchdog_nothing_moves_and_its_loss_stops() -> None:
    guardian = Guardian()
    with ArmCell(guardian=guardian) as cell:
        with pytest.raises(ArmRefusedError, match="never answered"):
            cell.stream.arm()
        guardian.text = None
        cell.move()
        assert guardian.beats[-1] is True
        guardian.text = "gone"
        cell.stopped(StopCode.WATCHDOG_LOST)
        wait_for(lambda: guardian.beats[-1] is False, "disarmed beat")


def test_an_arm_that_is_lost_in_motion_is_left_to_the_watchdog() -> None:
    guardian = Guardian()
    guardian.text = None
    with ArmCell(guardian=guardian) as cell:
        cell.move()
        cell.emulator.drop_connections(0.5)
        cell.stopped(StopCode.ARM_LOST)
        assert guardian.beats[-1] is True, "silence: a disarmed beat would say that the arm has stopped"
        wait_for(lambda: guardian.beats[-1] is False, "sign of life once the arm is back")
        wait_for(lambda: cell.driver.state().readiness is ArmReadiness.READY, "ready")
        cell.stream.reset_stop()
        cell.stops.clear()
        cell.move()
    assert guardian.beats[-1] is False, "an orderly end is told"


def test_after_an_emergency_stop_the_reset_brings_the_arm_up_again() -> None:
    with ArmCell() as cell:
        cell.move()
        cell.emulator.press_estop()
        cell.stopped(StopCode.ESTOP)
        with pytest.raises(ArmRefusedError, match="release"):
            cell.stream.reset_stop(10.0)
        cell.emulator.release_estop()
        wait_for(lambda: "can be reset" in cell.driver.state().detail, "circuit complete")
        assert cell.stream.reset_stop(10.0).code is StopCode.ESTOP
        assert not cell.stream.armed and not cell.emulator.is_moving
        cell.stops.clear()
        cell.move()


def test_nothing_moves_over_reconnections_until_armed_again() -> None:
    with ArmCell() as cell:
        for _ in range(20):
            cell.stops.clear()
            cell.move(0.03)
            cell.emulator.drop_connections(0.05)
            cell.stopped(StopCode.ARM_LOST)
            wait_for(lambda: cell.driver.state().readiness.value == "ready", "reconnected")
            wait_for(lambda: not cell.emulator.is_moving, "zero twist after the reconnection")
            last = cell.last
            for _ in range(10):
                cell.twist(0.05)
                time.sleep(0.01)
            assert not cell.motion_after(last)
            cell.stream.reset_stop()
            cell.stream.arm()
            assert not cell.motion_after(last)
            cell.twist(-0.03)


def test_no_random_command_leaves_the_limits_on_the_socket() -> None:
    random = np.random.default_rng(0)
    with ArmCell() as cell:
        limits = cell.stage.limiter.limits
        for _ in range(1500):
            if not cell.stream.armed:
                cell.stream.reset_stop()
                cell.stream.arm()
            size = 10.0 ** random.uniform(-2, 8)
            twist = random.normal(size=6) * size
            if random.random() < 0.002:
                twist[random.integers(6)] = random.choice([np.nan, np.inf, -np.inf])
            cell.twist(*twist)
            time.sleep(0.002)
        frames = [f.values for f in cell.emulator.frames if f.values is not None]
        values = np.array(frames)
        assert np.isfinite(values).all()
        assert np.linalg.norm(values[:, :3], axis=1).max() <= limits.linear_speed * (1 + 1e-9)
        assert np.linalg.norm(values[:, 3:], axis=1).max() <= limits.angular_speed * (1 + 1e-9)
        assert BOX.holds(cell.emulator.position)
