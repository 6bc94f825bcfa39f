"""Moves that an arm's controller plans itself, a pose or a joint trajectory: admitted, begun, supervised, ended."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers.arm_protocol import ArmState, MotionHandle, MotionOutcome, MotionResult
from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.runtime.arm_activity import Activity, CommandRefusal
from dcqfa_ros.runtime.arm_gate import ArmGate
from dcqfa_ros.safety.stops import Stop, StopCode

Floats = NDArray[np.float64]

_STREAMS = (Activity.WAITING, Activity.STREAMING, Activity.HOLDING)
_AT_REST = 1e-4  # m/s and rad/s, commanded last: the arm stands


class ArmMoves(ArmGate):
    """Moves behind the gate, and what every command is asked before it is taken."""

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

        def resume(_: int) -> None:
            self._handle, self._activity = None, Activity.WAITING

        self._stream_again(token, resume)
        self._listeners.changed()

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
