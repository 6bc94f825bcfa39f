"""A rosbridge server on this host: what an emulated ROS 1 controller is reached through.

It speaks protocol version 2 over real WebSockets, and can behave badly on request: delays and jitter, silent topics,
dropped connections, refused connections, a peer that hangs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.drivers.rosbridge import encode
from dcqfa_ros.drivers.rosbridge_handshake import accept_link, require_websockets
from dcqfa_ros.drivers.rosbridge_link import LinkError, WebSocketLink

Message = dict[str, Any]

_OPERATIONS = ("advertise", "call_service", "publish", "subscribe", "unadvertise", "unsubscribe")
_HANDSHAKE_S = 5.0


class RequestError(ValueError):
    """A client's request cannot be carried out; the text is its answer."""


class RosbridgeGraph(Protocol):
    """The ROS 1 graph behind the server. Both methods run in the thread of the client's connection."""

    def receive(self, topic: str, message: Message, stamp_ns: int) -> None:
        """Take a message published by a client; ``stamp_ns`` is the monotonic time its last byte was read.

        Raises:
            RequestError: the message does not fit the topic's type.
        """

    def serve(self, service: str, arguments: Message) -> Message:
        """Return the response of a service.

        Raises:
            RequestError: there is no such service, or it failed.
        """


@dataclass(slots=True)
class ServerCounts:
    """What clients sent: messages, calls, and what could not be understood."""

    connections: int = 0
    published: int = 0
    calls: int = 0
    malformed: int = 0


@dataclass(slots=True)
class _Subscription:
    throttle_s: float
    last_s: float = float("-inf")
    ids: set[str] = field(default_factory=set)


