"""Chunks that leave a policy: what they say, and what their overhead counts from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rclpy.clock import ClockType, ROSClock
from rclpy.serialization import deserialize_message
from rclpy.time import Time
from trajectory_msgs.msg import JointTrajectory, MultiDOFJointTrajectory

from dcqfa_ros.bundle.schema import ActionSpace, ActionSpec, NormalizerKind, NormalizerSpec
from dcqfa_ros.ros.arm_messages import gripper_chunk, twist_chunk
from dcqfa_ros.ros.policy_outputs import PolicyOutputs
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.synchronizer import Frame

MS, PERIOD_NS, NOW_MS = 1_000_000, 100_000_000, 1_000
NAMES = ("vx", "vy", "vz", "wx", "wy", "wz", "gripper")


class Node:
    """As much of a node as publishes: its clock stands at ``NOW_MS``."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []

    def create_interface_publisher(self, key: str) -> Any:
        return SimpleNamespace(publish=lambda data: self.sent.append((key, data)))

    def get_clock(self) -> ROSClock:
        clock = ROSClock()
        clock._set_ros_time_is_active(True)
        clock.set_ros_time_override(Time(nanoseconds=NOW_MS * MS, clock_type=ClockType.ROS_TIME))
        return clock


def bundle(**changed: Any) -> Any:
    document: dict[str, Any] = {
        "space": ActionSpace.TCP_TWIST_GRIPPER, "names": NAMES, "units": ("m/s",) * 3 + ("rad/s",) * 3 + ("-",),
        "frame": "world", "mode": "absolute", "rotation": "none", "gripper": "continuous", "rate_hz": 10.0,
        "horizon": 16, "first_executed": 1, "executed": 8, "minimum": (-1.0,) * 6 + (0.0,), "maximum": (1.0,) * 7,
        "normalizer": NormalizerSpec(kind=NormalizerKind.IDENTITY),
    }  # fmt: skip
    return SimpleNamespace(spec=SimpleNamespace(name="test", action=ActionSpec(**document | changed)))


def opened(**changed: Any) -> tuple[PolicyOutputs, Node]:
    node = Node()
    outputs = PolicyOutputs(node)  # type: ignore[arg-type]
    found = bundle(**changed)
    outputs.check(found)
    outputs.open(found, 1.0, PERIOD_NS)
    return outputs, node


def frame(stamp_ms: int, awaited_ms: int) -> Frame:
    return Frame(stamp_ms * MS, {}, awaited_ms * MS)


def test_overhead_counts_from_when_the_observation_could_be_complete_and_leaves_inference_out():
    outputs, _ = opened()
    outputs.publish(frame(950, 953), np.zeros((8, 7), np.float32), 40.0)
    figures = outputs.figures()
    assert (float(figures["overhead_p99_ms"]), float(figures["since_stamp_p99_ms"])) == pytest.approx((7.0, 10.0))
    assert figures["published"] == "1"
    outputs.begin()
    assert outputs.figures()["overhead_p99_ms"] == outputs.figures()["since_stamp_p99_ms"] == "", "a new episode"


@pytest.mark.parametrize(
    ("gripper", "openings"), [("continuous", [0.0, 0.25, 0.75, 1.0]), ("binary", [0.0, 0.0, 1.0, 1.0])]
)
def test_the_gripper_goes_first_and_a_binary_one_opens_or_closes(gripper: str, openings: list[float]):
    outputs, node = opened(gripper=gripper)
    actions = np.arange(28, dtype=np.float32).reshape(4, 7) / 100.0
    actions[:, 6] = (-0.5, 0.25, 0.75, 2.0)
    outputs.publish(frame(950, 950), actions, 1.0)
    assert [key for key, _ in node.sent] == ["gripper_chunk", "chunk"]
    np.testing.assert_array_equal(gripper_chunk(deserialize_message(node.sent[0][1], JointTrajectory)), openings)
    twists = deserialize_message(node.sent[1][1], MultiDOFJointTrajectory)
    np.testing.assert_array_equal(twist_chunk(twists)[0], actions[:, :6].astype(np.float64))
    assert (twists.header.stamp.sec, twists.header.stamp.nanosec) == (0, 950 * MS), "of the frame, whatever came later"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"frame": "tool0"}, "frame is 'tool0', the arm takes twists in 'world'"),
        ({"mode": "delta"}, "mode is delta"),
        ({"units": ("mm/s",) * 3 + ("rad/s",) * 3 + ("-",)}, "units are mm/s"),
        ({"gripper": "none"}, "names has 7 entries, expected 6"),
        ({"maximum": (1.0,) * 6 + (85.0,)}, "gripper ranges from 0 to 85"),
        ({"space": ActionSpace.JOINT_POSITION}, "joint_position has no arm in this version"),
    ],
)
def test_actions_that_no_arm_executes_are_refused_by_field(changed: dict[str, Any], told: str):
    with pytest.raises(PolicyError, match=f"bundle 'test': action .*{told}"):
        opened(**changed)


def test_nothing_is_published_before_a_bundle_is_open():
    node = Node()
    with pytest.raises(PolicyError, match="not open"):
        PolicyOutputs(node).publish(frame(0, 0), np.zeros((1, 7), np.float32), 0.0)  # type: ignore[arg-type]
    assert node.sent == []
