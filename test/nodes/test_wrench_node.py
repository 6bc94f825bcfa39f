"""wrench_node publishes the contact wrench at once, says by name when there is none, and comes back after a loss."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from geometry_msgs.msg import PoseStamped, WrenchStamped

from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.testing import Graph, wait_until
from dcqfa_ros.sim.ft300s import FT300SEmulator, FT300SOptions

NODE = "dcqfa_ros.nodes.wrench_node"
WEIGHT_N = 9.80665
LOAD = (1.0, -2.0, 3.0 + WEIGHT_N, 0.1, 0.2, -0.3)  # a tool of 1 kg hangs below, the rest is contact
TIP = [1.0, 0.0, 0.0, 0.0]  # the tool points down: the sensor's z is the world's -z


class Ears:
    """What was heard on the sensor's two topics, and a tcp_pose that is said again and again."""

    def __init__(self, graph: Graph) -> None:
        self.wrenches: list[WrenchStamped] = []
        self.raws: list[WrenchStamped] = []
        self.arrivals: list[float] = []
        for key, take in (("wrench", self._wrench), ("wrench_raw", self.raws.append)):
            entry = interface(key)
            graph.node.create_subscription(WrenchStamped, entry.name, take, qos(entry.qos))
        entry = interface("tcp_pose")
        self._poses = graph.node.create_publisher(PoseStamped, entry.name, qos(entry.qos))
        self.quaternion: list[float] | None = None
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._say, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._halt.set()
        self._thread.join()

    def _wrench(self, message: WrenchStamped) -> None:
        self.wrenches.append(message)
        self.arrivals.append(time.monotonic())

    def _say(self) -> None:
        while not self._halt.wait(0.02):
            if self.quaternion is not None:
                message = PoseStamped()
                o = message.pose.orientation
                o.x, o.y, o.z, o.w = self.quaternion
                self._poses.publish(message)


def values(message: WrenchStamped) -> list[float]:
    f, t = message.wrench.force, message.wrench.torque
    return [f.x, f.y, f.z, t.x, t.y, t.z]


@pytest.fixture
def sensor(tmp_path: Path) -> Iterator[FT300SEmulator]:
    with FT300SEmulator(FT300SOptions(link=tmp_path / "ft300s", wrench=LOAD, noise=0.02)) as emulator:
        yield emulator


@pytest.fixture
def graph() -> Iterator[Graph]:
    with Graph() as made:
        yield made


@pytest.fixture
def ears(graph: Graph) -> Iterator[Ears]:
    made = Ears(graph)
    yield made
    made.close()


def spawn(graph: Graph, sensor: FT300SEmulator, **parameters: Any) -> Any:
    given = {
        "silence_ms": 500,
        "maximum_age_ms": 1000,
        "orientation_max_age_ms": 5000,
        **parameters,
    }  # the machine may be busy
    return graph.spawn_node(NODE, "wrench_node", port=sensor.port, **given)


def test_bias_and_weight_are_taken_off_and_the_rest_is_zeroed_on_request(
    graph: Graph, sensor: FT300SEmulator, ears: Ears
) -> None:
    spawn(graph, sensor, mass=1.0, centre_of_mass="[0.0, 0.0, 0.05]", bias="[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]")
    assert graph.activate("wrench_node")
    wait_until(lambda: len(ears.wrenches) > 20 and len(ears.raws) > 20, "wrenches")
    np.testing.assert_allclose(values(ears.wrenches[-1]), [0.0, *LOAD[1:]], atol=0.2)
    assert (ears.wrenches[-1].header.frame_id, ears.raws[-1].header.frame_id) == ("ft_sensor", "ft_sensor")
    graph.wait_for("wrench_node", "gravity", "tcp_pose never came: wrench is published with the tool's weight of 1 kg")
    refusal = graph.trigger("wrench_node/zero")
    assert not refusal.success
    assert "tcp_pose does not come" in refusal.message or "readings in a row" in refusal.message

    ears.quaternion = TIP
    graph.wait_for("wrench_node", "gravity", "the weight of 1 kg is taken off")
    wait_until(lambda: abs(values(ears.wrenches[-1])[2] - 3.0) < 0.2, "the weight taken off")
    np.testing.assert_allclose(values(ears.wrenches[-1]), [0.0, -2.0, 3.0, 0.1, 0.2, -0.3], atol=0.2)
    np.testing.assert_allclose(values(ears.raws[-1]), LOAD, atol=0.2)

    wait_until(lambda: graph.trigger("wrench_node/zero").success, "zero once 200 readings with the pose have come", 60)
    count = len(ears.wrenches)
    wait_until(lambda: len(ears.wrenches) > count + 5, "wrenches")
    np.testing.assert_allclose(values(ears.wrenches[-1]), np.zeros(6), atol=0.2)
    np.testing.assert_allclose(values(ears.raws[-1]), LOAD, atol=0.2)


