"""An emulated Inovo arm under the control loop, with wrenches, for tests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dcqfa_ros.drivers.arm_protocol import MotionResult
from dcqfa_ros.drivers.inovo import InovoArm
from dcqfa_ros.runtime.arm_activity import StreamSettings
from dcqfa_ros.runtime.arm_executor import ArmRefusedError
from dcqfa_ros.runtime.arm_gate import Listeners
from dcqfa_ros.runtime.arm_stream import ArmStream
from dcqfa_ros.safety.cartesian_limits import MotionLimits, TwistLimiter, Workspace
from dcqfa_ros.safety.force_guard import ForceGuard, ForceLimits
from dcqfa_ros.safety.joint_limits import INOVO_JOINT_SPEEDS, JointLimits
from dcqfa_ros.safety.lease import CommandLease
from dcqfa_ros.safety.stops import Stop, StopCode
from dcqfa_ros.safety.supervision import Ages, SafetyStage
from dcqfa_ros.safety.wrench_frames import SensorMount
from dcqfa_ros.sim.inovo import InovoEmulator, MotionFrame

SOURCES = ("policy", "teleop", "operator")
WAIT_S = 20.0
BOX = Workspace.of([-0.4, 0.2, 0.1], [0.4, 0.6, 0.8])
FORCE = ForceLimits(
    slow_force=15.0,
    slow_force_below=10.0,
    stop_force=30.0,
    stop_force_below=8.0,
    slow_torque=1.5,
    slow_torque_below=1.0,
    stop_torque=3.0,
    stop_torque_below=0.8,
    slow_factor=0.3,
    retreat_distance=0.0,
    retreat_speed=0.02,
)


def wait_for(condition: Callable[[], Any], what: str, timeout: float = WAIT_S) -> Any:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"not within {timeout:g} s: {what}")


class ArmCell:
    """Emulator, driver, safety stage and control loop; use it as a context manager.

    Ages are generous: the machine that runs the tests may be busy.
    """

    def __init__(self, holder: str = "teleop", force: ForceLimits = FORCE, guardian: Any = None, **ages: float) -> None:
        self.emulator = InovoEmulator(ready=True, time_scale=0.05).start()
        self.driver = InovoArm("127.0.0.1", self.emulator.port)
        self.driver.connect()
        limits = MotionLimits(0.1, 1.0, 20.0, 0.5, 4.0, 80.0)
        settings = StreamSettings(
            rate=50.0, hold_after_s=ages.pop("hold", 0.5), stop_after_s=ages.pop("stop", 1.0), future_s=0.1,
            pose_speed=0.1, pose_angular_speed=0.5, move_timeout_s=20.0,
        )  # fmt: skip
        joints = JointLimits(self.driver.kinematics, INOVO_JOINT_SPEEDS, [-6.2] * 6, [6.2] * 6)
        self.stage = SafetyStage(
            TwistLimiter(limits, BOX, 0.02, latency_s=0.05),
            joints,
            ForceGuard(force),
            Ages(**{"state": 0.5, "wrench": 0.5, "camera": 1.0, "command": 1.0, "observation": 1.0, **ages}),
            ["wrist"],
        )
        self.stops: list[Stop] = []
        self.moves: list[tuple[str, MotionResult]] = []
        listeners = Listeners(self.stops.append, lambda: None, lambda kind, result: self.moves.append((kind, result)))
        lease = CommandLease(SOURCES, holder)
        self.stream = ArmStream(self.driver, self.stage, lease, settings, SensorMount(), listeners, guardian)
        self.halt = threading.Event()
        self.force = np.zeros(3)
        self.sensing = threading.Event()
        self.sensing.set()
        self.seeing = threading.Event()
        self.seeing.set()
        self.failures: list[BaseException] = []

    def __enter__(self) -> ArmCell:
        self.stream.start()
        self.threads = [
            threading.Thread(target=self._guarded(lambda: self.stream.run(self.halt, lambda *_: None))),
            threading.Thread(target=self._guarded(self._sense)),
        ]
        for thread in self.threads:
            thread.start()
        wait_for(lambda: self.stage._wrench.seen_ns, "first wrench")
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close(Stop(StopCode.SHUTDOWN, "test over"))
        self.halt.set()
        for thread in self.threads:
            thread.join()
        self.driver.close()
        self.emulator.stop()
        assert not self.failures, self.failures

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - told at the end
                self.failures.append(error)

        return run

    def _sense(self) -> None:
        while not self.halt.wait(0.01):
            if self.sensing.is_set():
                now = time.monotonic_ns()
                self.stream.on_wrench(self.force, np.zeros(3), now)
            if self.seeing.is_set():
                self.stream.on_camera("wrist", time.monotonic_ns())

    def twist(self, *values: float, source: str = "teleop") -> Any:
        now = time.monotonic_ns()
        return self.stream.submit_twist(source, np.array([*values, *([0.0] * (6 - len(values)))]), now, now)

    def move(self, vx: float = 0.05) -> None:
        """Arm, and keep commanding until the arm moves; what a busy machine stops meanwhile is begun again."""

        def moving() -> bool:
            if not self.stream.armed:
                with contextlib.suppress(ArmRefusedError):
                    self.stream.reset_stop()
                    self.stops.clear()
                    self.stream.arm()
                return False
            return self.twist(vx) is None and abs(self.emulator.twist[0]) > min(0.02, 0.8 * abs(vx))

        wait_for(moving, "motion")

    def stopped(self, code: StopCode) -> Stop:
        """Wait for a stop with ``code``, the arm's rest, and check that nothing moves it any more."""
        wait_for(lambda: self.stops, code.value)
        assert self.stops[0].code is code, self.stops
        wait_for(lambda: not self.stream.armed, "disarmed")
        return self.stops[0]

    def motion_after(self, number: int) -> list[MotionFrame]:
        return [frame for frame in self.emulator.frames if frame.number > number and frame.moves]

    @property
    def last(self) -> int:
        frames = self.emulator.frames
        return frames[-1].number if frames else -1
