"""The Inovo driver against the emulated controller, over a real WebSocket."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.arm_protocol import ArmReadiness, CartesianArmDriver, MotionOutcome
from dcqfa_ros.drivers.inovo import InovoArm
from dcqfa_ros.drivers.inovo_action import InovoAction
from dcqfa_ros.drivers.inovo_state import InovoState
from dcqfa_ros.drivers.kinematics import inovo_kinematics
from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.sim.inovo import InovoEmulator

PATIENCE_S = 20.0
STILL = (0.0, 0.0, 0.0)
SLOW = (0.02, 0.0, 0.0)


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)


@pytest.fixture
def cell() -> Iterator[InovoEmulator]:
    with InovoEmulator(ready=True, time_scale=0.01) as emulator:
        yield emulator


@pytest.fixture
def arm(cell: InovoEmulator) -> Iterator[InovoArm]:
    driver: CartesianArmDriver = connected(cell)
    assert isinstance(driver, InovoArm)
    yield driver
    driver.close()


def connected(cell: InovoEmulator, **options: Any) -> InovoArm:
    driver = InovoArm("127.0.0.1", cell.port, connect_timeout_s=10.0, ping_timeout_s=10.0, **options)
    driver.connect()
    return driver


def ready(arm: InovoArm) -> None:
    wait_until(lambda: arm.state().readiness is ArmReadiness.READY, "the arm is ready")


def test_a_connected_arm_shows_its_state_and_does_not_move(cell: InovoEmulator, arm: InovoArm) -> None:
    state = arm.state()
    assert state.readiness is ArmReadiness.READY and state.detail == ""
    np.testing.assert_allclose(state.joints, cell.joints)
    np.testing.assert_allclose(state.position, cell.position)
    assert abs(time.monotonic_ns() - state.stamp_ns) < 5e9
    assert state.gripper == 1.0 and state.gripper_holds is False
    with pytest.raises(ValueError, match="read-only"):
        state.joints[0] = 1.0
    assert not any(frame.moves for frame in cell.frames)


def test_the_sequence_of_bring_up_leads_from_off_to_ready() -> None:
    with InovoEmulator(time_scale=0.02) as cell:
        arm = connected(cell)
        try:
            assert arm.state().readiness is ArmReadiness.STOPPED
            with pytest.raises(DriverError, match="cannot stream velocities: stopped: emergency stop"):
                arm.start_streaming()
            arm.bring_up()
            assert arm.state().readiness is ArmReadiness.READY
            assert cell.gripper.activated and cell.services.controlled_by == "dcqfa_ros"
            arm.bring_up()  # nothing left to do
            assert not any(frame.moves for frame in cell.frames)
        finally:
            arm.close()


def test_bring_up_names_the_step_that_cannot_be_done() -> None:
    with InovoEmulator(time_scale=0.02) as cell:
        arm = connected(cell)
        try:
            cell.press_estop()
            wait_until(lambda: "release it" in arm.state().detail, "the pressed stop is seen")
            with pytest.raises(DriverError, match=r"emergency stop circuit is open.*release"):
                arm.bring_up()
            cell.release_estop()
            wait_until(lambda: "can be reset" in arm.state().detail, "the released stop is seen")
            cell.services.controlled_by = "pendant"
            with pytest.raises(DriverError, match="'pendant' controls the arm"):
                arm.bring_up()
            arm.claim_control(force=True)
            arm.bring_up()
            assert arm.state().readiness is ArmReadiness.READY
            cell.set_fault(17)
            wait_until(lambda: arm.state().readiness is ArmReadiness.FAULT, "the fault is seen")
            assert "fault code 17" in arm.state().detail
            arm.bring_up()
            assert arm.state().readiness is ArmReadiness.READY
        finally:
            arm.close()


def test_velocities_are_streamed_and_the_arm_follows(cell: InovoEmulator, arm: InovoArm) -> None:
    with pytest.raises(DriverError, match="call start_streaming"):
        arm.send_twist(SLOW, STILL)
    assert not cell.frames
    arm.start_streaming()
    stamp = arm.send_twist(SLOW, (0.0, 0.0, 0.1))
    frame = cell.wait_for_frame(lambda frame: frame.moves, PATIENCE_S)
    assert frame.values == (0.02, 0.0, 0.0, 0.0, 0.0, 0.1) and frame.executed
    assert frame.topic == m.CARTESIAN_JOG
    assert abs(frame.stamp_ns - stamp) < 5e9
    for name, wanted, near in (("linear", SLOW, 2e-3), ("angular", (0.0, 0.0, 0.1), 5e-3)):
        wait_until(
            lambda name=name, wanted=wanted, near=near: np.allclose(getattr(arm.state(), name), wanted, atol=near),
            f"the {name} velocity is reached and shown",
        )
    first, *_ = cell.frames
    assert not first.moves  # streaming begins with zero
    assert cell.controller == "velocity"


@pytest.mark.parametrize("bad", [(np.nan, 0, 0), (0, np.inf, 0), (0, 0), ("a", 0, 0), 1.0])
def test_what_is_no_velocity_is_refused_and_nothing_sent(cell: InovoEmulator, arm: InovoArm, bad: Any) -> None:
    arm.start_streaming()
    for arguments in ((bad, STILL), (STILL, bad)):
        with pytest.raises(ValueError):
            arm.send_twist(*arguments)
    arm.send_twist(SLOW, STILL)
    cell.wait_for_frame(lambda frame: frame.moves, PATIENCE_S)
    assert len(cell.frames) == 2


def test_the_emulator_goes_on_with_the_last_jog_until_a_stop(cell: InovoEmulator, arm: InovoArm) -> None:
    arm.start_streaming()
    arm.send_twist(SLOW, STILL)
    begun = cell.position
    wait_until(lambda: cell.position[0] - begun[0] > 0.005, "it moves on by itself")
    arm.stop()
    wait_until(lambda: not cell.is_moving, "it stands")
    with pytest.raises(DriverError, match="not streaming"):
        arm.send_twist(SLOW, STILL)
    arm.start_streaming()
    arm.send_twist(SLOW, STILL)
    wait_until(lambda: cell.is_moving, "it moves again")


def test_nothing_follows_a_stop_whatever_thread_streams(cell: InovoEmulator, arm: InovoArm) -> None:
    for _ in range(20):
        arm.start_streaming()
        running = threading.Event()

        def stream(running: threading.Event = running) -> None:
            try:
                while True:
                    arm.send_twist(SLOW, STILL)
                    running.set()
            except DriverError:
                return

        thread = threading.Thread(target=stream)
        thread.start()
        assert running.wait(PATIENCE_S)
        arm.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert arm.client.call_service(m.FORWARD, {"joint_angles": [0.0] * 6})["success"]  # all frames are through
        assert not cell.frames[-1].moves


def test_twenty_losses_at_random_moments_no_motion_before_it_is_armed_again(cell: InovoEmulator) -> None:
    arm, chance = connected(cell), random.Random(5)
    errors: list[Exception] = []
    ending = threading.Event()

    def stream() -> None:
        while not ending.is_set():
            try:
                arm.send_twist(SLOW, STILL)
            except DriverError:
                time.sleep(0.002)
            except Exception as error:  # noqa: BLE001 - reported by the test's own thread
                errors.append(error)
            time.sleep(0.001)

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        for loss in range(20):
            ready(arm)
            arm.start_streaming()
            time.sleep(chance.uniform(0.0, 0.03))
            losses = arm.client.statistics.losses
            cell.drop_connections()
            wait_until(lambda before=losses: arm.client.statistics.losses > before, "the loss is noticed")
            wait_until(lambda: arm.client.is_connected, "a new connection")
            cell.wait_for_frame(
                lambda frame: frame.topic == f"{m.FOLLOW}/cancel", PATIENCE_S, after=_last_cancel(cell, loss)
            )
            ready(arm)
            assert not arm.is_streaming
            cancels = [frame.number for frame in cell.frames if frame.topic == f"{m.FOLLOW}/cancel"]
            after = [frame for frame in cell.frames if frame.number > cancels[-1]]
            assert not any(frame.moves for frame in after)
            wait_until(lambda: not cell.is_moving, "the zero twist ended the last jog")
        assert not errors
    finally:
        ending.set()
        thread.join(PATIENCE_S)
        arm.close()


def _last_cancel(cell: InovoEmulator, count: int) -> int:
    """Return the number of the frame that came before this loss's cancel."""
    cancels = [frame.number for frame in cell.frames if frame.topic == f"{m.FOLLOW}/cancel"]
    return cancels[count - 1] if count else -1


