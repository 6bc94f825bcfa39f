"""Actions of the Inovo controller: goal, cancel, status, feedback and result as plain topics."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from typing import Any

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.arm_protocol import MotionOutcome, MotionResult
from dcqfa_ros.drivers.rosbridge import LinkError, RosbridgeClient
from dcqfa_ros.drivers.rosbridge_link import WebSocketLink

STATUS_TIMEOUT_S = 3.0
_RESULT_GRACE_S = 1.0  # after a final status, in which the result should come

_PREEMPTED, _SUCCEEDED, _ABORTED, _REJECTED, _RECALLED, _LOST = 2, 3, 4, 5, 8, 9
_OUTCOMES = {
    _PREEMPTED: MotionOutcome.CANCELLED,
    _SUCCEEDED: MotionOutcome.SUCCEEDED,
    _ABORTED: MotionOutcome.REJECTED,
    _REJECTED: MotionOutcome.REJECTED,
    _RECALLED: MotionOutcome.CANCELLED,
    _LOST: MotionOutcome.LOST,
}


class InovoMove:
    """A goal under way (a ``MotionHandle``)."""

    def __init__(self, action: InovoAction, identity: str) -> None:
        """Start the goal's clock."""
        self._action, self.identity = action, identity
        self._ended = threading.Event()
        self._result: MotionResult | None = None
        self._lock = threading.Lock()
        self._status_s = time.monotonic()
        self._final: tuple[int, str, float] | None = None
        self._why = ""
        self.feedback: dict[str, Any] = {}

    def done(self) -> bool:
        """Whether the move has ended."""
        self._check()
        return self._ended.is_set()

    def result(self, timeout_s: float | None = None) -> MotionResult:
        """Wait for the end.

        Raises:
            TimeoutError: it has not ended within ``timeout_s`` seconds; the move goes on.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.done():
            left = 0.1 if deadline is None else min(0.1, deadline - time.monotonic())
            if left <= 0.0:
                raise TimeoutError(f"{self._action.name}: the move has not ended within {timeout_s:g} s; it goes on")
            self._ended.wait(left)
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Ask the controller to end the move. Does not wait."""
        if not self._ended.is_set():
            self._action.cancel(self.identity)

    def will_be_cancelled(self, why: str) -> None:
        """Say so whatever comes first, the controller's word or ours (for the action)."""
        self._why = why

    def end(self, outcome: MotionOutcome, message: str) -> None:
        """Set the outcome, unless there is one (for the action)."""
        if outcome is MotionOutcome.CANCELLED:
            message = self._why or message
        with self._lock:
            if self._result is None:
                self._result = MotionResult(outcome, message)
        self._ended.set()
        self._action.forget(self.identity)

    def on_status(self, status: int, text: str) -> None:
        """Take what the controller says of this goal (for the action)."""
        self._status_s = time.monotonic()
        if status in _OUTCOMES and self._final is None:
            self._final = (status, text, self._status_s)

    def on_result(self, status: int, text: str, values: dict[str, Any]) -> None:
        """Take the controller's result (for the action)."""
        outcome = _OUTCOMES.get(status, MotionOutcome.REJECTED)
        message = str(values.get("message") or values.get("error_string") or text)
        failed = values.get("success") is False or values.get("error_code", 0) != 0
        if outcome is MotionOutcome.SUCCEEDED and failed:
            outcome = MotionOutcome.REJECTED
        self.end(outcome, message)

    def _check(self) -> None:
        if self._ended.is_set():
            return
        now = time.monotonic()
        if self._final is not None and now - self._final[2] > _RESULT_GRACE_S:
            self.end(_OUTCOMES[self._final[0]], self._final[1] or "ended without a result message")
        elif now - self._status_s > STATUS_TIMEOUT_S:
            self.cancel()
            self.end(
                MotionOutcome.TIMED_OUT,
                f"{self._action.name}: no status of the goal for {STATUS_TIMEOUT_S:g} s; it was cancelled",
            )


