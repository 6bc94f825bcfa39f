"""A client of rosbridge (protocol version 2) over WebSocket: topics, services, loss and reconnection.

rosbridge gives JSON access to a ROS 1 graph: ``{"op": "subscribe", "topic": ...}`` and so on. This client can be
connected and closed any number of times. After a loss it reconnects by itself and renews subscriptions and
advertisements, but never what was published: a caller ties a command to a connection by its ``session``, and a command
of an earlier connection is refused.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.drivers.rosbridge_handshake import open_link
from dcqfa_ros.drivers.rosbridge_link import LinkBusyError, LinkError, WebSocketLink
from dcqfa_ros.drivers.rosbridge_messages import (
    Message,
    OnMessage,
    PendingCall,
    RosbridgeStatistics,
    ServiceError,
    Subscription,
    advertise_frame,
    encode,
)

__all__ = [
    "LinkBusyError",
    "LinkError",
    "PendingCall",
    "RosbridgeClient",
    "RosbridgeStatistics",
    "ServiceError",
    "encode",
]


class RosbridgeClient:
    """A rosbridge connection with its own threads.

    ``publish`` and ``start_call`` may be called from any thread and never wait for the network. Callbacks run in the
    thread that reads: they are short, and they never wait for a service.
    """

    def __init__(
        self,
        host: str,
        port: int = 9090,
        *,
        name: str = "rosbridge",
        open_timeout_s: float = 3.0,
        ping_interval_s: float = 0.5,
        ping_timeout_s: float = 2.0,
        reconnect: bool = True,
        reconnect_delay_s: float = 0.1,
        reconnect_limit_s: float = 1.0,
        on_connected: Callable[[WebSocketLink], None] | None = None,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare a client; nothing is sent yet.

        Args:
            host: name or address of the controller.
            port: rosbridge's port.
            name: of the peer, for messages.
            open_timeout_s: for connection and handshake.
            ping_interval_s: between pings.
            ping_timeout_s: without answer to a ping, after which the connection counts as lost.
            reconnect: whether to connect again after a loss.
            reconnect_delay_s: wait before the first attempt; it doubles up to ``reconnect_limit_s``.
            reconnect_limit_s: longest wait between two attempts.
            on_connected: called with the session in the reconnecting thread (or in ``connect``) once subscriptions and
                advertisements are renewed.
            on_lost: called with the reason when a connection is lost, not when it is closed.
        """
        self.host, self.port, self.name = host, port, name
        self._open_timeout_s = open_timeout_s
        self._ping = {"ping_interval_s": ping_interval_s, "ping_timeout_s": ping_timeout_s}
        self._reconnect, self._delay_s, self._delay_limit_s = reconnect, reconnect_delay_s, reconnect_limit_s
        self._on_connected, self._on_lost = on_connected, on_lost
        self._lock = threading.RLock()
        self._link: WebSocketLink | None = None
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._supervisor: threading.Thread | None = None
        self._subscriptions: dict[str, Subscription] = {}
        self._advertised: dict[str, str] = {}
        self._calls: dict[str, PendingCall] = {}
        self._ids = itertools.count(1)
        self._counts = dict.fromkeys(("connections", "losses", "malformed", "unknown"), 0)
        self._past = dict.fromkeys(("sent", "received", "superseded", "refused", "callback_errors"), 0)
        self._complaint = ""
        self._reason = "not connected"

    @property
    def session(self) -> WebSocketLink | None:
        """The connection of this moment, None while there is none; a token for ``publish``."""
        link = self._link
        return link if link is not None and link.is_open else None

    @property
    def is_connected(self) -> bool:
        """Whether messages can be sent."""
        return self.session is not None

    @property
    def loss_reason(self) -> str:
        """Why there is no connection, for people; empty while there is one."""
        return "" if self.is_connected else self._reason

    @property
    def statistics(self) -> RosbridgeStatistics:
        """Counts over all connections so far."""
        with self._lock:
            counts = dict(self._past)
            link = self._link
            if link is not None:
                for key in counts:
                    counts[key] += getattr(link.counts, key)
            trip = float("nan") if link is None else link.round_trip_s * 1000
            return RosbridgeStatistics(**self._counts, **counts, last_complaint=self._complaint, round_trip_ms=trip)

    def connect(self) -> None:
        """Connect, renew subscriptions and advertisements, and watch the connection. Does nothing when connected.

        Raises:
            LinkError: the peer cannot be reached or does not speak WebSocket; the message says why.
        """
        if self.is_connected:
            return
        self.close()
        self._closing.clear()
        self._lost.clear()
        self._open()
        self._supervisor = threading.Thread(target=self._supervise, name=f"{self.name} supervisor", daemon=True)
        self._supervisor.start()

    def close(self) -> None:
        """Send what waits, close, and end the threads. Safe at any time and more than once; ``connect`` works again."""
        self._closing.set()
        self._lost.set()
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None and supervisor is not threading.current_thread():
            supervisor.join()
        link = self._link
        if link is not None:
            link.close()
            self._retire(link)
        self._reason = "not connected"
        self._fail_calls("the connection was closed")

    def subscribe(self, topic: str, callback: OnMessage, *, type: str = "", throttle_ms: int = 0) -> None:  # noqa: A002
        """Call ``callback(message, arrival_ns)`` for every message of ``topic``, over reconnections too.

        Raises:
            LinkError: the connection has just been lost; the subscription stands all the same.
        """
        with self._lock:
            entry = self._subscriptions.get(topic)
            if entry is not None:
                entry.callbacks.append(callback)
                return
            self._subscriptions[topic] = entry = Subscription(type, throttle_ms, [callback])
        self._send_if_connected(entry.frame(topic))

    def unsubscribe(self, topic: str) -> None:
        """Forget all callbacks of ``topic``."""
        with self._lock:
            known = self._subscriptions.pop(topic, None)
        if known is not None:
            self._send_if_connected({"op": "unsubscribe", "id": f"subscribe:{topic}", "topic": topic})

    def advertise(self, topic: str, type: str) -> None:  # noqa: A002 - rosbridge's name of the field
        """Announce messages of ``type`` on ``topic``, over reconnections too.

        Raises:
            LinkError: the connection has just been lost; the announcement stands all the same.
        """
        with self._lock:
            self._advertised[topic] = type
        self._send_if_connected(advertise_frame(topic, type))

    def unadvertise(self, topic: str) -> None:
        """Withdraw an announcement."""
        with self._lock:
            known = self._advertised.pop(topic, None)
        if known is not None:
            self._send_if_connected({"op": "unadvertise", "id": f"advertise:{topic}", "topic": topic})

    def publish(
        self,
        topic: str,
        message: Mapping[str, Any],
        *,
        session: WebSocketLink | None = None,
        latest: bool = False,
        urgent: bool = False,
    ) -> int:
        """Send a message at once, or queue it where the network takes nothing; returns the monotonic time, ns.

        Args:
            topic: absolute name.
            message: plain values.
            session: the connection it belongs to; on any other it is refused. None: the one of this moment.
            latest: messages of the topic that still wait are dropped in favour of this one.
            urgent: as ``latest``, and it overtakes everything that waits.

        Raises:
            ValueError: the message holds NaN or an infinity; nothing was sent.
            LinkError: there is no connection, or another one than ``session``.
            LinkBusyError: the peer takes nothing and the queue is full.
        """
        frame = encode({"op": "publish", "topic": topic, "msg": message})
        return self._present(session).send(frame, key=topic, latest=latest, urgent=urgent)

    def discard(self, topic: str) -> None:
        """Drop messages of ``topic`` that still wait."""
        link = self.session
        if link is not None:
            link.discard(topic)

    def start_call(
        self, service: str, arguments: Mapping[str, Any] | None = None, *, urgent: bool = False
    ) -> PendingCall:
        """Send a service request without waiting for its response.

        Raises:
            LinkError: there is no connection.
        """
        identity = f"call_service:{service}:{next(self._ids)}"
        call = PendingCall(self, identity, service)
        frame = encode({"op": "call_service", "id": identity, "service": service, "args": dict(arguments or {})})
        link = self._present(None)
        with self._lock:
            self._calls[identity] = call
        try:
            link.send(frame, key=identity, urgent=urgent)
        except LinkError:
            self.forget(identity)
            raise
        return call

    def call_service(self, service: str, arguments: Mapping[str, Any] | None = None, timeout_s: float = 2.0) -> Message:
        """Call a service and return the values of its response.

        Raises:
            ServiceError: it is unknown, failed, or did not answer within ``timeout_s``.
            LinkError: there is no connection.
        """
        self.check_thread(f"service {service}")
        return self.start_call(service, arguments).wait(timeout_s)

    def check_thread(self, what: str) -> None:
        """Refuse to wait in the thread that reads: nothing would ever arrive.

        Raises:
            RuntimeError: called from a callback.
        """
        link = self._link
        if link is not None and link.is_reader_thread():
            raise RuntimeError(f"{self.name}: {what} must not be waited for in a callback")

    def forget(self, identity: str) -> None:
        """Drop a pending call (for :class:`PendingCall`)."""
        with self._lock:
            self._calls.pop(identity, None)

    def _present(self, session: WebSocketLink | None) -> WebSocketLink:
        link = self._link
        if link is None or not link.is_open:
            raise LinkError(f"{self.name}: no connection: {self._reason}")
        if session is not None and session is not link:
            raise LinkError(f"{self.name}: the connection was lost and made anew meanwhile; start again")
        return link

    def _send_if_connected(self, frame: Message) -> None:
        link = self.session
        if link is not None:
            link.send(encode(frame))

    def _open(self) -> None:
        link = open_link(
            self.host, self.port, timeout_s=self._open_timeout_s, name=self.name,
            on_text=self._on_text, on_end=self._on_end, **self._ping,
        )  # fmt: skip
        with self._lock:
            frames = [advertise_frame(topic, type_) for topic, type_ in self._advertised.items()]
            frames += [entry.frame(topic) for topic, entry in self._subscriptions.items()]
            self._counts["connections"] += 1
            self._link = link
        for frame in frames:
            link.send(encode(frame))
        if self._on_connected is not None:
            self._on_connected(link)

    def _supervise(self) -> None:
        """Wait for a loss; then connect again, more patiently each time."""
        while not self._closing.is_set():
            self._lost.wait()
            self._lost.clear()  # before the link is looked at: what is lost from here on sets it again
            delay = self._delay_s
            while not self._closing.is_set():
                link = self._link
                if link is not None and link.is_open:
                    break
                if not self._reconnect or self._closing.wait(delay):
                    return
                delay = min(2 * delay, self._delay_limit_s)
                try:
                    self._open()
                except DriverError as error:
                    self._reason = str(error)
                    if self._link is not None:
                        self._link.abort("renewing subscriptions failed")

    def _on_end(self, reason: str) -> None:
        self._reason = reason
        self._fail_calls(f"the connection was lost: {reason}")
        link = self._link
        if link is not None and not link.is_open:  # one that is open was made after the one that has ended
            self._retire(link)
        if self._closing.is_set():
            return
        with self._lock:
            self._counts["losses"] += 1
        try:
            if self._on_lost is not None:
                self._on_lost(reason)
        finally:
            self._lost.set()

    def _retire(self, link: WebSocketLink) -> None:
        """Add a link's counts to those of the past, once."""
        with self._lock:
            if self._link is not link:
                return
            self._link = None
            for key in self._past:
                self._past[key] += getattr(link.counts, key)

    def _fail_calls(self, reason: str) -> None:
        with self._lock:
            calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            call.resolve(None, reason)

    def _on_text(self, text: str | bytes, arrival_ns: int) -> None:
        try:
            frame = json.loads(text)
            handler = {"publish": self._on_publish, "service_response": self._on_response, "status": self._on_status}[
                frame["op"]
            ]
        except (ValueError, RecursionError, TypeError):  # UnicodeDecodeError is a ValueError
            self._counts["malformed"] += 1
            return
        except KeyError:
            self._counts["unknown" if isinstance(frame, dict) and "op" in frame else "malformed"] += 1
            return
        handler(frame, arrival_ns)

    def _on_publish(self, frame: Message, arrival_ns: int) -> None:
        topic, message = frame.get("topic"), frame.get("msg")
        if not isinstance(topic, str) or not isinstance(message, dict):
            self._counts["malformed"] += 1
            return
        entry = self._subscriptions.get(topic)
        if entry is None:
            self._counts["unknown"] += 1
            return
        for callback in list(entry.callbacks):
            callback(message, arrival_ns)

    def _on_response(self, frame: Message, _: int) -> None:
        identity, values, result = frame.get("id"), frame.get("values"), frame.get("result", True)
        if not isinstance(identity, str) or not isinstance(result, bool):
            self._counts["malformed"] += 1
            return
        with self._lock:
            call = self._calls.pop(identity, None)
        if call is None:
            self._counts["unknown"] += 1
        elif result and isinstance(values, dict):
            call.resolve(values)
        else:
            call.resolve(None, f"failed: {values}" if not result else f"answered with no fields: {values!r}")

    def _on_status(self, frame: Message, _: int) -> None:
        self._complaint = f"{frame.get('level', '')}: {frame.get('msg', '')}"[:500]