def test_while_the_connection_is_lost_the_last_figures_stay(cell: InovoEmulator, arm: InovoArm) -> None:
    position = arm.state().position
    cell.drop_connections(refuse_for_s=1e6)
    wait_until(lambda: arm.state().readiness is ArmReadiness.DISCONNECTED, "the loss")
    assert arm.state().detail
    np.testing.assert_allclose(arm.state().position, position)
    arm.stop()
    for call in (arm.start_streaming, arm.trip_safe_stop, lambda: arm.move_gripper(0.5)):
        with pytest.raises(DriverError, match="no connection"):
            call()
    cell.drop_connections()
    ready(arm)


def test_connecting_by_hand_after_a_loss_ends_the_last_jog_too(cell: InovoEmulator, arm: InovoArm) -> None:
    arm.start_streaming()
    arm.send_twist(SLOW, STILL)
    wait_until(lambda: cell.is_moving, "it moves")
    cell.drop_connections(refuse_for_s=1e6)
    wait_until(lambda: arm.state().readiness is ArmReadiness.DISCONNECTED, "the loss")
    with pytest.raises(DriverError, match="handshake failed"):
        arm.connect()
    assert cell.is_moving
    cell.drop_connections()
    arm.connect()
    wait_until(lambda: not cell.is_moving, "zero was sent")
    assert not arm.is_streaming


