"""camera_node publishes the cell's picture with its camera_info, says by name when there is none, and recovers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, Image

from dcqfa_ros.nodes.camera_node import CameraNode
from dcqfa_ros.ros.diagnostics import Level, Status
from dcqfa_ros.ros.fastdds import PROFILE_VARIABLE
from dcqfa_ros.ros.images import ImageView, decode_image
from dcqfa_ros.ros.isolation import isolated_environment
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.sim.cell_state import CellStateWriter
from dcqfa_ros.sim.render import render

TIMEOUT_S = 10.0
STATE = np.array([100.0, 200.0, 250.0, 300.0, 0.7])
CELL = f"dcqfa_test_camera_{os.getpid()}"
SMALL = {"width": 64, "height": 48, "cell": CELL, "stale_after_ms": 300}


class Graph:
    """A camera node and a subscriber on one executor in an isolated domain."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.executor = SingleThreadedExecutor(context=context)
        self.observer = rclpy.create_node("observer", context=context)
        self.executor.add_node(self.observer)
        self.views: list[ImageView] = []
        self.infos: list[CameraInfo] = []
        self.node: CameraNode | None = None
        self.observer.create_subscription(
            Image, "front/color/image_raw", lambda data: self.views.append(decode_image(data)), qos("image"), raw=True
        )
        self.observer.create_subscription(CameraInfo, "front/color/camera_info", self.infos.append, qos("sensor"))

    def camera(self, **parameters: Any) -> CameraNode:
        overrides = [Parameter(name, value=value) for name, value in parameters.items()]
        self.node = CameraNode(context=self.context, parameter_overrides=overrides)
        self.executor.add_node(self.node)
        return self.node

    def active_camera(self, **parameters: Any) -> CameraNode:
        node = self.camera(**parameters)
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        return node

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + TIMEOUT_S
        while not condition() and time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.02)
        return condition()


def status_of(node: CameraNode, name: str) -> Status:
    return next(s for s in node.status() if s.name == name)


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    with isolated_environment() as isolation:
        monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        monkeypatch.setenv(PROFILE_VARIABLE, "")  # what the node sets is undone with this
        context = Context()
        rclpy.init(context=context, domain_id=isolation.domain)
        made = Graph(context)
        try:
            yield made
        finally:
            if made.node is not None:
                made.node.stop("end of the test")
                made.node.teardown()
                made.node.destroy_node()
            made.observer.destroy_node()
            made.executor.shutdown()
            rclpy.shutdown(context=context)


@pytest.fixture
def cell() -> Iterator[CellStateWriter]:
    with closing(CellStateWriter(CELL)) as writer:
        writer.write(STATE, None)
        yield writer


def test_the_cells_picture_arrives_with_its_camera_info(graph: Graph, cell: CellStateWriter) -> None:
    graph.active_camera(**SMALL | {"stale_after_ms": 0})
    assert graph.wait_for(lambda: len(graph.views) > 3 and len(graph.infos) > 3)
    view, info = graph.views[-1], graph.infos[-1]
    np.testing.assert_array_equal(view.array, render(STATE, 64, 48))
    assert (view.encoding, view.frame_id, info.header.frame_id) == ("rgb8", *["front_color_optical_frame"] * 2)
    stamps = {(i.header.stamp.sec, i.header.stamp.nanosec) for i in graph.infos}
    assert {v.stamp for v in graph.views} & stamps, "picture and camera_info share a stamp"
    assert abs(time.time_ns() - view.stamp_ns) < TIMEOUT_S * 1e9
    assert (info.width, info.height, info.k[0]) == (64, 48, info.k[4])
    assert info.distortion_model == "plumb_bob"


def test_diagnostics_give_rate_age_and_drops(graph: Graph, cell: CellStateWriter) -> None:
    node = graph.active_camera(**SMALL | {"stale_after_ms": 0})
    assert graph.wait_for(lambda: status_of(node, "camera").values["rate_hz"] != "")
    values = status_of(node, "camera").values
    assert int(values["frames"]) > 1
    assert float(values["age_ms"]) >= 0.0
    assert int(values["drops"]) >= 0
    assert values["camera"] == "front"
    assert values["fps"] == "30"
    assert status_of(node, "image transport").values["rmw"]


def test_no_cell_is_an_error_by_name_and_nothing_is_published(graph: Graph) -> None:
    node = graph.active_camera(**SMALL)
    assert graph.wait_for(lambda: status_of(node, "camera").level == Level.ERROR)
    message = status_of(node, "camera").message
    assert "no picture from camera front" in message
    assert CELL in message
    assert graph.views == []


