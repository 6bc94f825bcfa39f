"""Arming, stopping and the signals that stop an arm: the part of its control that works under one lock.

A stop is carried out in the thread that finds it, under the lock that every command takes too: after
:meth:`ArmGate.on_wrench` has returned with a stop, nothing of an older command is sent.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers.arm_protocol import (
    ArmReadiness,
    ArmState,
    CartesianArmDriver,
    MotionHandle,
    MotionOutcome,
    MotionResult,
)
from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.runtime.arm_activity import Activity, CommandRefusal, StreamSettings
from dcqfa_ros.runtime.arm_executor import ArmRefusedError
from dcqfa_ros.runtime.chunk_player import ChunkPlayer
from dcqfa_ros.runtime.ticker import Ticker
from dcqfa_ros.safety.lease import CommandLease
from dcqfa_ros.safety.stops import Stop, StopCode
from dcqfa_ros.safety.supervision import Command, SafetyStage, StillStoppedError
from dcqfa_ros.safety.wrench_frames import SensorMount

Floats = NDArray[np.float64]


class Guardian(Protocol):
    """The watchdog, seen from the control thread (:class:`dcqfa_ros.watchdog.client.WatchdogClient`)."""

    def beat(self, armed: bool) -> None:
        """Send a sign of life."""

    def problem(self) -> str | None:
        """Why the watchdog cannot be relied on; None where it can."""


class Unguarded:
    """No watchdog: for arms whose controller cannot be stopped by one."""

    def beat(self, armed: bool) -> None:
        """Nobody listens."""

    def problem(self) -> str | None:
        """Nothing can be wrong."""
        return None


@dataclass(frozen=True, slots=True)
class Listeners:
    """Called from whichever thread finds it; quick, and never raising."""

    stopped: Callable[[Stop], None]
    changed: Callable[[], None]
    moved: Callable[[str, MotionResult], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the arm is with the policy's chunks at one moment; times are monotonic ns, see :class:`ChunkPlayer`."""

    episode: int
    consumed: int
    begun_ns: int
    remaining: int
    starved: int
    next_ns: int | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State at one moment."""

    activity: Activity
    stop: Stop
    latched: bool
    episode: int
    contact: str


class ArmGate:
    """Lease, safety stage, stop latch and watchdog in front of a driver; commands: ``arm_moves`` and ``arm_stream``.

    Attributes:
        refused: number of refused commands by reason.
        sent: twists handed to the driver.
        player: the policy's chunks.
        ticker: of the control thread.
    """

    def __init__(
        self,
        driver: CartesianArmDriver,
        stage: SafetyStage,
        lease: CommandLease,
        settings: StreamSettings,
        mount: SensorMount,
        listeners: Listeners,
        guardian: Guardian | None = None,
    ) -> None:
        """Prepare; the driver is connected by the caller. ``guardian`` None: no watchdog."""
        self.driver, self.stage, self.lease, self.settings = driver, stage, lease, settings
        self._mount, self._listeners = mount, listeners
        self._guardian: Guardian = guardian or Unguarded()
        self.refused: dict[str, int] = dict.fromkeys((r.value for r in CommandRefusal), 0)
        self.sent = 0
        self.episode = 0
        self.player = ChunkPlayer()
        self.ticker = Ticker(round(1e9 / settings.rate))
        self._gate = threading.RLock()
        self._activity = Activity.DISARMED
        self._token = 0  # changes with every arming and every stop: what was begun before is void
        self._command: Command | None = None
        self._gripper: float | None = None
        self._handle: MotionHandle | None = None
        self._move = ("", 0.0, 0)  # kind, speed, begun at
        self._rotation = np.eye(3)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._told_armed = False  # what the watchdog was told last
        self._attention = threading.Event()  # brings the next tick of the control thread forward
        self._rising = threading.Lock()  # held while the arm is being brought up

    # State

    @property
    def armed(self) -> bool:
        """Whether the arm may move."""
        return self._activity is not Activity.DISARMED

    def snapshot(self) -> Snapshot:
        """Activity, last stop, episode and contact, all of one moment."""
        with self._gate:
            guard, latch = self.stage.guard, self.stage.latch
            contact = guard.contact.value if guard is not None else "unknown"
            return Snapshot(self._activity, latch.last, latch.held is not None, self.episode, contact)

    def progress(self) -> Progress:
        """How far the arm is with the policy's chunks, all of one moment: another thread may stop the arm."""
        with self._gate:
            p = self.player
            return Progress(self.episode, p.consumed, p.begun_ns, p.remaining, p.starved, p.next_ns)

    def start(self) -> None:
        """Start the thread that carries out slow requests to the driver."""
        self._jobs = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, args=(self._jobs,), name="arm requests", daemon=True)
        self._worker.start()

    def close(self, stop: Stop) -> None:
        """Disarm with ``stop`` and end the worker; the driver is the caller's to close."""
        self.disarm(stop)
        self._attention.set()
        self._jobs.put(None)
        worker, self._worker = self._worker, None
        if worker is not None and worker is not threading.current_thread():
            worker.join(1.0)  # it may be waiting for the controller, whose connection is closed next

    # Arming

    def arm(self) -> None:
        """Allow motion: nothing moves before the first command.

        Raises:
            ArmRefusedError: already armed, a stop is latched, something the arm relies on is missing, or the driver
                refuses; the message says what to do first.
        """
        state = self.driver.state()
        with self._gate:
            if self.armed:
                raise ArmRefusedError("already armed")
            if self._rising.locked():
                raise ArmRefusedError("the arm is being brought up: try again in some seconds")
            now = time.monotonic_ns()
            cameras = self.lease.holder == "policy"
            problem = self.stage.refusal(state, now, cameras=cameras) or self._guardian.problem()
            if problem:
                raise ArmRefusedError(problem)
            self._forget()
            self._activity = Activity.STARTING
            token = self._token
        problem = ""
        try:
            self.driver.start_streaming()
        except DriverError as error:
            problem = str(error)
        with self._gate:
            if token != self._token:
                self.driver.stop()
                raise ArmRefusedError(f"stopped while it was being armed: {self.stage.latch.last.text}")
            if problem:
                self._activity = Activity.DISARMED
                raise ArmRefusedError(problem)
            self.stage.begin(time.monotonic_ns())
            self.episode += 1
            self._activity = Activity.WAITING

    def disarm(self, stop: Stop) -> bool:
        """Stop at once with ``stop`` as the reason; returns whether the arm was armed."""
        with self._gate:
            was = self.armed
            if was:
                self._halt(stop)
        if was:
            self._listeners.stopped(stop)
        return was

    def operator_stop(self, text: str) -> None:
        """Stop at once and latch, armed or not."""
        stop = Stop(StopCode.OPERATOR_STOP, text)
        with self._gate:
            news = self.armed or self.stage.latch.held is None
            self._halt(stop)
        if news:
            self._listeners.stopped(stop)

    def reset_stop(self, wait_s: float = 1.0) -> Stop | None:
        """Take back the latched stop; the arm stays disarmed. Returns it, None where none was latched.

        Where the controller holds the arm itself (a safe stop, an emergency stop that was released, drives off) it is
        brought up again first, in the worker, because that takes seconds.

        Raises:
            ArmRefusedError: the cause is still there, or bringing the arm up takes longer than ``wait_s``.
        """
        if self.armed:
            raise ArmRefusedError(f"the arm is {self._activity.value}: disarm it, or wait for its end")
        state = self.driver.state()
        if state.readiness not in (ArmReadiness.READY, ArmReadiness.DISCONNECTED):
            self.bring_up(wait_s)
            state = self._ready_state()
        with self._gate:
            try:
                return self.stage.reset(state, time.monotonic_ns())
            except StillStoppedError as error:
                raise ArmRefusedError(str(error)) from error

    def bring_up(self, wait_s: float) -> None:
        """Switch the arm on, in the worker. Nothing moves.

        Raises:
            ArmRefusedError: it failed, or has not come to its end within ``wait_s``: then it goes on.
        """
        if not self._rising.acquire(blocking=False):
            raise ArmRefusedError("the arm is being brought up: try again in some seconds")
        ended, problem = threading.Event(), []

        def work() -> None:
            try:
                self.driver.bring_up()
            except Exception as error:  # noqa: BLE001 - whoever waits is told whatever it was
                problem.append(str(error) or type(error).__name__)
            finally:
                self._rising.release()
                ended.set()
                self._listeners.changed()

        self._jobs.put(work)
        if not ended.wait(wait_s):
            raise ArmRefusedError("the arm is being brought up: try again in some seconds")
        if problem:
            raise ArmRefusedError(problem[0])

    def _ready_state(self) -> ArmState:
        """Return the state, waiting a moment for what a bring-up has changed to arrive."""
        end = time.monotonic() + 0.5
        while (state := self.driver.state()).readiness is not ArmReadiness.READY and time.monotonic() < end:
            time.sleep(0.01)
        return state

    def _forget(self) -> None:
        self._token += 1
        self._command = self._gripper = self._handle = None
        self.player.clear()

    def _halt(self, stop: Stop) -> None:
        """Zero twist, nothing after it, and the latch; the gate is held."""
        retreating, moving = self._activity is Activity.RETREATING, self._activity is Activity.MOVING
        try:
            self.driver.stop()
        finally:  # disarmed and latched, whatever the driver has met
            self._rest()
            self.stage.latch.trip(stop)
        if moving:
            self._listeners.moved(self._move[0], MotionResult(MotionOutcome.CANCELLED, stop.text))
        guard = self.stage.guard
        if guard is None:
            return
        if stop.code is StopCode.FORCE and not retreating and guard.wants_retreat:
            self._activity = Activity.RETREATING
            token = self._token
            self._jobs.put(lambda: self._begin_retreat(token))
        else:
            guard.end_retreat()

    def _rest(self) -> None:
        """The arm was stopped: nothing that was begun before goes on; the gate is held."""
        self._activity = Activity.DISARMED
        self._forget()
        self.stage.rest()

    def _is_current(self, token: int) -> bool:
        """Whether nothing has stopped or armed the arm since ``token`` was taken."""
        with self._gate:
            return token == self._token

    # Signals from outside

    def on_wrench(self, force: Floats, torque: Floats, now_ns: int) -> tuple[Floats, Floats]:
        """Take in a wrench in the sensor's frame; stops the arm before it returns where the guard says so.

        Returns:
            Force (3,) N and torque (3,) N m at the tool centre point in the tool frame.
        """
        tool_force, tool_torque = self._mount.to_tool(force, torque)
        with self._gate:
            rotation = self._rotation
            stop = self.stage.feed_wrench(rotation @ tool_force, rotation @ tool_torque, now_ns)
            was = self.armed
            if stop is not None and was:
                self._halt(stop)
            elif stop is not None and self.stage.guard is not None and self.stage.latch.held is None:
                self.stage.guard.reset()  # touched by hand while disarmed: arming looks at the load again
        if stop is not None and was:
            self._listeners.stopped(stop)
        return tool_force, tool_torque

    def on_camera(self, name: str, now_ns: int) -> None:
        """Note a picture."""
        self.stage.feed_camera(name, now_ns)

    def _fail(self, stop: Stop) -> None:
        self._halt(stop)
        self._listeners.stopped(stop)

    def _work(self, jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (job := jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - a defect must leave neither the arm half-way nor no worker
                self.disarm(Stop(StopCode.FAULT, f"{type(error).__name__}: {error}"))

    def _stream_again(self, token: int, then: Callable[[int], None]) -> None:
        """Worker: let the driver stream, and do ``then`` with the time, unless something has stopped the arm since."""
        if not self._is_current(token):
            return
        problem = ""
        try:
            self.driver.start_streaming()
        except DriverError as error:
            problem = str(error)
        with self._gate:
            if token != self._token:
                self.driver.stop()
            elif problem:
                self._fail(Stop(StopCode.DRIVER, problem))
            else:
                now = time.monotonic_ns()
                self.stage.begin(now)
                then(now)

    def _begin_retreat(self, token: int) -> None:
        """Worker: stream again after a contact stop, to back away."""
        guard = self.stage.guard
        assert guard is not None
        self._stream_again(token, lambda now: guard.begin_retreat(self.driver.state().position, now))