class RosbridgeServer:
    """A WebSocket server with its own threads, on 127.0.0.1 unless told otherwise."""

    def __init__(self, graph: RosbridgeGraph, *, host: str = "127.0.0.1", port: int = 0, seed: int = 0) -> None:
        """Prepare a server of ``graph``; ``port`` 0 takes a free one, ``seed`` is that of the jitter."""
        self._graph, self._host, self._wanted_port = graph, host, port
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._muted: frozenset[str] = frozenset()
        self._refuse_until_s = 0.0
        self._paused = False
        self._random = random.Random(seed)
        self.latency_s = 0.0
        self.jitter_s = 0.0
        self.counts = ServerCounts()
        self.port = port

    def start(self) -> None:
        """Listen.

        Raises:
            DriverError: the port is taken or not allowed, or the package that answers clients is missing.
        """
        require_websockets()
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._host, self._wanted_port))
            listener.listen(16)
        except (OSError, OverflowError) as error:
            listener.close()
            raise DriverError(
                f"emulated controller: cannot listen on {self._host}:{self._wanted_port}: {error}; "
                "choose another port, or 0 for a free one"
            ) from None
        self._listener, self.port = listener, listener.getsockname()[1]
        self._wanted_port = self.port  # after stop() and start() clients find it again
        self._thread = threading.Thread(target=self._accept, args=(listener,), name="rosbridge listener", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close every connection and stop listening. Safe to call more than once."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            listener.close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.drop_connections()

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        with self._lock:
            return len(self._connections)

    def publish(self, topic: str, message: Message) -> None:
        """Send a message to every client that subscribed to ``topic``, unless it is muted."""
        if topic in self._muted or self._paused:
            return
        with self._lock:
            listening = [connection for connection in self._connections if connection.wants(topic)]
        if listening:
            frame = encode({"op": "publish", "topic": topic, "msg": message})
            for connection in listening:
                connection.send(frame)

    def mute(self, topics: Iterable[str]) -> None:
        """Publish nothing on these topics from now on; an empty list ends it."""
        self._muted = frozenset(topics)

    def pause(self) -> None:
        """Hang: read nothing, answer nothing, publish nothing, but keep the connections."""
        self._paused = True
        self._each(lambda connection: connection.link.pause())

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._paused = False
        self._each(lambda connection: connection.link.resume())

    def drop_connections(self, refuse_for_s: float = 0.0) -> None:
        """Drop every connection without a word, and close new ones at once for ``refuse_for_s``."""
        self._refuse_until_s = time.monotonic() + refuse_for_s
        self._each(lambda connection: connection.link.abort("dropped by the emulator"))

    def delay_s(self) -> float:
        """Return the delay of the next frame, s."""
        return self.latency_s + (self._random.uniform(0.0, self.jitter_s) if self.jitter_s else 0.0)

    def remove(self, connection: _Connection) -> None:
        """Forget an ended connection (for the connection)."""
        with self._lock:
            if connection in self._connections:
                self._connections.remove(connection)

    def handle(self, connection: _Connection, text: str | bytes, stamp_ns: int) -> None:
        """Carry out one frame of a client (for the connection)."""
        frame: Any = None
        try:
            frame = json.loads(text)
            operation = frame.get("op") if isinstance(frame, dict) else None
            if operation is None:
                raise RequestError("a message needs a field 'op'")
            if operation not in _OPERATIONS:
                raise RequestError(f"Unknown operation: {operation}.  Allowed operations: {list(_OPERATIONS)}")
            self._carry_out(connection, operation, frame, stamp_ns)
        except (ValueError, RecursionError, TypeError) as error:  # RequestError is a ValueError
            self.counts.malformed += 1
            identity = frame.get("id") if isinstance(frame, dict) else None
            status = {"op": "status", "level": "error", "msg": str(error)[:500]}
            if isinstance(identity, str):
                status["id"] = identity
            connection.send(encode(status))

    def _carry_out(self, connection: _Connection, operation: str, frame: Message, stamp_ns: int) -> None:
        if operation == "call_service":
            self._call(connection, frame)
            return
        topic = _text(frame, "topic")
        if operation == "publish":
            message = frame.get("msg", {})
            if not isinstance(message, dict):
                raise RequestError(f"publish: {topic}: expected msg to be an object, got {message!r:.80}")
            self.counts.published += 1
            self._graph.receive(topic, message, stamp_ns)
        elif operation == "subscribe":
            rate = frame.get("throttle_rate", 0)
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1e9:
                raise RequestError(f"subscribe: {topic}: expected throttle_rate in ms, got {rate!r:.80}")
            connection.subscribe(topic, rate / 1000.0, str(frame.get("id", "")))
        elif operation == "unsubscribe":
            connection.unsubscribe(topic, str(frame.get("id", "")))
        elif operation == "advertise":
            _text(frame, "type")

    def _call(self, connection: _Connection, frame: Message) -> None:
        service, arguments = _text(frame, "service"), frame.get("args", {})
        self.counts.calls += 1
        answer: Message = {"op": "service_response", "service": service}
        if isinstance(frame.get("id"), str):
            answer["id"] = frame["id"]
        try:
            if not isinstance(arguments, dict):
                raise RequestError(f"expected args to be an object, got {arguments!r:.80}")
            answer |= {"values": self._graph.serve(service, arguments), "result": True}
        except ValueError as error:
            answer |= {"values": str(error)[:500], "result": False}
        connection.send(encode(answer))

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            if time.monotonic() < self._refuse_until_s:
                sock.close()
                continue
            threading.Thread(target=self._welcome, args=(sock,), name="rosbridge welcome", daemon=True).start()

    def _welcome(self, sock: socket.socket) -> None:
        connection = _Connection(self)
        try:
            connection.open(sock)
        except LinkError:
            self.counts.malformed += 1
            return
        with self._lock:
            self._connections.append(connection)
            self.counts.connections += 1
        if not connection.link.is_open:
            self.remove(connection)
        elif self._listener is None or time.monotonic() < self._refuse_until_s:
            connection.link.abort("the server stops")
        elif self._paused:
            connection.link.pause()

    def _each(self, action: Callable[[_Connection], None]) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            action(connection)


class _Connection:
    """One client."""

    def __init__(self, server: RosbridgeServer) -> None:
        self._server = server
        self._subscriptions: dict[str, _Subscription] = {}
        self._inbound = _DelayLine(server)
        self._outbound = _DelayLine(server)
        self._opened = threading.Event()
        self.link: WebSocketLink

    def open(self, sock: socket.socket) -> None:
        self.link = accept_link(
            sock,
            timeout_s=_HANDSHAKE_S,
            name="emulated controller",
            on_text=self._on_text,
            on_end=self._on_end,
            ping_interval_s=float("inf"),
        )
        self._opened.set()

    def send(self, frame: bytes) -> None:
        self._opened.wait(_HANDSHAKE_S)
        self._outbound.put(lambda: self._send(frame))

    def wants(self, topic: str) -> bool:
        entry = self._subscriptions.get(topic)
        if entry is None:
            return False
        now = time.monotonic()
        if now - entry.last_s < entry.throttle_s:
            return False
        entry.last_s = now
        return True

    def subscribe(self, topic: str, throttle_s: float, identity: str) -> None:
        entry = self._subscriptions.setdefault(topic, _Subscription(throttle_s))
        entry.throttle_s = min(entry.throttle_s, throttle_s)
        entry.ids.add(identity)

    def unsubscribe(self, topic: str, identity: str) -> None:
        entry = self._subscriptions.get(topic)
        if entry is not None:
            entry.ids.discard(identity)
            if not identity or not entry.ids:
                self._subscriptions.pop(topic, None)

    def _send(self, frame: bytes) -> None:
        with contextlib.suppress(LinkError):  # gone, or it reads nothing: a slow client loses messages
            self.link.send(frame)

    def _on_text(self, text: str | bytes, arrival_ns: int) -> None:
        self._inbound.put(lambda: self._server.handle(self, text, arrival_ns))

    def _on_end(self, _: str) -> None:
        self._server.remove(self)
        self._inbound.stop()
        self._outbound.stop()


class _DelayLine:
    """Runs actions in their order, each after the server's delay; at once, in the caller's thread, where it is 0."""

    def __init__(self, server: RosbridgeServer) -> None:
        self._server = server
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def put(self, action: Callable[[], None]) -> None:
        delay = self._server.delay_s()
        with self._condition:
            direct = delay <= 0.0 and not self._waiting
            if not direct:
                due = time.monotonic() + delay
                if self._waiting:  # one connection keeps the order of its frames
                    due = max(due, self._waiting[-1][0])
                self._waiting.append((due, action))
                if self._thread is None and not self._stopped:
                    self._thread = threading.Thread(target=self._run, name="rosbridge delay", daemon=True)
                    self._thread.start()
                self._condition.notify()
        if direct:
            action()

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._waiting.clear()
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._stopped and (not self._waiting or self._waiting[0][0] > time.monotonic()):
                    self._condition.wait(self._waiting[0][0] - time.monotonic() if self._waiting else None)
                if self._stopped:
                    return
                action = self._waiting[0][1]
            try:
                action()
            except Exception:  # as where there is no delay: the link counts it, and the connection lives on
                logging.getLogger(__name__).exception("a delayed frame failed")
            with self._condition:
                if self._waiting and self._waiting[0][1] is action:
                    self._waiting.popleft()


def _text(frame: Message, name: str) -> str:
    value = frame.get(name)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{frame.get('op')}: expected a field {name!r} with a name, got {value!r:.80}")
    return value
