"""arm_node: executes time-stamped chunks from its own buffer on the planar arm of the simulated cell.

The node converts messages; chunk merging, limits, lease and deadman are ``dcqfa_ros.runtime.arm_executor``. The arm
starts disarmed and stays so until an operator (or the trial node) calls ``~/arm``.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from typing import Any

from rosgraph_msgs.msg import Clock
from std_srvs.srv import Trigger

from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.ros.conversions import (
    MessageError,
    consumption_message,
    from_time,
    joint_state_message,
    planar_chunk_actions,
    planar_pose_message,
    points_message,
    status_message,
    to_time,
)
from dcqfa_ros.ros.diagnostics import Status
from dcqfa_ros.ros.node import ManagedNode, Refused, run_node
from dcqfa_ros.ros.realtime_parameters import RealtimeParameters
from dcqfa_ros.runtime.arm_executor import (
    ArmExecutor,
    ArmMode,
    ArmRefusedError,
    ArmSettings,
    Tick,
)
from dcqfa_ros.runtime.consumption import Report
from dcqfa_ros.runtime.ticker import Ticker
from dcqfa_ros.safety.lease import CommandLease
from dcqfa_ros.safety.limits import BoxLimit
from dcqfa_ros.safety.stops import Stop, StopCode
from dcqfa_ros.sim.cell_state import cell_state_name
from dcqfa_ros.sim.planar_arm import SimulatedPlanarArm

AXES = ("x", "y")
RATES = ("realtime", "max")
SOURCES = ("policy",)
LOCKSTEP_POLL_S = 0.05


class ArmNode(ManagedNode):
    """Simulated planar arm and its cell: observations out, chunks in, one judgement per step."""

    NODE_NAME = "arm_node"

    def declare(self) -> None:
        """Declare the parameters (see ``config/pusht_cell.yaml``)."""
        add = self.add_parameter
        add("driver", "simulated", "arm driver", choices=("simulated",), read_only=True)
        add("rate", "realtime", "pace of the simulated cell", choices=RATES)
        add("control_rate", 10.0, "control tick, Hz", minimum=0.1, maximum=1000.0, read_only=True)
        add("command_source", "policy", "holder of the command lease", choices=SOURCES)
        add("command_timeout_s", 2.0, "deadman, seconds", minimum=0.05, maximum=60.0, read_only=True)
        add("lockstep_timeout_s", 30.0, "the same in lockstep, seconds", minimum=1.0, maximum=600.0)
        add(
            "observation_max_age_s",
            1.0,
            "limit of a chunk's observation, seconds",
            minimum=0.01,
            maximum=60.0,
            read_only=True,
        )
        add("max_steps", 300, "steps after which an episode ends", minimum=1, read_only=True)
        add("seed", 0, "start state that ~/reset_cell sets", minimum=0, maximum=2**32 - 1)
        add("frame", "table", "frame of poses and chunks", read_only=True)
        add("units_per_metre", 1024.0, "bundle units (px) per metre", minimum=1e-6, read_only=True)
        add("limits.minimum", [0.0, 0.0], "smallest target x, y, bundle units", read_only=True)
        add("limits.maximum", [512.0, 512.0], "largest target x, y, bundle units", read_only=True)
        self._realtime = RealtimeParameters(self)
        self.on_parameter("rate", self._validate_rate)
        self.on_parameter("command_source", self._validate_source, self._apply_source)
        self.executor_core: ArmExecutor | None = None
        self._control_thread: threading.Thread | None = None
        self._halt = threading.Event()  # one per activation, so that an old thread can never come back to life
        self._state_lock = threading.Lock()
        self._ticker: Ticker | None = None

    def _validate_rate(self, value: str) -> str | None:
        if value not in RATES:
            return f"expected one of {', '.join(RATES)}"
        return "the arm is armed: call ~/disarm first" if self._armed else None

    def _validate_source(self, value: str) -> str | None:
        if value not in SOURCES:
            return f"expected one of {', '.join(SOURCES)}"
        return "the arm is armed: call ~/disarm first" if self._armed else None

    def _apply_source(self, value: str) -> None:
        if self.executor_core is not None:
            self.executor_core.lease.give(value)

    @property
    def _armed(self) -> bool:
        return self.executor_core is not None and self.executor_core.armed

    def setup(self) -> None:
        """Connect the simulated arm and create the interfaces."""
        rate = float(self.parameter("control_rate"))
        self._realtime.settings()  # refuses before anything is connected
        self._units, self._frame = float(self.parameter("units_per_metre")), str(self.parameter("frame"))
        settings = ArmSettings(
            period_ns=round(1e9 / rate),
            command_timeout_s=float(self.parameter("command_timeout_s")),
            observation_max_age_s=float(self.parameter("observation_max_age_s")),
            max_steps=int(self.parameter("max_steps")),
        )
        limits = BoxLimit(AXES, self.parameter("limits.minimum"), self.parameter("limits.maximum"))
        lease = CommandLease(SOURCES, str(self.parameter("command_source")))
        self._seed = int(self.parameter("seed"))
        shared = cell_state_name(self.context.get_domain_id(), self.get_namespace())
        self._cell = driver = SimulatedPlanarArm(step_limit=settings.max_steps, seed=self._seed, shared_as=shared)
        core = ArmExecutor(driver, limits, lease, settings)
        self.executor_core = core  # before connecting: teardown() releases what connect() leaves half done
        core.connect(self._seed)
        self._pose_publisher = self.create_interface_publisher("tcp_pose")
        self._joints_publisher = self.create_interface_publisher("joint_states")
        self._points_publisher = self.create_interface_publisher("keypoints")
        self._consumption_publisher = self.create_interface_publisher("consumption")
        self._judgement_publisher = self.create_interface_publisher("judgement")
        self._state_publisher = self.create_interface_publisher("arm_state")
        self._clock_publisher = self.create_interface_publisher("clock")
        self._chunks = self.create_guarded_subscription("chunk", self._on_chunk)
        self.create_guarded_service("arm", self._on_arm)
        self.create_guarded_service("disarm", self._on_disarm)
        self.create_guarded_service("reset_cell", self._on_reset)
        self._ticker = Ticker(settings.period_ns)

    def start(self) -> None:
        """Begin to tick; the arm stays disarmed."""
        self._halt = threading.Event()
        self._publish_state()
        run = functools.partial(self._run, self._halt)
        self._control_thread = threading.Thread(target=self.guard(run), name="control", daemon=True)
        self._control_thread.start()

    def stop(self, reason: str) -> None:
        """Disarm, publish why, and end the control thread."""
        self._disarm(Stop(StopCode.FAULT if self.faulted else StopCode.SHUTDOWN, reason))
        self._halt.set()
        thread, self._control_thread = self._control_thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(2.0)

    def teardown(self) -> None:
        """Release the arm."""
        core, self.executor_core = self.executor_core, None
        if core is not None:
            core.close()

    @property
    def _core(self) -> ArmExecutor:
        core = self.executor_core
        if core is None:
            raise DriverError("arm_node is not configured")
        return core

    # control thread

    def _run(self, halt: threading.Event) -> None:
        with self._realtime.entered():
            self._ticker_restart()
            while not halt.is_set():
                if self.parameter("rate") == "max" and self._core.armed:
                    self._lockstep(halt)
                else:
                    self._realtime_tick(halt)

    def _realtime_tick(self, halt: threading.Event) -> None:
        ticker = self._ticker
        assert ticker is not None
        ticker.wait(halt)
        if halt.is_set():
            return
        self._control_period()
        ticker.done()

    def _control_period(self) -> None:
        try:
            tick = self._core.tick(time.monotonic_ns())
        except DriverError:
            self._after_stop(self._core.stop)
            raise
        self._publish(tick)
        if tick.stopped is not None:
            self._after_stop(tick.stopped)

    def _lockstep(self, halt: threading.Event) -> None:
        """Advance the cell only on a command that carries its observation's stamp."""
        core, waited_from = self._core, time.monotonic()
        while not core.wait_for_command(LOCKSTEP_POLL_S):
            if halt.is_set() or not core.armed:
                return
            limit = float(self.parameter("lockstep_timeout_s"))
            if time.monotonic() - waited_from > limit:
                self._disarm(Stop(StopCode.COMMAND_TIMEOUT, f"lockstep: no usable command for {limit:g} s"))
                return
        self._control_period()
        self._ticker_restart()

    def _ticker_restart(self) -> None:
        if self._ticker is not None:
            self._ticker.restart()

    def _publish(self, tick: Tick) -> None:
        observation, stamp = tick.observation, tick.stamp_ns
        core = self._core
        if core.armed:  # before the observation, whose reader asks for it
            report = Report(core.episode, stamp, tick.consumed, stamp, tick.buffered, core.starved)
            self._consumption_publisher.publish(consumption_message(report))
        self._pose_publisher.publish(planar_pose_message(stamp, self._frame, observation.agent, self._units))
        self._points_publisher.publish(points_message(stamp, self._frame, observation.keypoints, self._units))
        self._joints_publisher.publish(joint_state_message(stamp, AXES, observation.agent / self._units))
        if self.parameter("rate") == "max":
            self._clock_publisher.publish(Clock(clock=to_time(stamp)))
        if tick.advanced:
            self._publish_judgement(tick)

    def _publish_judgement(self, tick: Tick) -> None:
        o, core = tick.observation, self._core
        values = {
            "episode": core.episode,
            "seed": self._seed,
            "step": o.step,
            "coverage": float(o.coverage),
            "score": float(o.score),
            "done": o.done,
            "starved_ticks": core.starved,
            "missed_ticks": self._ticker.missed if self._ticker else 0,
            "x": float(o.agent[0]),
            "y": float(o.agent[1]),
            "state": " ".join(repr(float(v)) for v in self._cell.state),
            "target": " ".join(repr(float(v)) for v in o.target),
        }
        self._judgement_publisher.publish(status_message(tick.stamp_ns, "cell", 0, "step judged", values))

    def _publish_state(self) -> None:
        core = self._core
        with self._state_lock:  # what is published last is what was true last
            now = core.snapshot()
            armed, stop = now.mode is ArmMode.ARMED, now.stop
            values = {
                "state": now.mode.value,
                "episode": now.episode,
                "code": "" if armed else stop.code.value,
                "reason": "" if armed else stop.text,
                "source": core.lease.holder,
                "seed": self._seed,
                "rate": self.parameter("rate"),
                "step": now.step,
                "missed_ticks": self._ticker.missed if self._ticker else 0,
                "starved_ticks": now.starved,
            }
            text = "armed" if armed else f"disarmed: {stop.text}"
            level = 0 if armed or stop.code.normal else 2
            self._state_publisher.publish(status_message(now.stamp_ns, "arm", level, text, values))

    def _disarm(self, stop: Stop) -> bool:
        core = self.executor_core
        if core is None or not core.disarm(stop):
            return False
        self._after_stop(stop)
        return True

    def _after_stop(self, stop: Stop) -> None:
        self._publish_state()
        self.event(0 if stop.code.normal else 2, f"disarmed: {stop.text}", code=stop.code.value)

    # callbacks

    def _on_chunk(self, message: Any) -> None:
        core = self._core
        text = self._rivals()
        if text:
            if not self._disarm(Stop(StopCode.TWO_PUBLISHERS, text)):
                self.event(2, text, code=StopCode.TWO_PUBLISHERS.value)
            return
        was_armed, episode = core.armed, core.episode
        try:
            actions, period = planar_chunk_actions(message, self._frame, self._units)
        except MessageError as error:
            core.refused["malformed"] += 1
            self.event(2, f"chunk refused: {error}")
            return
        stamp = from_time(message.header.stamp)
        refusal = core.submit("policy", stamp, period or core.settings.period_ns, actions, time.monotonic_ns())
        if was_armed and core.stop.code is StopCode.NOT_FINITE and not core.armed and core.episode == episode:
            self._after_stop(core.stop)
        elif refusal is not None and was_armed:
            self.event(1, f"chunk refused: {refusal.value}", stamp=stamp, refused=sum(core.refused.values()))

    def _rivals(self) -> str:
        """Why commands cannot be trusted to come from one source, or an empty text."""
        topic = self._chunks.topic_name
        if self.count_publishers(topic) < 2:
            return ""
        return f"two publishers on {topic}: a second stack under the same names, or a policy killed less than 10 s ago"

    def _on_arm(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if not self.is_active:
            raise Refused("arm_node is not active")
        rivals = self._rivals()
        if rivals:
            raise Refused(rivals)
        if self._ticker is not None:
            self._ticker.restart()
            self._ticker.count_anew()
        stamp = self.get_clock().now().nanoseconds
        try:
            tick = self._core.arm(stamp, time.monotonic_ns(), lockstep=self.parameter("rate") == "max")
        except ArmRefusedError as error:
            raise Refused(str(error)) from error
        self._publish_state()
        self._publish(tick)
        response.success, response.message = True, f"armed, episode {self._core.episode}"
        return response

    def _on_disarm(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = True
        done = self._disarm(Stop(StopCode.OPERATOR, "disarmed by ~/disarm"))
        response.message = "disarmed" if done else "was not armed"
        return response

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        seed = int(self.parameter("seed"))
        try:
            self._core.reset(seed)
        except ArmRefusedError as error:
            raise Refused(str(error)) from error
        self._seed = seed
        response.success, response.message = True, f"cell reset to seed {self._seed}"
        return response

    def status(self) -> list[Status]:
        """Mode, episode, refusals, starvation and tick health."""
        core = self.executor_core
        if core is None:
            return [Status(1, "arm", "not configured", {})]
        ticker = self._ticker
        values = {
            "mode": core.mode.value,
            "episode": str(core.episode),
            "accepted_chunks": str(core.accepted),
            "starved_ticks": str(core.starved),
            "clamped_actions": str(core.limits.clamped),
            **{f"refused.{k}": str(v) for k, v in core.refused.items()},
            **(ticker.report() if ticker else {}),
            **self._realtime.figures(),
        }
        healthy = core.armed or core.stop.code.normal
        text = "armed" if core.armed else f"disarmed: {core.stop.text}"
        return [Status(0 if healthy else 2, "arm", text, values)]


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``arm_node``."""
    return run_node(ArmNode, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