def test_it_can_be_closed_and_connected_again(cell: InovoEmulator, arm: InovoArm) -> None:
    for _ in range(3):
        arm.start_streaming()
        arm.send_twist(SLOW, STILL)
        arm.close()
        arm.close()
        wait_until(lambda: not cell.is_moving, "close stops")
        assert arm.state().readiness is ArmReadiness.DISCONNECTED
        arm.connect()
        arm.connect()
        assert not arm.is_streaming


def test_a_straight_move_ends_where_it_should(cell: InovoEmulator, arm: InovoArm) -> None:
    start = arm.state()
    arm.start_streaming()
    handle = arm.move_to_pose(
        start.position + np.array([0.02, 0.0, -0.03]), start.orientation, speed=0.3, angular_speed=1.0
    )
    assert not arm.is_streaming
    assert handle.result(PATIENCE_S).outcome is MotionOutcome.SUCCEEDED
    assert handle.done()
    np.testing.assert_allclose(cell.position, start.position + np.array([0.02, 0.0, -0.03]), atol=1e-4)


def test_joints_are_followed(cell: InovoEmulator, arm: InovoArm) -> None:
    goal = arm.state().joints + 0.05
    assert arm.follow_joints([0.1, 0.2], [goal - 0.02, goal]).result(PATIENCE_S).outcome is MotionOutcome.SUCCEEDED
    np.testing.assert_allclose(cell.joints, goal, atol=1e-6)


def test_a_stop_cancels_a_move_and_so_does_its_handle(cell: InovoEmulator, arm: InovoArm) -> None:
    state = arm.state()
    for end in ("stop", "cancel"):
        handle = arm.move_to_pose(
            state.position + np.array([0.0, 0.1, 0.0]), state.orientation, speed=0.02, angular_speed=1.0
        )
        wait_until(lambda: cell.is_moving, "it moves")
        with pytest.raises(TimeoutError, match="goes on"):
            handle.result(0.01)
        arm.stop() if end == "stop" else handle.cancel()
        assert handle.result(PATIENCE_S).outcome is MotionOutcome.CANCELLED
        wait_until(lambda: not cell.is_moving, "it stands")


