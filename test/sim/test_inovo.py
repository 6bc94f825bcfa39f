"""The emulated Inovo controller as its clients see it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.kinematics import inovo_kinematics
from dcqfa_ros.drivers.rosbridge import RosbridgeClient
from dcqfa_ros.sim.contact import ContactPlane, ToolLoad
from dcqfa_ros.sim.inovo import InovoEmulator
from dcqfa_ros.sim.inovo_gripper import EmulatedGripper
from dcqfa_ros.sim.inovo_motion import HOME, ArmMotion, JointPath, PlanError, plan_move, plan_trajectory
from dcqfa_ros.sim.inovo_power import EmulatedPower
from dcqfa_ros.sim.rosbridge_server import RequestError

PATIENCE_S = 20.0


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
def client(cell: InovoEmulator) -> Iterator[RosbridgeClient]:
    client = RosbridgeClient("127.0.0.1", cell.port, ping_timeout_s=PATIENCE_S)
    client.connect()
    yield client
    client.close()


def twist(x: float = 0.0, wz: float = 0.0) -> dict[str, Any]:
    return {"twist": {"linear": {"x": x}, "angular": {"z": wz}}}  # what is left out is zero


def test_power_comes_on_in_its_order_and_takes_its_time() -> None:
    power = EmulatedPower()
    with pytest.raises(RequestError, match="emergency stop"):
        power.serve(m.PSU_ENABLE)
    power.serve(m.SAFE_STOP_RESET)
    power.serve(m.ESTOP_RESET)
    with pytest.raises(RequestError, match="bus is off"):
        power.serve(m.ROBOT_ENABLE)
    power.serve(m.PSU_ENABLE)
    power.step(4.9)
    assert power.bus != m.BUS_ON
    power.step(0.2)
    assert power.bus == m.BUS_ON and not power.allows_motion
    power.serve(m.ROBOT_ENABLE)
    power.step(0.9)
    assert not power.allows_motion
    power.step(0.2)
    assert power.allows_motion
    assert not power.serve("/other")


def test_stops_forbid_motion_until_they_are_reset() -> None:
    power = EmulatedPower(ready=True)
    power.trip()
    state = power.messages({})
    assert state[m.SAFE_STOP_STATE] == {"active": False, "circuit_complete": True}  # active would mean allowed
    assert not power.allows_motion and power.bus == m.BUS_ON
    power.serve(m.SAFE_STOP_RESET)
    assert not power.allows_motion  # the drives stay off
    power.serve(m.ROBOT_ENABLE)
    power.step(2.0)
    assert power.allows_motion
    power.press_estop()
    assert power.messages({})[m.ESTOP_STATE] == {"active": False, "circuit_complete": False}
    assert power.bus != m.BUS_ON
    with pytest.raises(RequestError, match="circuit is open"):
        power.serve(m.ESTOP_RESET)
    power.release_estop()
    power.serve(m.ESTOP_RESET)
    assert power.estop_active
    power.fail(3)
    with pytest.raises(RequestError, match="fault 3"):
        power.serve(m.PSU_ENABLE)
    power.serve(m.RESET_FAULT)
    power.serve(m.PSU_ENABLE)


def test_the_gripper_needs_its_activation_stalls_on_objects_and_reports_the_end() -> None:
    gripper = EmulatedGripper(speed=1.0, activation_s=0.5)
    gripper.go(0.0)
    assert not gripper.step(1.0) and gripper.position == 1.0
    gripper.activate()
    gripper.step(0.5)
    gripper.object_at = 0.4
    assert not gripper.step(0.1)
    assert gripper.step(5.0)
    message = gripper.message({})
    assert message["stalled"] and not message["reached_goal"] and message["position"] == pytest.approx(0.4)
    gripper.go(1.0)
    assert gripper.step(5.0) and gripper.message({})["reached_goal"]
    gripper.power_off()
    assert not gripper.message({})["activated"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-20.0, 20.0), min_size=6, max_size=6), st.floats(0.001, 0.2))
def test_no_demand_makes_a_joint_faster_than_its_limit(demand: list[float], seconds: float) -> None:
    motion = ArmMotion(inovo_kinematics("short"))
    motion.is_free = True
    for jog in (motion.jog, motion.jog_joints):
        jog(np.array(demand))
        for _ in range(20):
            motion.step(seconds)
            assert (np.abs(motion.velocities) <= motion.kinematics.velocity_limits * (1 + 1e-9)).all()


def test_the_last_jog_is_executed_until_told_otherwise_even_without_a_client(cell: InovoEmulator) -> None:
    client = RosbridgeClient("127.0.0.1", cell.port)
    client.connect()
    client.publish(m.CARTESIAN_JOG, twist(x=0.05))
    cell.wait_for_frame(lambda frame: frame.executed, PATIENCE_S)
    client.close()
    wait_until(lambda: cell.server.clients == 0, "nobody is connected")
    start = cell.position
    wait_until(lambda: cell.position[0] - start[0] > 0.01, "it moves on")
    assert cell.twist.tolist() == [0.05, 0, 0, 0, 0, 0]
    cell.trip()
    wait_until(lambda: not cell.is_moving, "the safe stop ends it")
    assert not cell.twist.any()


def test_all_ways_to_stream_velocities_move_the_arm(cell: InovoEmulator, client: RosbridgeClient) -> None:
    client.publish(m.CARTESIAN_VELOCITY, twist(x=0.02))
    assert not cell.wait_for_frame(lambda frame: True, PATIENCE_S).executed  # the velocity controller is not selected
    assert client.call_service(m.SWITCH_CONTROLLER, {"name": "velocity"})["success"]
    for topic, message in (
        (m.CARTESIAN_VELOCITY, twist(wz=0.1)),
        (m.JOINT_VELOCITY, {"data": [0.0, 0.0, 0.0, 0.0, 0.0, 0.2]}),
        (m.JOINT_JOG, {"joint_names": ["j6"], "velocities": [0.2]}),
        (m.CARTESIAN_JOG, twist(wz=0.1)),
    ):
        number = cell.frames[-1].number
        client.publish(topic, message)
        frame = cell.wait_for_frame(lambda frame: True, PATIENCE_S, after=number)
        assert frame.topic == topic and frame.moves and frame.executed
        wait_until(lambda: cell.is_moving, topic)
        client.publish(m.CARTESIAN_JOG, twist())
        wait_until(lambda: not cell.is_moving, "zero stops it")
    answer = client.call_service(m.SWITCH_CONTROLLER, {"name": "dance"})
    assert answer["success"] is False and "dance" in answer["message"]


def test_malformed_motion_is_kept_but_not_executed(cell: InovoEmulator, client: RosbridgeClient) -> None:
    for topic, message in (
        (m.CARTESIAN_JOG, {"twist": {"linear": {"x": "fast"}}}),
        (m.CARTESIAN_JOG, {"twist": []}),
        (m.JOINT_VELOCITY, {"data": [1.0]}),
        (m.JOINT_JOG, {"joint_names": ["j9"], "velocities": [1.0]}),
        (f"{m.MOVE}/goal", {}),
        (f"{m.MOVE}/goal", {"goal": {}, "goal_id": 3}),
    ):
        client.publish(topic, message)
    for goal_id in (3, "x", []):
        client.publish(m.gripper_topic("robotiqd", "grip/goal"), {"goal": {"action": m.GRIP}, "goal_id": goal_id})
    assert client.call_service(m.FORWARD, {"joint_angles": [0.0] * 6})["success"]
    assert len(cell.frames) == 6 and not any(frame.executed for frame in cell.frames)
    assert "goal_id: expected dict" in client.statistics.last_complaint
    assert cell.gripper.target == 1.0
    assert not cell.is_moving and cell.failure is None


def test_its_kinematics_are_served(cell: InovoEmulator, client: RosbridgeClient) -> None:
    joints = [0.1, 0.2, 1.4, 0.1, 1.5, 3.0]
    pose = client.call_service(m.FORWARD, {"joint_angles": joints})["tcp_pose"]
    position, _ = inovo_kinematics("short").forward(joints)
    assert [pose["position"][axis] for axis in "xyz"] == pytest.approx(position.tolist())
    answer = client.call_service(m.INVERSE, {"tcp_pose": pose, "initial_joint_angles": list(HOME)})
    assert answer["error_code"] == 1 and answer["joint_angles"] == pytest.approx(joints, abs=1e-4)
    pose["position"]["x"] = 9.0
    assert client.call_service(m.INVERSE, {"tcp_pose": pose})["error_code"] < 0


def test_an_action_reports_status_feedback_and_result_and_can_be_preempted(
    cell: InovoEmulator, client: RosbridgeClient
) -> None:
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in ("status", "feedback", "result")}
    for name, messages in seen.items():
        client.subscribe(f"{m.MOVE}/{name}", lambda message, _, kept=messages: kept.append(message))
    wait_until(lambda: seen["status"], "status comes without any goal")
    goal = {"motion_sequence": [{"joint_angles": [1.0, 0, np.pi / 2, 0, np.pi / 2, np.pi], "max_joint_velocity": 0.5}]}
    client.publish(f"{m.MOVE}/goal", m.action_goal("first", goal))
    wait_until(lambda: seen["feedback"], "feedback")
    client.publish(f"{m.MOVE}/goal", m.action_goal("second", goal))
    wait_until(lambda: len(seen["result"]) == 2, "both ended")
    first, second = seen["result"]
    assert first["status"]["goal_id"]["id"] == "first" and first["status"]["status"] == 2
    assert second["status"]["goal_id"]["id"] == "second" and second["status"]["status"] == 3
    assert second["result"]["success"] is True
    assert set(second["header"]["stamp"]) == {"secs", "nsecs"}  # ROS 1
    assert cell.joints[0] == pytest.approx(1.0)


def test_a_safe_stop_aborts_a_move(cell: InovoEmulator, client: RosbridgeClient) -> None:
    results: list[dict[str, Any]] = []
    client.subscribe(f"{m.MOVE}/result", lambda message, _: results.append(message))
    goal = {"motion_sequence": [{"joint_angles": [1.0, 0, 1.5, 0, 1.5, 3.0], "max_joint_velocity": 0.2}]}
    client.publish(f"{m.MOVE}/goal", m.action_goal("a", goal))
    wait_until(lambda: cell.is_moving, "it moves")
    cell.trip()
    wait_until(lambda: results, "the result")
    assert results[0]["status"]["status"] == 4
    wait_until(lambda: not cell.is_moving, "it brakes")


def test_a_straight_move_is_straight_and_at_its_speed() -> None:
    arm = inovo_kinematics("short")
    position, orientation = arm.pose(np.array(HOME))
    path = plan_move(
        arm, np.array(HOME), m.straight_move(position + np.array([0.0, 0.1, 0.0]), orientation, 0.1, 1.0, "")
    )
    assert path.duration_s == pytest.approx(1.0, rel=1e-6)
    points, rotations = arm.forward(path.positions)
    np.testing.assert_allclose(points[:, [0, 2]], np.broadcast_to(position[[0, 2]], (len(points), 2)), atol=1e-5)
    np.testing.assert_allclose(rotations, np.broadcast_to(rotations[0], rotations.shape), atol=1e-5)


@pytest.mark.parametrize(
    "goal",
    [
        {"motion_sequence": []},
        {"motion_sequence": [{"joint_angles": [0.0]}]},
        {"motion_sequence": [{"pose": {}}]},
        {"motion_sequence": [3]},
        {
            "motion_sequence": [
                {**m.straight_move([0, 0.4, 0.4], [1, 0, 0, 0], 0.1, 1, "")["motion_sequence"][0], "frame_id": "?"}
            ]
        },
        m.straight_move([9.0, 0.4, 0.4], [1, 0, 0, 0], 0.1, 1.0, ""),
        m.straight_move([1e300, 0.4, 0.4], [1, 0, 0, 0], 0.1, 1.0, ""),
        m.straight_move([0.0, -1e9, 0.4], [1, 0, 0, 0], 0.1, 1.0, ""),
        m.straight_move([0.0, 0.4, 0.4], [1, 0, 0, 0], -0.1, 1.0, ""),
    ],
)
def test_goals_that_cannot_be_executed_are_refused(goal: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        plan_move(inovo_kinematics("short"), np.array(HOME), goal)


@pytest.mark.parametrize(
    ("times", "change", "words"),
    [((0.1,), 1.0, "velocity limits"), ((1.0, 1.0), 0.0, "increase"), ((), 0.0, "no points")],
)
def test_trajectories_that_cannot_be_executed_are_refused(times: tuple[float, ...], change: float, words: str) -> None:
    positions = np.array(HOME) + change * np.ones((len(times), 6))
    goal = m.joint_trajectory(times, positions, np.zeros_like(positions))
    with pytest.raises(PlanError, match=words):
        plan_trajectory(inovo_kinematics("short"), np.array(HOME), goal)


def test_a_path_is_followed_between_its_points() -> None:
    path = JointPath(np.array([0.0, 1.0, 3.0]), np.array([[0.0] * 6, [1.0] * 6, [3.0] * 6]))
    assert path.at(0.5)[0] == 0.5 and path.at(2.0)[0] == 2.0 and path.at(9.0)[0] == 3.0 and path.at(0.0)[0] == 0.0


def test_the_tool_feels_the_surface_and_its_weight() -> None:
    plane = ContactPlane(height=0.4, stiffness=1000.0, damping=0.0)
    np.testing.assert_allclose(plane.force(np.array([0, 0, 0.39]), np.zeros(3)), [0.0, 0.0, 10.0])
    assert not plane.force(np.array([0, 0, 0.41]), np.zeros(3)).any()
    load = ToolLoad(1.0, (0.0, 0.0, 0.05))
    with InovoEmulator(ready=True, tool_m=(0.0, 0.0, 0.1), contact=ContactPlane(0.34), load=load) as cell:
        height = cell.position[2]
        wait_until(lambda: cell.sensor_wrench()[2] > 0, "the weight")
        weight = cell.sensor_wrench()
        assert weight[:3] == pytest.approx([0.0, 0.0, 9.80665], abs=1e-4)  # the tool points down: z of the flange
        client = RosbridgeClient("127.0.0.1", cell.port)
        client.connect()
        client.publish(m.CARTESIAN_JOG, {"twist": {"linear": {"z": -0.1}}})
        wait_until(lambda: cell.sensor_wrench()[2] < -20.0, "it presses on the surface")
        client.publish(m.CARTESIAN_JOG, twist())
        client.close()
        assert height > 0.34 > cell.position[2]


def test_builds_that_are_not_and_services_that_are_not_are_named(client: RosbridgeClient) -> None:
    with pytest.raises(ValueError, match="tall"):
        InovoEmulator("tall")
    with pytest.raises(Exception, match="/nothing does not exist"):
        client.call_service("/nothing")
    with pytest.raises(Exception, match="joint_angles"):
        client.call_service(m.FORWARD, {"joint_angles": "x"})


def test_control_is_claimed_by_one_user(client: RosbridgeClient) -> None:
    assert client.call_service(m.CLAIM_CONTROL, {"id": "a", "force": False})["in_control"]
    answer = client.call_service(m.CLAIM_CONTROL, {"id": "b", "force": False})
    assert answer == {"in_control": False, "id_of_controller": "a"}
    assert client.call_service(m.CLAIM_CONTROL, {"id": "b", "force": True})["in_control"]


def test_frames_are_kept_up_to_a_number_and_waiting_ends(cell: InovoEmulator) -> None:
    with pytest.raises(TimeoutError, match="no such motion frame"):
        cell.wait_for_frame(lambda frame: True, 0.01)
    small = InovoEmulator(keep_frames=3)
    for _ in range(5):
        small.receive(m.CARTESIAN_JOG, twist(), 1)
    assert [frame.number for frame in small.frames] == [2, 3, 4]