class InovoAction:
    """One action of the controller. Goals are tied to the connection they were sent on."""

    def __init__(self, client: RosbridgeClient, name: str, goal_type: str) -> None:
        """Name the action; nothing is sent yet."""
        self.name = name
        self._client = client
        self._goal_type = goal_type
        self._prefix = f"dcqfa_{uuid.uuid4().hex[:8]}"
        self._ids = itertools.count(1)
        self._moves: dict[str, InovoMove] = {}
        self._lock = threading.Lock()
        self.malformed = 0

    def prepare(self) -> None:
        """Announce and subscribe to the action's topics."""
        self._client.advertise(f"{self.name}/goal", self._goal_type)
        self._client.advertise(f"{self.name}/cancel", m.CANCEL_TYPE)
        package = self._goal_type.removesuffix("Goal")
        self._client.subscribe(f"{self.name}/status", self._on_status, type=m.STATUS_TYPE)
        self._client.subscribe(f"{self.name}/result", self._on_result, type=f"{package}Result")
        self._client.subscribe(f"{self.name}/feedback", self._on_feedback, type=f"{package}Feedback", throttle_ms=100)

    def start(self, goal: m.Message, session: WebSocketLink) -> InovoMove:
        """Send a goal.

        Raises:
            LinkError: the connection is another one than ``session``, or lost; nothing was sent.
        """
        move = InovoMove(self, f"{self._prefix}-{next(self._ids)}")
        with self._lock:
            self._moves[move.identity] = move
        try:
            self._client.publish(f"{self.name}/goal", m.action_goal(move.identity, goal), session=session)
        except (LinkError, ValueError):
            self.forget(move.identity)
            raise
        return move

    def cancel(self, identity: str = "") -> None:
        """Cancel a goal, or all; does nothing where the connection is lost, which ends them here anyway."""
        try:
            self._client.discard(f"{self.name}/goal")
            self._client.publish(f"{self.name}/cancel", m.action_cancel(identity), urgent=True)
        except LinkError:
            return

    def cancel_all(self, why: str) -> None:
        """Cancel every move, on the controller first, then here."""
        for move in self._running():
            move.will_be_cancelled(why)
        self.cancel()
        self.end_all(MotionOutcome.CANCELLED, why)

    def end_all(self, outcome: MotionOutcome, message: str) -> None:
        """End every move here, whatever the controller does."""
        for move in self._running():
            move.end(outcome, message)

    @property
    def is_busy(self) -> bool:
        """Whether a move is under way."""
        return bool(self._running())

    def forget(self, identity: str) -> None:
        """Drop an ended move (for :class:`InovoMove`)."""
        with self._lock:
            self._moves.pop(identity, None)

    def _running(self) -> list[InovoMove]:
        with self._lock:
            return list(self._moves.values())

    def _find(self, status: m.Message) -> tuple[InovoMove | None, int, str]:
        identity = m.field(m.field(status, "goal_id", dict), "id", str)
        with self._lock:
            move = self._moves.get(identity)
        return move, m.field(status, "status", int), str(status.get("text", ""))

    def _on_status(self, message: m.Message, _: int) -> None:
        try:
            for entry in m.field(message, "status_list", list):
                move, status, text = self._find(entry)
                if move is not None:
                    move.on_status(status, text)
        except m.MessageError:
            self.malformed += 1

    def _on_result(self, message: m.Message, _: int) -> None:
        try:
            move, status, text = self._find(m.field(message, "status", dict))
            values = m.field(message, "result", dict)
        except m.MessageError:
            self.malformed += 1
            return
        if move is not None:
            move.on_result(status, text, values)

    def _on_feedback(self, message: m.Message, _: int) -> None:
        try:
            move, _status, _text = self._find(m.field(message, "status", dict))
            values = m.field(message, "feedback", dict)
        except m.MessageError:
            self.malformed += 1
            return
        if move is not None:
            move.feedback = values