def test_moves_end_by_rejection_loss_and_silence(
    cell: InovoEmulator, arm: InovoArm, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = arm.state()
    far = arm.move_to_pose([2.0, 0.0, 0.3], state.orientation, speed=0.1, angular_speed=1.0).result(PATIENCE_S)
    assert far.outcome is MotionOutcome.REJECTED and "out of reach" in far.message
    slow = {"speed": 0.01, "angular_speed": 0.5}
    handle = arm.move_to_pose(state.position + np.array([0.0, 0.1, 0.0]), state.orientation, **slow)
    cell.drop_connections()
    assert handle.result(PATIENCE_S).outcome is MotionOutcome.LOST
    ready(arm)
    monkeypatch.setattr("dcqfa_ros.drivers.inovo_action.STATUS_TIMEOUT_S", 0.3)
    cell.mute([f"{m.MOVE}/status"])
    handle = arm.move_to_pose(state.position + np.array([0.0, 0.1, 0.0]), state.orientation, **slow)
    result = handle.result(PATIENCE_S)
    assert result.outcome is MotionOutcome.TIMED_OUT and "no status" in result.message
    wait_until(lambda: not cell.is_moving, "it was cancelled as well")


def test_what_cannot_be_a_move_is_refused_and_nothing_sent(cell: InovoEmulator, arm: InovoArm) -> None:
    state = arm.state()
    pose: dict[str, Any] = {
        "position": state.position,
        "orientation": state.orientation,
        "speed": 0.1,
        "angular_speed": 1.0,
    }
    for change in (
        {"position": [np.nan, 0, 0]}, {"orientation": [0, 0, 0, 2]}, {"orientation": [np.nan, 0, 0, 1]}, {"speed": 0.0},
        {"speed": 99.0}, {"speed": np.nan}, {"angular_speed": -1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(change))):
            arm.move_to_pose(**(pose | change))
    joints = state.joints
    for times, points in (
        ([], []), ([0.0], [joints]), ([1.0, 0.5], [joints, joints]), ([1.0], [joints[:5]]), ([np.inf], [joints]),
        ([1.0], [joints * np.nan]), ([0.1], [joints + 1.0]),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            arm.follow_joints(times, points)
    for opening in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="opening"):
            arm.move_gripper(opening)
    assert not any(frame.moves for frame in cell.frames)


def test_a_move_that_was_decided_on_before_a_stop_is_void(cell: InovoEmulator, arm: InovoArm) -> None:
    state, since = arm.state(), arm.stops
    arm.stop()
    with pytest.raises(DriverError, match="stopped or disconnected meanwhile"):
        arm.move_to_pose(state.position, state.orientation, speed=0.1, angular_speed=1.0, since=since)
    with pytest.raises(DriverError, match="stopped or disconnected meanwhile"):
        arm.follow_joints([1.0], [state.joints], since=since)
    assert not any(frame.moves for frame in cell.frames)


def test_a_stop_while_a_move_begins_keeps_it_from_beginning(
    cell: InovoEmulator, arm: InovoArm, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = arm._switch
    monkeypatch.setattr(arm, "_switch", lambda name: (switch(name), arm.stop()))
    state = arm.state()
    with pytest.raises(DriverError, match="stopped or disconnected meanwhile"):
        arm.move_to_pose(state.position, state.orientation, speed=0.1, angular_speed=1.0)
    with pytest.raises(DriverError, match="stopped or disconnected meanwhile"):
        arm.start_streaming()
    assert not arm.is_streaming
    assert not any(frame.moves for frame in cell.frames)


def test_the_gripper_closes_on_an_object_and_opens(cell: InovoEmulator, arm: InovoArm) -> None:
    cell.gripper.object_at, cell.gripper.speed = 0.4, 10.0
    arm.move_gripper(0.0)
    wait_until(lambda: arm.state().gripper_holds, "it holds the object")
    assert arm.state().gripper == pytest.approx(0.4)
    arm.move_gripper(0.7)
    wait_until(lambda: arm.state().gripper == pytest.approx(0.7), "it opens to a width")
    assert not arm.state().gripper_holds
    arm.move_gripper(1.0)
    wait_until(lambda: arm.state().gripper == 1.0, "it opens")


def test_an_arm_without_gripper_has_none() -> None:
    with InovoEmulator(ready=True, gripper="") as cell:
        arm = connected(cell, gripper="")
        try:
            assert arm.state().gripper is None and arm.state().gripper_holds is None
            with pytest.raises(DriverError, match="there is no gripper"):
                arm.move_gripper(1.0)
        finally:
            arm.close()


def test_tripping_the_safe_stop_stops_and_needs_a_reset(cell: InovoEmulator, arm: InovoArm) -> None:
    arm.start_streaming()
    arm.send_twist(SLOW, STILL)
    wait_until(lambda: cell.is_moving, "it moves")
    arm.trip_safe_stop(timeout_s=PATIENCE_S)
    wait_until(lambda: not cell.is_moving, "it stands")
    wait_until(lambda: arm.state().readiness is ArmReadiness.SAFE_STOPPED, "the safe stop is seen")
    assert "safe stop" in arm.state().detail
    with pytest.raises(DriverError, match="safe stop"):
        arm.start_streaming()
    arm.bring_up()
    assert not cell.is_moving and not cell.twist.any()
    arm.start_streaming()


def test_a_program_on_the_controller_keeps_commands_out(cell: InovoEmulator, arm: InovoArm) -> None:
    arm.client.call_service(m.SEQUENCE_START, {"procedure_name": "main"})
    wait_until(lambda: arm.state_topics.values(m.RUNTIME_STATE)["state"] == 1, "the program is seen")
    with pytest.raises(DriverError, match="a program runs on the controller"):
        arm.start_streaming()


def test_silent_topics_and_another_build_are_named() -> None:
    with InovoEmulator(ready=True) as cell:
        cell.mute([m.ESTOP_STATE, m.PSU_STATUS])
        arm = InovoArm("127.0.0.1", cell.port, connect_timeout_s=2.0)
        with pytest.raises(DriverError, match=r"nothing came within 2 s on /psu/status, /psu/estop/state"):
            arm.connect()
        cell.mute([])
        with pytest.raises(DriverError, match="/devices/hande/gripper_state"):
            InovoArm("127.0.0.1", cell.port, connect_timeout_s=2.0, gripper="hande").connect()
    with InovoEmulator("long", ready=True, joints=np.zeros(6)) as cell:
        arm = InovoArm("127.0.0.1", cell.port, variant="short", connect_timeout_s=10.0)
        with pytest.raises(DriverError, match="set variant to the build"):
            arm.connect()
        assert not arm.client.is_connected


def test_before_the_first_connection_there_is_no_state() -> None:
    arm = InovoArm("127.0.0.1", 1)
    with pytest.raises(DriverError, match="call connect"):
        arm.state()
    arm.stop()
    arm.close()
    with pytest.raises(DriverError, match="connection refused"):
        arm.connect()


def test_why_a_move_was_cancelled_is_told_also_where_the_controller_is_first(
    cell: InovoEmulator, arm: InovoArm, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel = InovoAction.cancel

    def and_wait(action: InovoAction, identity: str = "") -> None:
        cancel(action, identity)
        wait_until(lambda: not action.is_busy, "the controller's result")

    monkeypatch.setattr(InovoAction, "cancel", and_wait)
    state = arm.state()
    handle = arm.move_to_pose(
        state.position + np.array([0.0, 0.1, 0.0]), state.orientation, speed=0.02, angular_speed=1.0
    )
    wait_until(lambda: cell.is_moving, "it moves")
    arm.stop()
    assert handle.result(PATIENCE_S).message == "stopped"


@pytest.mark.parametrize("topic", [m.JOINT_STATES, m.TCP_POSE])
def test_old_joint_states_or_poses_allow_no_motion(cell: InovoEmulator, arm: InovoArm, topic: str) -> None:
    cell.mute([topic])
    wait_until(lambda: arm.state_topics.age_s(topic) > 0.6, "the topic is silent")
    with pytest.raises(DriverError, match=f"nothing on {topic}"):
        arm.start_streaming()
    assert time.monotonic_ns() - arm.state().stamp_ns > 0.5e9  # what else comes does not make the state a new one


def test_streaming_ends_a_move_under_way(cell: InovoEmulator, arm: InovoArm) -> None:
    state = arm.state()
    handle = arm.move_to_pose(
        state.position + np.array([0.0, 0.1, 0.0]), state.orientation, speed=0.02, angular_speed=1.0
    )
    wait_until(lambda: cell.is_moving, "it moves")
    arm.start_streaming()
    result = handle.result(PATIENCE_S)
    assert result.outcome is MotionOutcome.CANCELLED and "streamed" in result.message
    cell.wait_for_frame(lambda frame: frame.topic == f"{m.MOVE}/cancel", PATIENCE_S)
    wait_until(lambda: not cell.is_moving, "it stands")


def test_an_odd_answer_to_the_claim_is_named(
    cell: InovoEmulator, arm: InovoArm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell.services, "_claim", lambda *_: {"in_control": "yes"})
    with pytest.raises(DriverError, match=r"/ui/claim_control: expected in_control, got \{'in_control': 'yes'\}"):
        arm.bring_up()


def test_a_loss_while_readiness_is_read_is_no_error(cell: InovoEmulator, arm: InovoArm) -> None:
    state = arm.state_topics

    class LosingLock:
        """Loses the connection whenever the lock is given back."""

        def __enter__(self) -> None:
            return None

        def __exit__(self, *_: object) -> None:
            state._values.clear()
            state._seen_ns.clear()

    arm.client.close()
    for topic in state.required:
        state._seen_ns[topic] = 1
    state._values.update({
        m.ESTOP_STATE: {"active": False, "circuit_complete": True}, m.SAFE_STOP_STATE: {"active": True},
    })  # fmt: skip
    state._lock = LosingLock()  # type: ignore[assignment]
    assert state.readiness()[0] is ArmReadiness.STOPPED
    assert state.readiness()[0] is ArmReadiness.OFF


@pytest.mark.parametrize(
    ("topic", "message"),
    [
        (m.JOINT_STATES, {"name": ["j1"], "position": [0.0], "velocity": [0.0]}),
        (m.JOINT_STATES, {"name": list(m.JOINT_NAMES), "position": [0.0] * 6, "velocity": []}),
        (m.JOINT_STATES, {"name": list(m.JOINT_NAMES), "position": [None] * 6, "velocity": [0.0] * 6}),
        (m.JOINT_STATES, {"name": list(m.JOINT_NAMES), "position": [1e999] * 6, "velocity": [0.0] * 6}),
        (m.TCP_POSE, {"pose": {"position": {"x": 0, "y": 0}, "orientation": {"x": 0, "y": 0, "z": 0, "w": 1}}}),
        (m.TCP_POSE, {"pose": {"position": {"x": 0, "y": 0, "z": 0}, "orientation": {"x": 0, "y": 0, "z": 0, "w": 0}}}),
        (m.JOINT_STATES, {"name": list(m.JOINT_NAMES), "position": [10**400] * 6, "velocity": [0.0] * 6}),
        (m.PSU_STATUS, {"voltage": 10**400, "current": 1, "state": "BUS_ON", "fault_code": 0}),
        (m.ESTOP_STATE, {"active": 1, "circuit_complete": True}),
        (m.PSU_STATUS, {"voltage": 48, "current": 1, "state": "BUS_ON"}),
        (m.ARM_STATE, {"state": 9, "joint_states": []}),
        (m.ARM_STATE, {"state": 3, "joint_states": [{}]}),
        (m.ROBOT_STATE, {}),
    ],
)
def test_a_malformed_state_is_counted_and_changes_nothing(topic: str, message: dict[str, Any]) -> None:
    state = InovoState(inovo_kinematics("short"), "robotiqd")
    state.callback(topic)(message, 1)
    assert state.malformed == {topic: 1}
    assert state.last_malformed.startswith(topic)
    assert not state.values(topic)
    assert state.age_s(topic) == float("inf")
    assert state.snapshot(ArmReadiness.OFF, "") is None


def test_joints_are_told_by_name_not_by_place() -> None:
    names = ["j6", "extra", "j1", "j2", "j3", "j4", "j5"]
    positions, velocities = m.read_joint_states(
        {"name": names, "position": [6, 99, 1, 2, 3, 4, 5], "velocity": [0.6, 9, 0.1, 0.2, 0.3, 0.4, 0.5]}
    )
    np.testing.assert_array_equal(positions, [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(velocities, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_the_report_for_diagnostics_is_text(cell: InovoEmulator, arm: InovoArm) -> None:
    report = arm.report()
    assert report["bus"] == "BUS_ON" and report["fault_code"] == "0" and report["malformed"] == "0"
    assert all(isinstance(value, str) for value in report.values())
