"""camera_node in a graph of processes: RGB-D with equal stamps, JPEG on request, loss and return, recorded video."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage

from dcqfa_ros.drivers.realsense import RealSenseCamera
from dcqfa_ros.drivers.realsense_options import RealSenseOptions
from dcqfa_ros.ros.diagnostics import Level
from dcqfa_ros.ros.images import decode_image
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.testing import Graph, Spawned, wait_until
from dcqfa_ros.sim.camera_realsense import EmulatedRealSense
from dcqfa_ros.sim.camera_synthetic import scene

NODE, PROGRAM = "front_camera_node", "dcqfa_ros.nodes.camera_node"
SIZE = {"width": 64, "height": 48}


@pytest.fixture
def graph() -> Iterator[Graph]:
    with Graph() as made:
        yield made


def listen(graph: Graph, key: str, heard: Callable[[bytes], Any]) -> Any:
    entry = interface(key)
    return graph.node.create_subscription(
        entry.message_class(), entry.resolve(camera="front"), heard, qos(entry.qos), raw=True
    )


def camera(graph: Graph, source: str, **parameters: Any) -> Spawned:
    return graph.spawn_node(PROGRAM, NODE, source=source, **{**SIZE, **parameters})


def camera_status(graph: Graph) -> Any:
    return [r.status for r in graph.reports if r.node == NODE and r.status.name == "camera"][-1]


def test_color_depth_and_infos_reach_another_process_with_equal_stamps(graph: Graph) -> None:
    pictures: dict[str, dict[int, np.ndarray]] = {"color": {}, "depth": {}}
    infos: dict[str, dict[int, CameraInfo]] = {"camera_info": {}, "depth_info": {}}
    encodings = set()

    def picture(key: str) -> Callable[[bytes], None]:
        def heard(data: bytes) -> None:
            view = decode_image(data)
            encodings.add((key, view.encoding, view.frame_id))
            pictures[key][view.stamp_ns] = view.array.copy()

        return heard

    def info(key: str) -> Callable[[bytes], None]:
        def heard(data: bytes) -> None:
            message = deserialize_message(data, CameraInfo)
            infos[key][message.header.stamp.sec * 10**9 + message.header.stamp.nanosec] = message

        return heard

    for key in pictures:
        listen(graph, key, picture(key))
    for key in infos:
        listen(graph, key, info(key))
    camera(graph, "synthetic")
    assert graph.activate(NODE)

    def common() -> set[int]:
        return set.intersection(*(set(found) for found in (*pictures.values(), *infos.values())))

    stamps = wait_until(lambda: common() if len(common()) > 4 else None, "five complete sets")
    frame = "front_color_optical_frame"
    assert encodings == {("color", "rgb8", frame), ("depth", "16UC1", frame)}
    colors, depths = scene(**SIZE)
    for stamp in stamps:
        color, depth = pictures["color"][stamp], pictures["depth"][stamp]
        row = next(n for n in range(240) if np.array_equal(colors[n : n + 48], color))
        np.testing.assert_array_equal(depths[row : row + 48], depth)
        assert infos["camera_info"][stamp] == infos["depth_info"][stamp]
        assert infos["camera_info"][stamp].k[0] == pytest.approx(0.96 * 64)
        assert infos["camera_info"][stamp].header.frame_id == frame
    values = graph.wait_for(NODE, "camera", "delivers").status.values
    assert (values["lost"], values["depth"], values["calibrated"]) == ("false", "true", "true")
    assert float(values["age_ms"]) >= 0.0


def test_jpeg_is_encoded_only_while_somebody_listens(graph: Graph) -> None:
    camera(graph, "synthetic", jpeg_quality=95)
    assert graph.activate(NODE)
    assert graph.wait_for(NODE, "camera", "delivers").status.values["jpeg_frames"] == "0"
    heard: list[CompressedImage] = []
    subscription = listen(graph, "compressed", lambda data: heard.append(deserialize_message(data, CompressedImage)))
    wait_until(lambda: len(heard) > 2, "compressed pictures")
    picture = cv2.cvtColor(cv2.imdecode(np.frombuffer(heard[-1].data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    colors, _ = scene(**SIZE)
    best = min(np.abs(colors[n : n + 48].astype(int) - picture).mean() for n in range(240))
    assert best < 15.0, "the same colors but for compression"
    assert heard[-1].format == "rgb8; jpeg compressed bgr8"
    assert heard[-1].header.frame_id == "front_color_optical_frame"
    graph.node.destroy_subscription(subscription)

    def jpegs() -> int:
        return int(camera_status(graph).values["jpeg_frames"])

    def idle() -> bool:
        before, seen = jpegs(), len(graph.reports)
        wait_until(lambda: sum(r.status.name == "camera" for r in graph.reports[seen:]) > 1, "two more reports")
        return jpegs() == before > 2

    wait_until(idle, "no more are encoded")


def test_a_librealsense_camera_serves_the_same_topics(graph: Graph) -> None:
    depths: list[np.ndarray] = []
    listen(graph, "depth", lambda data: depths.append(decode_image(data).array.copy()))
    camera(graph, "emulated", serial_number='"12345"', **{"filters.hole_filling": True})
    assert graph.activate(NODE)
    wait_until(lambda: len(depths) > 3, "aligned depth")
    assert depths[-1].shape == (48, 64)
    assert 200 < np.median(depths[-1]) < 1600
    assert graph.wait_for(NODE, "camera", "delivers").status.values["serial_number"] == "12345"
    extrinsics = graph.wait_for(NODE, "extrinsics").status
    assert extrinsics.values["front_color_optical_frame > front_depth_optical_frame"].startswith("0.015 0 0")


def test_the_pose_of_the_calibration_file_is_in_diagnostics(graph: Graph) -> None:
    camera(graph, "synthetic", **{"extrinsics.calibration_file": "camera_extrinsics"})
    assert graph.activate(NODE)
    status = graph.wait_for(NODE, "extrinsics").status
    assert status.message == "nominal pose in world"
    assert status.values["world > front_link"].startswith("0 1.2 0.6 ")
    assert "tf_static" in status.values["published"]


def test_a_recording_of_librealsense_plays_color_and_depth(graph: Graph, tmp_path: Path) -> None:
    rs = pytest.importorskip("pyrealsense2", reason="pyrealsense2 is not installed: no recording to play")
    path = tmp_path / "camera.db3"
    with EmulatedRealSense("321", **SIZE) as emulated:
        record(rs.recorder(str(path), emulated.devices()[0]), 20)
    heard: dict[str, list[int]] = {"color": [], "depth": []}
    for key, stamps in heard.items():
        listen(graph, key, lambda data, stamps=stamps: stamps.append(decode_image(data).stamp_ns))
    camera(graph, "playback", file=str(path))
    assert graph.activate(NODE)
    wait_until(lambda: all(len(stamps) > 30 for stamps in heard.values()), "more pictures than the file holds")
    for stamps in heard.values():
        assert stamps == sorted(set(stamps))
    assert graph.wait_for(NODE, "camera", "delivers").status.values["serial_number"] == "321"


def record(recorder: Any, frames: int) -> None:
    driver = RealSenseCamera(RealSenseOptions(**SIZE), lambda: [recorder])
    driver.connect()
    for _ in range(frames):
        driver.read(10.0)
    driver.close()


def test_a_video_plays_to_its_end_and_says_so(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "short.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 20.0, (64, 48))
    for number in range(30):
        writer.write(np.full((48, 64, 3), 8 * number, dtype=np.uint8))
    writer.release()
    heard: list[float] = []
    listen(graph, "color", lambda data: heard.append(float(decode_image(data).array.mean())))
    camera(graph, "video", file=str(path), at_end="end")
    assert graph.activate(NODE)
    graph.wait_for(NODE, "camera", "short.avi has ended", lost="true")
    assert len(heard) > 10 and heard == sorted(heard)
    assert graph.wait_for(NODE, "camera", "has ended").status.level == Level.ERROR
    assert graph.state(NODE) == "active"


def test_a_camera_that_is_lost_and_comes_back_needs_no_restart(graph: Graph, tmp_path: Path) -> None:
    plug = tmp_path / "plugged"
    plug.touch()
    program = tmp_path / "unreliable.py"
    program.write_text(UNRELIABLE)
    graph.spawn_node(str(program), NODE, source="emulated", **SIZE, camera_name="front", device=str(plug))
    heard: list[int] = []
    listen(graph, "color", lambda data: heard.append(decode_image(data).stamp_ns))
    assert graph.activate(NODE)
    wait_until(lambda: len(heard) > 3, "pictures")
    for round_ in (1, 2):
        plug.unlink()
        report = graph.wait_for(NODE, "camera", "was disconnected", lost="true", reconnects=str(round_ - 1))
        assert report.status.level == Level.ERROR
        assert graph.state(NODE) == "active"
        count = len(heard)
        plug.touch()
        graph.wait_for(NODE, "camera", "delivers", lost="false", reconnects=str(round_))
        wait_until(lambda count=count: len(heard) > count + 3, "pictures again")
    assert heard == sorted(set(heard)), "stamps keep growing"
    graph.wait_for(NODE, "event", "delivers pictures again")
    assert time.time_ns() - heard[-1] < 60e9


UNRELIABLE = '''
"""camera_node whose emulated RealSense is plugged in while a file exists."""
import sys, threading, time
from pathlib import Path
from dcqfa_ros.nodes.camera_node import CameraNode
from dcqfa_ros.ros.node import run_node


class Unreliable(CameraNode):
    def start(self):
        super().start()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        file = Path(self.parameter("device"))
        while self._camera is not None:
            (self._camera.emulated.plug if file.exists() else self._camera.emulated.unplug)()
            time.sleep(0.02)


sys.exit(run_node(Unreliable))
'''
