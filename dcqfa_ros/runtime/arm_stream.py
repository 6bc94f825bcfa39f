"""Control loop of a six-axis arm, without ROS: what ``arm_node`` of a cell with an arm wraps.

Commands of one source at a time (policy chunks, twists, poses, joint trajectories) pass the safety stage and reach the
driver from one thread at a fixed rate.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers.arm_protocol import (
    ArmReadiness,
    ArmState,
    MotionHandle,
    MotionOutcome,
    MotionResult,
)
from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.rotations import rotation_of
from dcqfa_ros.runtime.arm_activity import Activity, CommandRefusal
from dcqfa_ros.runtime.arm_gate import ArmGate
from dcqfa_ros.safety.stops import Stop, StopCode
from dcqfa_ros.safety.supervision import Command

Floats = NDArray[np.float64]

_STREAMS = (Activity.WAITING, Activity.STREAMING, Activity.HOLDING)
_EARLIEST = 0.2  # of a period, at least, from a tick to one that a new command brings forward
_AFTER_EARLY = 1.25  # of a period, to the tick after that: commands at the rate of the loop take the place of ticks
_EARLY_APART = 0.8  # of a period, at least, between two such ticks: a flood of commands does not speed the loop up
_AT_REST = 1e-4  # m/s and rad/s, commanded last: the arm stands
_GRIPPER_STEP = 0.02  # smallest change of the opening that is sent on


class ArmStream(ArmGate):
    """Sources and deadman behind the gate, and the control thread."""

    # Commands

    def submit_chunk(
        self, source: str, observed_ns: int, period_ns: int, twists: Floats, now_ns: int
    ) -> CommandRefusal | None:
        """Offer a chunk of twists (n, 6) in ``world``; a single action may have ``period_ns`` 0."""
        with self._gate:
            refusal = self._admit(source, observed_ns, now_ns, self.stage.ages.observation)
            if refusal is None and self._not_finite(twists, f"a chunk from {source!r}"):
                refusal = CommandRefusal.MALFORMED
            elif refusal is None:
                period = period_ns or self.ticker.period_ns
                if self.player.offer(observed_ns, period, np.asarray(twists, np.float64), now_ns) is not None:
                    refusal = CommandRefusal.CONSUMED
                else:
                    if self._activity is not Activity.STREAMING:
                        self._attention.set()
                    self._activity = Activity.STREAMING
            return self._count(refusal)

    def submit_gripper_chunk(
        self, source: str, observed_ns: int, openings: Floats, now_ns: int
    ) -> CommandRefusal | None:
        """Offer the gripper's part (n,) of a chunk, 0 closed .. 1 open."""
        with self._gate:
            refusal = self._admit(source, observed_ns, now_ns, self.stage.ages.observation)
            if refusal is None and self._not_finite(openings, f"a gripper chunk from {source!r}"):
                refusal = CommandRefusal.MALFORMED
            elif refusal is None:
                self.player.offer_gripper(observed_ns, np.clip(openings, 0.0, 1.0))
            return self._count(refusal)

    def submit_twist(
        self, source: str, twist: Floats, stamp_ns: int, now_ns: int, *, in_tool: bool = False
    ) -> CommandRefusal | None:
        """Take a wanted twist (6,), in ``world`` or in the tool frame; it is followed until the next or the deadman."""
        with self._gate:
            refusal = self._admit(source, stamp_ns, now_ns, self.settings.hold_after_s)
            if refusal is None and self._not_finite(twist, f"a twist from {source!r}"):
                refusal = CommandRefusal.MALFORMED
            elif refusal is None:
                turned = np.asarray(twist, np.float64)
                if in_tool:
                    turned = np.concatenate([self._rotation @ turned[:3], self._rotation @ turned[3:]])
                self._command = Command(turned, min(stamp_ns, now_ns))
                self._activity = Activity.STREAMING
                self._attention.set()
            return self._count(refusal)

    def submit_pose(
        self, source: str, position: Floats, orientation: Floats, stamp_ns: int, now_ns: int
    ) -> tuple[CommandRefusal | None, str]:
        """Start a straight move to a pose in ``world``; returns a refusal and its reason in words."""
        limits, settings = self.stage.limiter.limits, self.settings
        speed = min(settings.pose_speed, limits.linear_speed)
        angular_speed = min(settings.pose_angular_speed, limits.angular_speed)
        return self._submit_move(
            source, "pose", np.concatenate([position, orientation]), stamp_ns, now_ns, speed,
            lambda state: self.stage.refuse_pose(position, orientation, state),
            lambda since: self.driver.move_to_pose(
                position, orientation, speed=speed, angular_speed=angular_speed, since=since
            ),
        )  # fmt: skip

    def submit_joints(
        self, source: str, times_s: Floats, positions: Floats, stamp_ns: int, now_ns: int
    ) -> tuple[CommandRefusal | None, str]:
        """Start following joint positions (n, 6) rad at ``times_s`` (n,); returns a refusal and its reason in words."""
        limit_s = self.settings.move_timeout_s

        def refuse(state: ArmState) -> str | None:
            if len(times_s) and float(np.max(times_s)) > limit_s:
                return f"it takes {float(np.max(times_s)):.1f} s, move_timeout_s is {limit_s:g}"
            return self.stage.refuse_joints(times_s, positions, state)

        return self._submit_move(
            source, "joint_trajectory", np.concatenate([np.ravel(times_s), np.ravel(positions)]), stamp_ns, now_ns,
            None, refuse, lambda since: self.driver.follow_joints(times_s, positions, since=since),
        )  # fmt: skip

    def submit_gripper(self, source: str, opening: float, now_ns: int) -> CommandRefusal | None:
        """Ask the gripper for an opening, 0 closed .. 1 open."""
        with self._gate:
            refusal = self._admit(source, now_ns, now_ns, 1.0)
            if refusal is None and self._not_finite(np.array([opening]), f"a gripper command from {source!r}"):
                refusal = CommandRefusal.MALFORMED
            elif refusal is None:
                self._move_gripper(float(opening))
            return self._count(refusal)

    def _admit(self, source: str, stamp_ns: int, now_ns: int, maximum_age_s: float) -> CommandRefusal | None:
        if not self.lease.admits(source):
            return CommandRefusal.SOURCE
        if not self.armed:
            return CommandRefusal.DISARMED
        if self._activity not in _STREAMS:
            return CommandRefusal.BUSY
        if now_ns - stamp_ns > maximum_age_s * 1e9:
            return CommandRefusal.OLD
        return CommandRefusal.FUTURE if stamp_ns - now_ns > self.settings.future_s * 1e9 else None

    def _count(self, refusal: CommandRefusal | None) -> CommandRefusal | None:
        if refusal is not None:
            self.refused[refusal.value] += 1
        return refusal

    def _not_finite(self, values: Floats, what: str) -> bool:
        """Stop where a command holds NaN or infinity: whoever sent it must not go on."""
        if np.isfinite(values).all():
            return False
        stop = Stop(StopCode.NOT_FINITE, f"{what} holds NaN or infinity")
        self._halt(stop)
        self._listeners.stopped(stop)
        return True

    def _move_gripper(self, opening: float) -> None:
        opening = min(max(opening, 0.0), 1.0)
        if self._gripper is None or abs(opening - self._gripper) >= _GRIPPER_STEP:
            self._gripper = opening
            try:
                self.driver.move_gripper(opening)
            except (DriverError, ValueError) as error:
                self._fail(Stop(StopCode.DRIVER, f"gripper: {error}"))

    # Moves of the controller's own

    def _submit_move(
        self,
        source: str,
        kind: str,
        goal: Floats,
        stamp_ns: int,
        now_ns: int,
        speed: float | None,
        refuse: Callable[[ArmState], str | None],
        begin: Callable[[int], MotionHandle],
    ) -> tuple[CommandRefusal | None, str]:
        with self._gate:
            refusal, text = self._admit(source, stamp_ns, now_ns, self.settings.stop_after_s), ""
            if refusal is None and self._not_finite(goal, f"a {kind} from {source!r}"):
                refusal, text = CommandRefusal.MALFORMED, "NaN or infinity"
            elif refusal is None:
                refusal, text = self._unless_at_rest()
            token, since = self._token, self.driver.stops
        if refusal is None:  # outside the gate: a long path takes a while to examine, and a contact must not wait
            text = refuse(self.driver.state()) or ""
            refusal = CommandRefusal.LIMITS if text else None
        with self._gate:
            if refusal is None and token != self._token:
                refusal, text = CommandRefusal.DISARMED, "stopped meanwhile"
            elif refusal is None:
                refusal, text = self._unless_at_rest()
            if refusal is None:
                self._activity = Activity.STARTING
                self._command = None
                self.player.clear()  # what is left of a chunk must not go on after the move
                self._move = (kind, speed if speed is not None else float("inf"), now_ns)
                self._jobs.put(lambda: self._begin_move(token, lambda: begin(since)))
            return self._count(refusal), text or (refusal.value if refusal else "")

    def _unless_at_rest(self) -> tuple[CommandRefusal | None, str]:
        if any(abs(v) > _AT_REST for v in self.stage.limiter.velocity):
            return CommandRefusal.BUSY, "the arm is moving: bring it to rest first"
        return None, ""

    def _begin_move(self, token: int, begin: Callable[[], MotionHandle]) -> None:
        """Worker: start the move; the driver refuses where something has stopped the arm since it was decided on."""
        try:
            handle = begin()
        except (DriverError, ValueError) as error:
            self._finish_move(token, MotionResult(MotionOutcome.REJECTED, str(error)))
            return
        with self._gate:
            if token == self._token:
                self._handle, self._activity = handle, Activity.MOVING
                self._move = (*self._move[:2], time.monotonic_ns())
            else:
                self.driver.stop()
                self._listeners.moved(self._move[0], MotionResult(MotionOutcome.CANCELLED, self.stage.latch.last.text))
        self._listeners.changed()

    def _finish_move(self, token: int, result: MotionResult) -> None:
        """Worker: report the end of a move and stream again, unless something has stopped the arm."""
        self._listeners.moved(self._move[0], result)
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
                self.stage.begin(time.monotonic_ns())
                self._handle, self._activity = None, Activity.WAITING
        self._listeners.changed()

    def run(self, halt: threading.Event, after: Callable[[ArmState, int], None]) -> None:
        """Control thread: :meth:`tick` at the rate until ``halt``; then ``after`` with the state and its time.

        A new twist is not kept waiting for the next tick: it brings the tick forward, to no less than a fixed share of
        a period after the one before. Whatever this thread meets, it leaves the arm stopped.
        """
        try:
            self._run(halt, after)
        except BaseException as error:
            self.disarm(Stop(StopCode.FAULT, f"the control thread ended: {type(error).__name__}: {error}"))
            raise

    def _run(self, halt: threading.Event, after: Callable[[ArmState, int], None]) -> None:
        self.ticker.restart()
        period_ns = self.ticker.period_ns
        last = last_early = time.monotonic_ns()
        while True:
            self.ticker.wait(self._attention)
            early = self._attention.is_set()
            if early:
                self._attention.clear()
                soonest = max(last + _EARLIEST * period_ns, last_early + _EARLY_APART * period_ns)
                halt.wait(max(0.0, (soonest - time.monotonic_ns()) / 1e9))
                self.ticker.restart(round(_AFTER_EARLY * period_ns))
            now = time.monotonic_ns()
            if halt.is_set():
                self._beat(self.armed, self.driver.state(), now)  # the silence that follows is no accident
                return
            last, last_early = now, now if early else last_early
            after(self.tick(now), now)
            if not early:
                self.ticker.done()

    # Control thread

    def tick(self, now_ns: int) -> ArmState:
        """Run one control period and return the arm's state.

        Raises:
            DriverError: the driver was never connected.
        """
        state = self.driver.state()
        with self._gate:
            if np.isfinite(state.orientation).all():
                self._rotation = rotation_of(state.orientation)
            stop = self._period(state, now_ns)
            if stop is not None:
                self._halt(stop)
            armed = self.armed
        self._beat(armed, state, now_ns)
        if stop is not None:
            self._listeners.stopped(stop)
        return state

    def _beat(self, armed: bool, state: ArmState, now_ns: int) -> None:
        """Send a sign of life.

        An arm that was lost in motion may not have heard that it was stopped, and may go on: then silence makes the
        watchdog, which has a connection of its own, trip the safe stop.
        """
        if armed or not self._told_armed or self.stage.hears(state, now_ns):
            self._guardian.beat(armed)
            self._told_armed = armed

    def _period(self, state: ArmState, now_ns: int) -> Stop | None:
        activity = self._activity
        if activity is Activity.DISARMED:
            return None
        problem = self._guardian.problem()
        if problem is not None:
            return Stop(StopCode.WATCHDOG_LOST, problem)
        if activity is Activity.STARTING:
            lost = state.readiness in (ArmReadiness.DISCONNECTED, ArmReadiness.STOPPED, ArmReadiness.SAFE_STOPPED)
            return self.stage.check(state, now_ns, cameras=False) if lost else None
        if activity is Activity.MOVING:
            return self._supervise(state, now_ns)
        if activity is Activity.RETREATING:
            return self._retreat(state, now_ns)
        return self._stream(state, now_ns)

    def _stream(self, state: ArmState, now_ns: int) -> Stop | None:
        if self._activity is Activity.WAITING:
            return self.stage.check(state, now_ns, cameras=self.lease.holder == "policy")
        command, gripper = self._due(now_ns)
        silence = 0.0
        if self._command is not None:
            silence = (now_ns - self._command.received_ns) / 1e9
            if silence > self.settings.stop_after_s:
                return Stop(StopCode.COMMAND_TIMEOUT, f"no usable command for {silence:.3f} s")
        self._activity = Activity.HOLDING if command is None else Activity.STREAMING
        stop = self._send(self.stage.bound(command, state, now_ns, cameras=self.lease.holder == "policy"))
        if stop is None and gripper is not None:
            self._move_gripper(gripper)
        return stop

    def _due(self, now_ns: int) -> tuple[Command | None, float | None]:
        """Return the command of this period and what the gripper is to begin with it."""
        played = self.player.at(now_ns)
        if played is not None:
            # For the deadman the chunk is a command as long as it has actions; its age is that of its observation.
            self._command = Command(played.twist, now_ns, played.observed_ns)
            return self._command, played.gripper
        if self._command is None or self._command.observed_ns is not None:
            return None, None
        late = now_ns - self._command.received_ns > self.settings.hold_after_s * 1e9
        return (None if late else self._command), None

    def _send(self, bounded: tuple[float, ...] | Stop) -> Stop | None:
        if isinstance(bounded, Stop):
            return bounded
        try:
            self.driver.send_twist(np.array(bounded[:3]), np.array(bounded[3:]))
        except DriverError as error:
            lost = self.driver.state().readiness is ArmReadiness.DISCONNECTED
            return Stop(StopCode.ARM_LOST if lost else StopCode.DRIVER, str(error))
        self.sent += 1
        return None

    def _supervise(self, state: ArmState, now_ns: int) -> Stop | None:
        handle, (_, speed, begun_ns) = self._handle, self._move
        assert handle is not None
        stop = self.stage.supervise_move(state, now_ns, speed)
        if stop is not None:
            return stop
        if handle.done():
            result, token = handle.result(0.0), self._token
            self._activity = Activity.STARTING
            self._jobs.put(lambda: self._finish_move(token, result))
        elif now_ns - begun_ns > self.settings.move_timeout_s * 1e9:
            return Stop(StopCode.DRIVER, f"the move did not end within {self.settings.move_timeout_s:g} s")
        return None

    def _retreat(self, state: ArmState, now_ns: int) -> Stop | None:
        guard = self.stage.guard
        assert guard is not None
        if guard.wants_retreat:  # the worker is still switching the controller
            return self.stage.check(state, now_ns, cameras=False)
        velocity = guard.retreat(state.position, now_ns)
        if velocity is None:
            self.driver.stop()
            self._rest()
            self._listeners.changed()
            return None
        return self._send(self.stage.bound_retreat(velocity, state, now_ns))
