"""Action servers of an emulated ROS 1 controller: goal, cancel, status, feedback and result as plain topics."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from dcqfa_ros.drivers import inovo_messages as m

ACTIVE, PREEMPTED, SUCCEEDED, ABORTED, REJECTED = 1, 2, 3, 4, 5
_KEEP_S = 5.0  # an ended goal stays in the status for so long

Publish = Callable[[str, m.Message], None]


class EmulatedAction:
    """One action with at most one active goal; a new one preempts it, as with ROS 1's simple action server."""

    def __init__(self, name: str, publish: Publish, *, empty_result: m.Message) -> None:
        """Serve ``name``; ``empty_result`` is the result of a goal that did not succeed."""
        self.name = name
        self._publish, self._empty = publish, empty_result
        self._goals: dict[str, dict[str, Any]] = {}
        self.active: str | None = None
        self._ids = itertools.count(1)

    def accept(self, message: m.Message) -> str:
        """Make the goal of a message the active one; returns its identity."""
        identity = str(message.get("goal_id", {}).get("id") or f"{self.name}-{next(self._ids)}")
        self.end(PREEMPTED, "a newer goal came", self._empty)
        self.active = identity
        self._goals[identity] = {"status": ACTIVE, "text": "", "ended": None}
        self.publish_status()
        return identity

    def reject(self, message: m.Message, text: str) -> None:
        """Refuse the goal of a message."""
        identity = str(message.get("goal_id", {}).get("id") or f"{self.name}-{next(self._ids)}")
        self._finish(identity, REJECTED, text, {**self._empty, "message": text})

    def end(self, status: int, text: str, result: m.Message | None = None) -> None:
        """End the active goal, if there is one."""
        identity, self.active = self.active, None
        if identity is not None:
            self._finish(identity, status, text, self._empty if result is None else result)

    def cancels(self, message: m.Message) -> bool:
        """Return whether a cancel message means the active goal."""
        identity = message.get("id", "")
        return self.active is not None and identity in ("", self.active)

    def publish_status(self) -> None:
        """Publish the status of the active goal and of those that ended lately."""
        now = time.monotonic()
        for identity in [i for i, g in self._goals.items() if g["ended"] is not None and now - g["ended"] > _KEEP_S]:
            del self._goals[identity]
        entries = [self._status(identity) for identity in self._goals]
        self._publish(f"{self.name}/status", {"header": self._header(), "status_list": entries})

    def publish_feedback(self, values: m.Message) -> None:
        """Publish feedback of the active goal."""
        if self.active is not None:
            message = {"header": self._header(), "status": self._status(self.active), "feedback": values}
            self._publish(f"{self.name}/feedback", message)

    def _finish(self, identity: str, status: int, text: str, result: m.Message) -> None:
        self._goals[identity] = {"status": status, "text": text, "ended": time.monotonic()}
        self.publish_status()
        message = {"header": self._header(), "status": self._status(identity), "result": result}
        self._publish(f"{self.name}/result", message)

    def _status(self, identity: str) -> m.Message:
        goal = self._goals[identity]
        return {
            "goal_id": {"stamp": m.ros_now(), "id": identity},
            "status": goal["status"],
            "text": goal["text"],
        }

    @staticmethod
    def _header() -> m.Message:
        return {"stamp": m.ros_now(), "frame_id": ""}
