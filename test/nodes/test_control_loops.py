"""What would stall a control tick does not happen in it: no collection of the whole heap, no import."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import TimeReference
from std_srvs.srv import Trigger

from dcqfa_ros.nodes.arm_node import ArmNode
from dcqfa_ros.nodes.cell_arm_node import CellArmNode
from dcqfa_ros.ros.arm_messages import gripper_chunk_message, twist_chunk_message, wrench_message
from dcqfa_ros.ros.conversions import planar_chunk_message
from dcqfa_ros.ros.guarded import Refused
from dcqfa_ros.ros.isolation import isolated_environment
from dcqfa_ros.runtime.realtime import scheduling
from dcqfa_ros.sim.inovo import InovoEmulator
from test.nodes.spinning import Spinning

TICKS = 30
RATE = 50.0
CELL = {
    "driver": "inovo", "command_source": "policy", "rate": RATE, "watchdog.use": "none", "cameras": [""],
    "workspace.minimum": [-0.4, 0.2, 0.1], "workspace.maximum": [0.4, 0.6, 0.8], "inovo.host": "127.0.0.1",
    "maximum_age.wrench": 0.5, "maximum_age.state": 0.5, "maximum_age.command": 2.0, "maximum_age.observation": 5.0,
    "hold_after_s": 0.9, "stop_after_s": 5.0, "clock.silence_s": 10.0, "clock.maximum_skew_ms": 500.0,
}  # fmt: skip


class Loop(Spinning):
    """A node on an executor of this thread."""

    def __init__(self, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(context)
        self.events: list[str] = []
        self.node: Any = None
        for cls in (ArmNode, CellArmNode):
            monkeypatch.setattr(cls, "event", lambda _, level, text, **values: self.events.append(text))

    def activate(self, cls: Any, **parameters: Any) -> Any:
        overrides = [Parameter(name, value=value) for name, value in parameters.items()]
        self.node = cls(context=self.context, parameter_overrides=overrides)
        self.executor.add_node(self.node)
        assert self.node.trigger_configure() == TransitionCallbackReturn.SUCCESS, self.events
        assert self.node.trigger_activate() == TransitionCallbackReturn.SUCCESS, self.events
        self.known = set(sys.modules)
        return self.node

    def until(self, condition: Callable[[], Any]) -> None:
        assert self.wait_for(condition), self.events

    def quiet(self, ticks: Callable[[], int], each: Callable[[], None]) -> tuple[set[str], int]:
        """Let the loop tick; return what was imported since activation, and what a full collection looks at."""
        first = ticks()

        def done() -> bool:
            each()
            return ticks() - first > TICKS

        self.until(done)
        return set(sys.modules) - self.known, len(gc.get_objects())


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    with isolated_environment() as isolation:
        monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        context = Context()
        rclpy.init(context=context, domain_id=isolation.domain)
        made = Loop(context, monkeypatch)
        try:
            yield made
        finally:
            if made.node is not None:
                made.node.shut_down("test over")
                made.node.destroy_node()
            made.executor.shutdown()
            rclpy.shutdown(context=context)
            gc.unfreeze()


def assert_quiet(imported: set[str], objects: int) -> None:
    assert not imported, f"imported in the control loop: {sorted(imported)}"
    # What a full collection looks at is what came since activation: 1 ms for 20,000 objects. All else is frozen.
    assert objects < gc.get_freeze_count() / 5, (objects, gc.get_freeze_count())


def test_the_planar_arm_ticks_without_imports_or_collections_of_the_whole_heap(loop: Loop) -> None:
    cpu, before = str(min(os.sched_getaffinity(0))), scheduling().text
    node = loop.activate(ArmNode, control_rate=RATE, realtime_priority=1, cpu_affinity=cpu)
    assert node._on_arm(None, Trigger.Response()).success
    core, actions = node.executor_core, np.full((16, 2), 200.0)
    first = core.stamp_ns

    def command() -> None:
        message = planar_chunk_message(core.stamp_ns, "table", actions, core.settings.period_ns, 1024.0)
        node._on_chunk(message)

    imported, objects = loop.quiet(lambda: node._ticker.ticks, command)
    assert core.stamp_ns > first and core.accepted > 1
    assert_quiet(imported, objects)
    node._on_disarm(None, Trigger.Response())
    (status,) = node.status()
    assert status.values["realtime_priority"] == "1" and status.values["cpus"] == cpu
    granted = not status.values["realtime_refused"]
    assert status.values["scheduler"] == "SCHED_FIFO 1" if granted else "goes on without it" in " ".join(loop.events)
    assert scheduling().text == ("SCHED_FIFO 1" if granted else before)  # who may hold the interpreter lock, too
    assert node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
    assert scheduling().text == before


def test_the_six_axis_arm_ticks_without_imports_or_collections_of_the_whole_heap(loop: Loop) -> None:
    zero = np.zeros(3)
    with InovoEmulator(ready=True, time_scale=0.05) as emulator:
        node = loop.activate(CellArmNode, **CELL, **{"inovo.port": emulator.port})
        stream = node._stream

        def feed() -> None:
            now = node.get_clock().now()
            node._on_wrench(wrench_message(now.to_msg(), "ft_sensor", zero, zero))
            for sent in list(node._clocks.watch._probes):
                echo = TimeReference(source=node.get_fully_qualified_name())
                echo.time_ref.sec, echo.time_ref.nanosec = divmod(sent, 10**9)
                echo.header.stamp = now.to_msg()
                node._clocks._take(echo)
            if not stream.armed:
                return
            twists = np.tile([0.0, 0.0, 0.005, 0.0, 0.0, 0.0], (16, 1))
            node._on_gripper_chunk(gripper_chunk_message(now.nanoseconds, np.full(16, 0.5), 33_333_333))
            node._on_chunk(twist_chunk_message(now.nanoseconds, twists, 33_333_333))

        def armed() -> bool:
            feed()
            if not stream.armed:
                with contextlib.suppress(Refused):  # something is still missing
                    node._operator._reset_stop(None, Trigger.Response())
                    node._operator._arm(None, Trigger.Response())
            return bool(stream.armed and stream.sent)

        loop.until(armed)
        imported, objects = loop.quiet(lambda: stream.ticker.ticks, feed)
        assert_quiet(imported, objects)
        node.shut_down("test over")