def test_it_returns_by_itself_after_unplugging_and_says_what_happened(
    graph: Graph, sensor: FT300SEmulator, ears: Ears
) -> None:
    spawn(graph, sensor)
    assert graph.activate("wrench_node")
    wait_until(lambda: len(ears.wrenches) > 10, "wrenches")
    good = graph.wait_for("wrench_node", "wrench", serial_number="FTS-4711", firmware="FTS-2.0.1", mode="stream").status
    assert good.values["crc_errors"] == "0"
    sensor.unplug()
    graph.wait_for("wrench_node", "event", "unplugged")
    graph.wait_for("wrench_node", "wrench", "no wrench")
    count = len(ears.wrenches)
    time.sleep(0.2)  # for what must not come
    assert len(ears.wrenches) == count, "nothing is published without a sensor"
    sensor.plug()
    back = time.monotonic()
    wait_until(lambda: len(ears.wrenches) > count, "the first wrench")
    assert ears.arrivals[count] - back < 5.0, "a second on an idle machine, see the faults' figures"
    graph.wait_for("wrench_node", "event", "delivers again")
    graph.wait_for("wrench_node", "wrench", reconnects="1")
    assert graph.state("wrench_node") == "active"


def test_readings_that_were_read_too_late_are_dropped_and_said(
    graph: Graph, sensor: FT300SEmulator, ears: Ears
) -> None:
    node = spawn(graph, sensor, maximum_age_ms=50)
    assert graph.activate("wrench_node")
    wait_until(lambda: len(ears.raws) > 10, "wrenches")

    def hang() -> bool:
        node.send(signal.SIGSTOP)
        count = len(sensor.frames)
        wait_until(lambda: len(sensor.frames) > count + 30, "frames that nobody reads")
        node.send(signal.SIGCONT)
        time.sleep(1.2)  # until the next report
        return any("readings dropped since the last report" in r.status.message for r in list(graph.reports))

    wait_until(hang, "the report of dropped readings")


def test_overrange_is_published_as_sent_and_reported_by_name(graph: Graph, sensor: FT300SEmulator, ears: Ears) -> None:
    spawn(graph, sensor)
    assert graph.activate("wrench_node")
    sensor.set_load((0.0, 0.0, 320.0, 0.0, 0.0, 0.0))
    graph.wait_for("wrench_node", "wrench", "overrange on Fz")
    wait_until(lambda: ears.wrenches and values(ears.wrenches[-1])[2] > 300.0, "what the force guard acts on")
    assert "overrange" in graph.trigger("wrench_node/zero").message
    sensor.set_load((0.0,) * 6)
    graph.wait_for("wrench_node", "event", "within the measuring range again")


def test_a_missing_sensor_refuses_to_configure_by_name_and_it_works_once_plugged_in(
    graph: Graph, sensor: FT300SEmulator
) -> None:
    sensor.unplug()
    spawn(graph, sensor)
    assert not graph.configure("wrench_node")
    graph.wait_for("wrench_node", "event", f"{sensor.port}: no such serial port")
    sensor.plug()
    assert graph.activate("wrench_node")
    assert graph.wait_for("wrench_node", "wrench", "delivers", mode="stream")
