"""arm_node of a cell with a six-axis arm: chunks, twists, poses and joint trajectories in, one bounded stream out.

The node converts messages; sources, deadman, limits, force guard and stops are ``dcqfa_ros.runtime.arm_stream`` and
``dcqfa_ros.safety``. The control thread drives the arm and publishes its state; the executor hears commands and
wrenches, and a wrench that crosses a limit stops the arm in its own callback. The arm is inactive until ``~/arm``.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

from dcqfa_ros.drivers.arm_protocol import ArmReadiness, ArmState, MotionOutcome, MotionResult
from dcqfa_ros.drivers.inovo import InovoArm
from dcqfa_ros.drivers.patience import connect_patiently
from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.drivers.rosbridge import LinkError
from dcqfa_ros.ros import arm_messages as msg
from dcqfa_ros.ros import arm_parameters as par
from dcqfa_ros.ros.arm_diagnostics import arm_state, arm_status
from dcqfa_ros.ros.arm_outputs import make_topic_arm
from dcqfa_ros.ros.arm_services import ArmServices
from dcqfa_ros.ros.clock_exchange import ClockProbe, NodeClock
from dcqfa_ros.ros.conversions import MessageError, consumption_message, from_time, status_message
from dcqfa_ros.ros.diagnostics import Level, Status
from dcqfa_ros.ros.generic_arm import TopicArm
from dcqfa_ros.ros.node import ManagedNode, run_node
from dcqfa_ros.ros.realtime_parameters import RealtimeParameters
from dcqfa_ros.runtime.arm_activity import CommandRefusal
from dcqfa_ros.runtime.arm_gate import Listeners
from dcqfa_ros.runtime.arm_stream import ArmStream
from dcqfa_ros.runtime.consumption import Report
from dcqfa_ros.safety.lease import CommandLease
from dcqfa_ros.safety.stops import Stop, StopCode, StopLatch
from dcqfa_ros.watchdog.client import WatchdogClient

RIVALS_PERIOD_S = 0.2
_COMMANDS = ("twist_command", "pose_command", "joint_command", "gripper_command")
_CHUNKS = ("chunk", "gripper_chunk")


class CellArmNode(ManagedNode):
    """An arm behind its driver, the safety stage and the control loop."""

    NODE_NAME: ClassVar[str] = "arm_node"

    def declare(self) -> None:
        """Declare the parameters (``dcqfa_ros.ros.arm_parameters``)."""
        par.declare(self)
        self._realtime = RealtimeParameters(self)
        self._time = NodeClock(self)
        self._clocks = ClockProbe(self, self._time)
        self.on_parameter("command_source", self._validate_source, self._apply_source)
        self._driver: InovoArm | TopicArm | None = None
        self._stream: ArmStream | None = None
        self._watchdog: WatchdogClient | None = None
        self._control: threading.Thread | None = None
        self._halt = threading.Event()
        self._operator = ArmServices(self, lambda: self._running()[0], self._hindrance, self._publish_arm_state)
        self._state_lock = threading.Lock()
        self._latch = StopLatch()  # of the process: to configure again resets no stop

    def _validate_source(self, value: str) -> str | None:
        if value not in par.SOURCES:
            return f"expected one of {', '.join(par.SOURCES)}"
        stream = self._stream
        return "the arm is armed: call ~/disarm first" if stream is not None and stream.armed else None

    def _apply_source(self, value: str) -> None:
        if self._stream is not None:
            self._stream.lease.give(value)

    # Lifecycle

    def setup(self) -> None:
        """Check the limits, connect the arm and create the interfaces. Nothing moves.

        Raises:
            UserError: a limit is absent or beyond its hard maximum, or the arm cannot be reached.
        """
        self._realtime.settings()  # refuses before anything is connected
        settings, mount = par.make_settings(self), par.make_mount(self)
        kinematics = par.make_kinematics(self)
        stage = par.make_stage(self, kinematics, self._latch)
        lease = CommandLease(par.SOURCES, self.parameter("command_source"))
        self._watchdog = par.make_watchdog(self)
        if self._watchdog is None:
            self.event(Level.WARN, "no watchdog: where this node hangs or dies, nothing stops the arm (watchdog.use)")
        if self.parameter("driver") == "inovo":
            self._driver = par.make_inovo(self)
            self._names = tuple(f"j{i + 1}" for i in range(6))
        else:
            self._driver = make_topic_arm(self, kinematics)
            self._names = tuple(self.parameter("ros.joint_names"))
        patience_s, tell = self.parameter("appear_timeout_s"), functools.partial(self.event, Level.WARN)
        connect_patiently(self._driver.connect, patience_s, LinkError, tell)
        listeners = Listeners(self._on_stop, lambda: self.post(self._publish_arm_state), self._on_moved)
        self._stream = ArmStream(self._driver, stage, lease, settings, mount, listeners, self._watchdog)
        self._every = max(1, round(settings.rate / float(self.parameter("state_rate"))))
        self._ticks = 0
        publish = self.create_interface_publisher
        self._out = {
            key: publish(key)
            for key in ("joint_states", "tcp_pose", "tcp_speed", "gripper_state", "tool_wrench", "arm_state",
                        "motion_result", "consumption")
        }  # fmt: skip
        self._subscribe()
        self._operator.open()

    def _subscribe(self) -> None:
        hear = self.create_guarded_subscription
        self._topics = {("policy", key): hear(key, self._checked(callback)) for key, callback in (
            ("chunk", self._on_chunk), ("gripper_chunk", self._on_gripper_chunk))}  # fmt: skip
        callbacks = (self._on_twist, self._on_pose, self._on_joints, self._on_gripper)
        for source in par.SOURCES:
            for key, callback in zip(_COMMANDS, callbacks, strict=True):
                if (source, key) != ("policy", "gripper_command"):  # its topic is that of the policy's gripper chunks
                    heard = self._checked(functools.partial(callback, source))
                    self._topics[source, key] = hear(key, heard, source=source)
        self._topics["", "wrench"] = hear("wrench", self._on_wrench)  # of no source: everyone relies on it
        for camera in par.cameras(self):
            hear("camera_info", functools.partial(self._on_camera, camera), camera=camera)

    def start(self) -> None:
        """Bring the arm up, if so configured, and start the control thread; the arm stays disarmed."""
        stream, driver = self._running()
        if self.parameter("bring_up") and driver.state().readiness is not ArmReadiness.READY:
            try:
                driver.bring_up()
            except DriverError as error:  # an open emergency stop, for one: reset_stop tries again
                self.event(Level.ERROR, f"the arm was not brought up: {error}")
        self._halt = threading.Event()
        stream.start()
        run = self.guard(functools.partial(self._run, stream, self._halt))
        self._control = threading.Thread(target=run, name="control", daemon=True)
        self._control.start()
        self.create_guarded_timer(RIVALS_PERIOD_S, self._check_rivals)
        self._clocks.open(self._check_clocks)
        self._publish_arm_state()

    def stop(self, reason: str) -> None:
        """Stop the arm, publish why, and end the control thread."""
        stream = self._stream
        control, self._control = self._control, None
        if stream is not None:
            stream.close(Stop(StopCode.FAULT if self.faulted else StopCode.SHUTDOWN, reason))
        self._halt.set()
        if control is not None and control is not threading.current_thread():
            control.join(2.0)

    def teardown(self) -> None:
        """Release the arm."""
        driver, self._driver, self._stream = self._driver, None, None
        watchdog, self._watchdog = self._watchdog, None
        if driver is not None:
            driver.close()
        if watchdog is not None:
            watchdog.close()

    def _running(self) -> tuple[ArmStream, InovoArm | TopicArm]:
        if self._stream is None or self._driver is None:
            raise DriverError("arm_node is not configured")
        return self._stream, self._driver

    # Control thread

    def _run(self, stream: ArmStream, halt: threading.Event) -> None:
        with self._realtime.entered():
            stream.run(halt, self._after_tick)

    def _after_tick(self, state: ArmState, now_ns: int) -> None:
        self._ticks += 1
        if self._ticks % self._every:
            return
        stream = self._running()[0]
        stamp = self._time.now_ns() - max(0, now_ns - state.stamp_ns)
        out = self._out
        if stream.armed:
            out["consumption"].publish(self._consumption(stream, now_ns))
        if state.readiness is ArmReadiness.DISCONNECTED:
            return  # its last figures are not of now
        out["joint_states"].publish(msg.joints_message(stamp, self._names, state))
        out["tcp_pose"].publish(msg.pose_message(stamp, state))
        out["tcp_speed"].publish(msg.twist_message(stamp, state.linear, state.angular))
        if state.gripper is not None:
            out["gripper_state"].publish(msg.gripper_message(stamp, state.gripper))

    def _consumption(self, stream: ArmStream, now_ns: int) -> Any:
        """What the arm has consumed of its chunks by the control period at ``now_ns``."""
        p = stream.progress()
        now, monotonic = self._time.now_both_ns()
        clock = now - monotonic  # of the stamps against the monotonic clock
        begun = clock + (p.begun_ns or now_ns)
        following = None if p.next_ns is None else clock + p.next_ns
        report = Report(p.episode, clock + now_ns, p.consumed, begun, p.remaining, p.starved, following)
        return consumption_message(report)

    # Listeners, in whichever thread

    def _tell(self, tell: Callable[[], None]) -> None:
        """Run ``tell`` on the executor's thread: publishing must not keep those waiting who stop the arm."""
        if self.on_executor_thread:
            tell()
        else:
            self.post(tell)

    def _on_stop(self, stop: Stop) -> None:
        def tell() -> None:
            self._publish_arm_state()
            level = Level.OK if stop.code.normal else Level.ERROR
            self.event(level, f"disarmed: {stop.text}", code=stop.code.value)

        self._tell(tell)

    def _on_moved(self, kind: str, result: MotionResult) -> None:
        self._tell(lambda: self._publish_result(kind, result.outcome.value, result.message))

    def _publish_result(self, kind: str, outcome: str, reason: str) -> None:
        if self._stream is None:
            return
        values = {"command": kind, "outcome": outcome, "reason": reason}
        level = Level.OK if outcome == MotionOutcome.SUCCEEDED.value else Level.WARN
        stamp = self._time.now_ns()
        self._out["motion_result"].publish(status_message(stamp, "motion", level, f"{kind}: {outcome}", values))

    def _publish_arm_state(self) -> None:
        stream = self._stream
        if stream is None:
            return
        with self._state_lock:  # what is published last is what was true last
            level, text, values = arm_state(stream)
            stamp = self._time.now_ns()
            self._out["arm_state"].publish(status_message(stamp, "arm", level, text, values))

    # Commands

    def _checked(self, callback: Callable[[Any], None]) -> Callable[[Any], None]:
        """Count and report what cannot be read, instead of treating it as a fault of this node."""

        def take(message: Any) -> None:
            stream = self._stream
            if stream is None or not self.is_active:
                return
            try:
                callback(message)
            except MessageError as error:
                stream.refused[CommandRefusal.MALFORMED.value] += 1
                self.event(Level.ERROR, f"command refused: {error}")

        return take

    def _times(self, stamp: Any) -> tuple[int, int]:
        """Return the monotonic time of a message's stamp (now, where it has none), and now."""
        now, then = time.monotonic_ns(), from_time(stamp)
        return (now - (self._time.now_ns() - then) if then else now), now

    def _on_chunk(self, message: Any) -> None:
        twists, period = msg.twist_chunk(message)
        refusal = self._running()[0].submit_chunk("policy", self._times(message.header.stamp)[0], period, twists,
                                                  time.monotonic_ns())  # fmt: skip
        if refusal not in (None, CommandRefusal.SOURCE, CommandRefusal.DISARMED):
            self.event(Level.WARN, f"chunk refused: {refusal.value}")

    def _on_gripper_chunk(self, message: Any) -> None:
        openings = msg.gripper_chunk(message)
        self._running()[0].submit_gripper_chunk("policy", *self._times(message.header.stamp)[:1], openings,
                                                time.monotonic_ns())  # fmt: skip

    def _on_twist(self, source: str, message: Any) -> None:
        twist, in_tool = msg.twist_command(message)
        self._running()[0].submit_twist(source, twist, *self._times(message.header.stamp), in_tool=in_tool)

    def _on_pose(self, source: str, message: Any) -> None:
        position, orientation = msg.pose_command(message)
        times = self._times(message.header.stamp)
        self._answer("pose", *self._running()[0].submit_pose(source, position, orientation, *times))

    def _on_joints(self, source: str, message: Any) -> None:
        times, positions = msg.joint_command(message, self._names)
        stamps = self._times(message.header.stamp)
        self._answer("joint_trajectory", *self._running()[0].submit_joints(source, times, positions, *stamps))

    def _answer(self, kind: str, refusal: CommandRefusal | None, text: str) -> None:
        if refusal is None:
            return
        self.event(Level.WARN, f"{kind} refused: {text}", refusal=refusal.value)
        self._publish_result(kind, MotionOutcome.REJECTED.value, text)

    def _on_gripper(self, source: str, message: Any) -> None:
        self._running()[0].submit_gripper(source, float(message.data), time.monotonic_ns())

    # Signals

    def _on_wrench(self, message: Any) -> None:
        stream = self._stream
        if stream is None:
            return
        taken, now = self._times(message.header.stamp)
        force, torque = stream.on_wrench(*msg.wrench_arrays(message), min(taken, now))
        wrench = msg.wrench_message(message.header.stamp, msg.TOOL, force, torque)
        self._out["tool_wrench"].publish(wrench)

    def _on_camera(self, camera: str, message: Any) -> None:
        if self._stream is not None:
            taken, now = self._times(message.header.stamp)
            self._stream.on_camera(camera, min(taken, now))

    def _check_rivals(self) -> None:
        rivals = self._rivals()
        stream = self._stream
        if rivals and stream is not None and stream.armed:
            stream.disarm(Stop(StopCode.TWO_PUBLISHERS, rivals))

    def _check_clocks(self) -> None:
        """Stop an armed arm where a clock was set, or where that of the host of its policy cannot be relied on."""
        stream = self._stream
        step = self._clocks.watch.step()
        if stream is None or not stream.armed:
            return
        by_policy = stream.lease.holder == "policy"
        stop = step or (self._clocks.problem() if by_policy and stream.player.consumed else None)
        if stop is not None:
            stream.disarm(stop)

    def _rivals(self) -> str:
        holder = self._running()[0].lease.holder
        for (source, _), subscription in self._topics.items():
            if source in ("", holder) and self.count_publishers(subscription.topic_name) > 1:
                return f"two publishers on {subscription.topic_name}: only one process may publish what moves the arm"
        return ""

    def _hindrance(self, stream: ArmStream) -> str:
        """Why the arm must not be armed: two publishers of what moves it, or a clock that cannot be relied on."""
        clock = self._clocks.problem() if stream.lease.holder == "policy" else None
        return self._rivals() or (f"{clock.code.value}: {clock.text}" if clock is not None else "")

    # Diagnostics

    def status(self) -> list[Status]:
        """Report activity, stop, refusals, limits, tick, watchdog and driver."""
        stream, driver = self._stream, self._driver
        if stream is None or driver is None:
            return [Status(Level.WARN, "arm", "not configured", {})]
        return arm_status(stream, driver, self._watchdog, self._realtime.figures() | self._clocks.figures())


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``arm_node`` of a cell with an arm."""
    return run_node(CellArmNode, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
