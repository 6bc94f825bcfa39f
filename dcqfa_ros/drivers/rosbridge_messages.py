"""What the rosbridge client hands out and sends: statistics, calls, frames as JSON, times as ROS 1 writes them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dcqfa_ros.drivers.protocols import DriverError

if TYPE_CHECKING:
    from dcqfa_ros.drivers.rosbridge import RosbridgeClient

Message = dict[str, Any]
OnMessage = Callable[[Message, int], None]
"""Takes a message and the monotonic time of its arrival, ns."""


class ServiceError(DriverError):
    """A service is not there, refused, or did not answer in time; the message names it."""


@dataclass(frozen=True, slots=True)
class RosbridgeStatistics:
    """Counts since the client was made.

    Attributes:
        connections: how often a connection was made.
        losses: how often one was lost, other than by ``close``.
        sent: text frames handed to the socket, over all connections.
        received: messages received.
        superseded: messages dropped because a newer one of their topic overtook them.
        refused: messages refused because the peer took nothing.
        malformed: frames that are no JSON object or lack what their operation needs.
        unknown: frames of an operation or for a topic or call that nobody here waits for.
        callback_errors: callbacks that raised.
        last_complaint: the newest ``status`` text of rosbridge; empty if none.
        round_trip_ms: of the newest ping; NaN before the first.
    """

    connections: int
    losses: int
    sent: int
    received: int
    superseded: int
    refused: int
    malformed: int
    unknown: int
    callback_errors: int
    last_complaint: str
    round_trip_ms: float


@dataclass(slots=True)
class Subscription:
    """A topic that is subscribed to: its type (empty: any), the least time between messages, and who takes them."""

    type: str
    throttle_ms: int
    callbacks: list[OnMessage] = field(default_factory=list)

    def frame(self, topic: str) -> Message:
        """Return the frame that subscribes to ``topic``."""
        frame: Message = {"op": "subscribe", "id": f"subscribe:{topic}", "topic": topic}
        if self.type:
            frame["type"] = self.type
        if self.throttle_ms:
            frame["throttle_rate"] = self.throttle_ms
        return frame


def advertise_frame(topic: str, type_: str) -> Message:
    """Return the frame that announces messages of ``type_`` on ``topic``."""
    return {"op": "advertise", "id": f"advertise:{topic}", "topic": topic, "type": type_}


class PendingCall:
    """A service call under way."""

    def __init__(self, client: RosbridgeClient, identity: str, service: str) -> None:
        """Name the call that ``client`` is about to send."""
        self._client, self._identity, self.service = client, identity, service
        self._done = threading.Event()
        self._values: Message | None = None
        self._error = ""

    def wait(self, timeout_s: float) -> Message:
        """Wait for the response and return its values.

        Raises:
            ServiceError: the service is unknown, failed, did not answer in time, or the connection was lost.
        """
        self._client.check_thread(f"service {self.service}")
        if not self._done.wait(timeout_s):
            self._client.forget(self._identity)
            raise ServiceError(f"{self._client.name}: service {self.service} did not answer within {timeout_s:g} s")
        if self._values is None:
            raise ServiceError(f"{self._client.name}: service {self.service}: {self._error}")
        return self._values

    def resolve(self, values: Message | None, error: str = "") -> None:
        """Set the outcome (for the client)."""
        self._values, self._error = values, error
        self._done.set()


def encode(message: Mapping[str, Any]) -> bytes:
    """Return ``message`` as JSON.

    Raises:
        ValueError: it holds NaN, an infinity, or something that is not JSON.
    """
    try:
        return json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def seconds_to_ros(seconds: float) -> dict[str, int]:
    """Return a time or duration as ROS 1 writes it: ``secs`` and ``nsecs``."""
    whole, part = divmod(round(seconds * 1e9), 1_000_000_000)
    return {"secs": whole, "nsecs": part}


def ros_now() -> dict[str, int]:
    """Return the wall-clock time as a ROS 1 stamp."""
    return seconds_to_ros(time.time())
