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

from dcqfa_ros.drivers.arm_protocol import ArmReadiness, ArmState
from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.rotations import rotation_of
from dcqfa_ros.runtime.arm_activity import Activity, CommandRefusal
from dcqfa_ros.runtime.arm_moves import ArmMoves
from dcqfa_ros.safety.stops import Stop, StopCode
from dcqfa_ros.safety.supervision import Command

Floats = NDArray[np.float64]

_EARLIEST = 0.2  # of a period, at least, from a tick to one that a new command brings forward
_AFTER_EARLY = 1.25  # of a period, to the tick after that: commands at the rate of the loop take the place of ticks
_EARLY_APART = 0.8  # of a period, at least, between two such ticks: a flood of commands does not speed the loop up
_GRIPPER_STEP = 0.02  # smallest change of the opening that is sent on


class ArmStream(ArmMoves):
    """Streamed commands with their deadman, the gripper, and the control thread."""

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

    def submit_gripper(self, source: str, opening: float, now_ns: int) -> CommandRefusal | None:
        """Ask the gripper for an opening, 0 closed .. 1 open."""
        with self._gate:
            refusal = self._admit(source, now_ns, now_ns, 1.0)
            if refusal is None and self._not_finite(np.array([opening]), f"a gripper command from {source!r}"):
                refusal = CommandRefusal.MALFORMED
            elif refusal is None:
                self._move_gripper(float(opening))
            return self._count(refusal)

    def _move_gripper(self, opening: float) -> None:
        opening = min(max(opening, 0.0), 1.0)
        if self._gripper is None or abs(opening - self._gripper) >= _GRIPPER_STEP:
            self._gripper = opening
            try:
                self.driver.move_gripper(opening)
            except (DriverError, ValueError) as error:
                self._fail(Stop(StopCode.DRIVER, f"gripper: {error}"))

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
                asked = time.monotonic_ns()
                soonest = max(last + _EARLIEST * period_ns, last_early + _EARLY_APART * period_ns, asked)
                halt.wait((soonest - asked) / 1e9)
                self.ticker.bring_forward(round(soonest), round(_AFTER_EARLY * period_ns))
            now = time.monotonic_ns()
            if halt.is_set():
                self._beat(self.armed, self.driver.state(), now)  # the silence that follows is no accident
                return
            last, last_early = now, now if early else last_early
            after(self.tick(now), now)
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