def test_a_stale_cell_stops_the_pictures_and_a_moving_one_brings_them_back(graph: Graph, cell: CellStateWriter) -> None:
    node = graph.active_camera(**SMALL)
    assert graph.wait_for(lambda: status_of(node, "camera").level == Level.ERROR), "nobody writes any more"
    assert "old" in status_of(node, "camera").message
    seen = len(graph.views)
    graph.executor.spin_once(timeout_sec=0.1)
    assert len(graph.views) <= seen + 1, "at most one was still on its way"

    def moves() -> bool:
        cell.write(STATE, None)
        return len(graph.views) > seen + 3 and status_of(node, "camera").level != Level.ERROR

    assert graph.wait_for(moves)


def test_a_cell_that_ends_and_starts_again_is_found_again(graph: Graph) -> None:
    with closing(CellStateWriter(CELL)) as first:
        first.write(STATE, None)
        node = graph.active_camera(**SMALL | {"stale_after_ms": 0})
        assert graph.wait_for(lambda: bool(graph.views))
    assert graph.wait_for(lambda: status_of(node, "camera").level == Level.ERROR)
    graph.views.clear()
    with closing(CellStateWriter(CELL)) as second:
        second.write(STATE[::-1].copy(), None)
        assert graph.wait_for(lambda: len(graph.views) > 1)


def test_deactivating_ends_the_pictures_and_activating_resumes_them(graph: Graph, cell: CellStateWriter) -> None:
    node = graph.active_camera(**SMALL | {"stale_after_ms": 0})
    assert graph.wait_for(lambda: bool(graph.views))
    assert node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
    graph.executor.spin_once(timeout_sec=0.1)
    before = len(graph.views)
    for _ in range(5):
        graph.executor.spin_once(timeout_sec=0.05)
    assert len(graph.views) <= before + 2, "no more than the queue held"
    assert [s.name for s in node.status()] == ["image transport"]
    assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    assert graph.wait_for(lambda: len(graph.views) > before + 2)
    assert node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
    assert node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"source": "kinect"}, "source is 'kinect', expected one of simulated, realsense"),
        ({"camera_name": "wrist/left"}, "camera_name is 'wrist/left'"),
        ({"cell": "../escape"}, "cell state name"),
        ({"source": "opencv", "device": "/dev/no_camera"}, "OpenCV camera /dev/no_camera does not exist"),
        ({"source": "video"}, "camera front: parameter file is empty, source video needs one"),
        ({"source": "playback", "file": "/nowhere/x.db3"}, "recording /nowhere/x.db3 does not exist"),
        ({"source": "realsense", "serial_number": "no_such"}, "RealSense camera no_such"),
        ({"source": "realsense", "fps": 29.97}, "fps is 29.97, expected a whole number"),
        ({"source": "opencv", "intrinsics.fx": 600.0}, "intrinsics.fx and .fy: expected both or neither"),
        ({"source": "opencv", "intrinsics.fx": 6.0, "intrinsics.fy": 6.0, "intrinsics.distortion": [0.1]}, "5 numbers"),
        ({"source": "synthetic", "extrinsics.parent": "moon"}, "camera front: extrinsics.parent"),
        ({"source": "synthetic", "extrinsics.calibration_file": "no_such"}, "no_such: no such configuration"),
        (
            {"source": "synthetic", "camera_name": "side", "extrinsics.calibration_file": "camera_extrinsics"},
            "cameras: no entry for side",
        ),
        (
            {"extrinsics.parent": "world", "extrinsics.calibration_file": "camera_extrinsics"},
            "extrinsics.calibration_file or extrinsics.parent, not both",
        ),
    ],
)
def test_unusable_parameters_refuse_to_configure_with_the_reason(graph: Graph, parameters: dict, words: str) -> None:
    node = graph.camera(**parameters)
    assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
    assert words in node.stop_reason


def test_small_shared_memory_is_an_error_in_diagnostics(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcqfa_ros.ros.fastdds.shared_memory_free", lambda _folder: 20 * 2**20)
    node = graph.camera(**SMALL)
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS, "images may still arrive over UDP"
    status = status_of(node, "image transport")
    assert status.level == Level.ERROR
    assert "20 MiB free, expected at least 36 MiB" in status.message


def test_camera_info_keeps_everything_but_its_stamp(graph: Graph) -> None:
    from dcqfa_ros.ros.images import restamp

    node = graph.camera(**SMALL)
    node.trigger_configure()
    info = deserialize_message(restamp(node._info, (12, 34)), CameraInfo)
    assert (info.header.stamp.sec, info.header.stamp.nanosec, info.width) == (12, 34, 64)
    assert list(info.p) == [*info.k[:3], 0.0, *info.k[3:6], 0.0, *info.k[6:], 0.0]
