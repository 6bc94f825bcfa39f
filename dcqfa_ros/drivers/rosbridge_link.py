"""One WebSocket connection over its own socket, for either end, made so that a stop overtakes whatever waits.

The protocol (handshake, frames, masking) is that of `websockets`, without its input and output: sending from the
caller's thread saves a change of threads, and one knows what is still in the kernel. A frame is written at once when
the socket takes it; otherwise it waits in a bounded queue, and a thread of the link writes on. Nothing is compressed,
no proxy is asked.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dcqfa_ros.drivers.protocols import DriverError

READ_BYTES = 65536

OnText = Callable[[str | bytes, int], None]
OnEnd = Callable[[str], None]


class LinkError(DriverError):
    """The connection cannot be made or is lost; the message says to whom and why."""


class LinkBusyError(LinkError):
    """The peer takes nothing and the queue is full; nothing was sent."""


class _Item(NamedTuple):
    key: str | None
    payload: bytes
    raw: bool = False  # bytes for the wire as they are: answers of the protocol to pings and to a close
    urgent: bool = False
    replaces: bool = False  # older ones of the same key


@dataclass(slots=True)
class LinkCounts:
    """What went over a link: text frames, frames replaced before they were sent, and what could not be understood."""

    sent: int = 0
    received: int = 0
    superseded: int = 0
    refused: int = 0
    callback_errors: int = 0


class WebSocketLink:
    """An open connection. All methods may be called from any thread; ``send`` never waits for the network.

    ``on_text(message, arrival_ns)`` and, once, ``on_end(reason)`` run in the thread that reads; what they raise is
    counted and goes no further. A peer that answers no ping for ``ping_timeout_s`` is lost.
    """

    def __init__(
        self,
        sock: socket.socket,
        protocol: Any,
        events: list[Any],
        *,
        name: str,
        on_text: OnText,
        on_end: OnEnd,
        ping_interval_s: float = 0.5,
        ping_timeout_s: float = 2.0,
        queue_limit: float = 256,
    ) -> None:
        """Take over an open connection and the ``events`` its protocol has read already."""
        self.name = name
        self.counts = LinkCounts()
        self.round_trip_s = float("nan")
        self._sock, self._protocol, self._early = sock, protocol, events
        self._on_text, self._on_end = on_text, on_end
        self._ping_interval_s, self._ping_timeout_s = ping_interval_s, ping_timeout_s
        self._queue_limit = queue_limit
        self._urgent: deque[_Item] = deque()
        self._queue: deque[_Item] = deque()
        self._queue_lock = threading.Lock()  # held for moments only
        self._write_lock = threading.Lock()  # held by whoever writes to the socket, which does not block
        self._protocol_lock = threading.Lock()
        self._partial = b""
        self._blocked = False
        self._reason: str | None = None
        self._wake = threading.Event()
        self._reading = threading.Event()
        self._reading.set()
        self._pings: dict[bytes, float] = {}
        self._fragments: list[bytes] = []
        sock.setblocking(False)
        self._keeper = threading.Thread(target=self._keep, name=f"{name} keeper", daemon=True)
        self._reader = threading.Thread(target=self._read, name=f"{name} reader", daemon=True)
        self._keeper.start()
        self._reader.start()

    @property
    def is_open(self) -> bool:
        """Whether frames can be sent."""
        return self._reason is None

    @property
    def reason(self) -> str:
        """Why the link ended; empty while it is open."""
        return self._reason or ""

    def is_reader_thread(self) -> bool:
        """Whether the caller runs in the thread that reads."""
        return threading.current_thread() is self._reader

    def send(self, payload: bytes, *, key: str | None = None, latest: bool = False, urgent: bool = False) -> int:
        """Send one text frame, or queue it where the socket takes nothing; returns the monotonic time, ns.

        Args:
            payload: UTF-8.
            key: names what belongs together, such as a topic.
            latest: drop frames of the same key that still wait.
            urgent: as ``latest``, and overtake everything that waits.

        Raises:
            LinkBusyError: the queue is full.
            LinkError: the link is lost.
        """
        with self._queue_lock:
            if self._reason is not None:
                raise LinkError(f"{self.name}: connection lost: {self._reason}")
            if latest or urgent:
                self._discard(key)
            if urgent:
                self._urgent.append(_Item(key, payload, urgent=True, replaces=True))
            elif len(self._queue) >= self._queue_limit:
                self.counts.refused += 1
                raise LinkBusyError(f"{self.name}: the peer takes no data: {len(self._queue)} frames wait")
            else:
                self._queue.append(_Item(key, payload, replaces=latest))
        self._pump()
        return time.monotonic_ns()

    def discard(self, key: str) -> None:
        """Drop the frames of ``key`` that still wait."""
        with self._queue_lock:
            self._discard(key)

    def pause(self) -> None:
        """Read nothing more, as a peer that hangs; pings are not answered either."""
        self._reading.clear()

    def resume(self) -> None:
        """Read on."""
        self._reading.set()

    def abort(self, reason: str) -> None:
        """Drop the connection at once, without a word to the peer, and what waits with it."""
        with contextlib.suppress(OSError):  # the peer sees a reset, as when a controller loses power and comes back
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._lose(reason)

    def close(self, timeout_s: float = 0.5) -> None:
        """Send what waits, say goodbye, and end the threads; waits at most ``timeout_s`` for the peer."""
        deadline = time.monotonic() + timeout_s
        while self.is_open and self._waiting() and time.monotonic() < deadline:
            time.sleep(0.001)
        with self._protocol_lock:
            with contextlib.suppress(Exception):  # a protocol that is closed already has nothing to say
                self._protocol.send_close(1000)
            goodbye = b"".join(self._protocol.data_to_send())
        self._enqueue_raw(goodbye)
        if threading.current_thread() is not self._reader:
            self._reader.join(max(0.05, deadline - time.monotonic()))
        self._lose("closed here")
        if threading.current_thread() not in (self._reader, self._keeper):
            self._reader.join(2.0)

    def _waiting(self) -> bool:
        with self._queue_lock:
            return bool(self._urgent or self._queue or self._partial)

    def _discard(self, key: str | None) -> None:
        if key is None:
            return
        for name in ("_queue", "_urgent"):
            old = getattr(self, name)
            kept = deque(item for item in old if item.key != key)
            self.counts.superseded += len(old) - len(kept)
            setattr(self, name, kept)

    def _enqueue_raw(self, data: bytes) -> None:
        if data:
            with self._queue_lock:
                self._urgent.append(_Item(None, data, raw=True))
            self._pump()

    def _pump(self) -> None:
        """Write while there is something, the socket takes it and nobody else does."""
        while self._waiting() and not self._blocked and self._reason is None:
            # Whoever holds the lock looks again after releasing it, so nothing is left behind.
            if not self._write_lock.acquire(blocking=False):
                return
            try:
                self._blocked = self._write_some()
            finally:
                self._write_lock.release()
            if self._blocked:
                self._wake.set()

    def _write_some(self) -> bool:
        """Write frames until none is left (False) or the socket is full (True)."""
        while True:
            item = None  # of a frame that has not begun
            if not self._partial:
                with self._queue_lock:
                    if not self._urgent and not self._queue:
                        return False
                    item = self._urgent.popleft() if self._urgent else self._queue.popleft()
                    self._partial = item.payload if item.raw else self._encode(item.payload)
            try:
                written = self._sock.send(self._partial)
            except BlockingIOError:
                if item is not None and not item.raw:
                    self._put_back(item)
                return True
            except (OSError, ValueError) as error:
                self._lose(f"sending failed: {error}")
                return False
            self._partial = self._partial[written:]

    def _put_back(self, item: _Item) -> None:
        """Let a frame of which nothing was written wait again, so that a stop can still overtake or replace it."""
        with self._queue_lock:
            self._partial = b""
            self.counts.sent -= 1
            newer = (*self._urgent, *self._queue)
            if item.key is not None and any(other.key == item.key and other.replaces for other in newer):
                self.counts.superseded += 1
            elif self._reason is None:
                (self._urgent if item.urgent else self._queue).appendleft(item)

    def _encode(self, payload: bytes) -> bytes:
        with self._protocol_lock:
            try:
                self._protocol.send_text(payload)
            except Exception as error:  # noqa: BLE001 - a protocol that is closing refuses; its class is private
                self._lose(f"the connection is closing ({error})", locked=True)
                return b""
            self.counts.sent += 1
            return b"".join(self._protocol.data_to_send())

    def _keep(self) -> None:
        """Write on where the socket was full, ping, and notice a peer that answers no more."""
        due = time.monotonic() + self._ping_interval_s
        while self._reason is None:
            if self._blocked:
                self._wait_writable(0.05)
                self._blocked = False
                self._pump()
            else:
                self._wake.wait(max(0.001, min(0.25, due - time.monotonic())))
                self._wake.clear()
            now = time.monotonic()
            oldest = min(list(self._pings.values()), default=now)
            if now - oldest > self._ping_timeout_s:
                self._lose(f"no answer to a ping for {self._ping_timeout_s:g} s")
            elif now >= due:
                due = now + self._ping_interval_s
                self._ping(now)

    def _wait_writable(self, timeout_s: float) -> None:
        with contextlib.suppress(OSError, ValueError):  # the socket has just been closed
            poller = select.poll()
            poller.register(self._sock, select.POLLOUT)
            poller.poll(timeout_s * 1000)

    def _ping(self, now: float) -> None:
        payload = now.hex().encode()
        with self._protocol_lock:
            try:
                self._protocol.send_ping(payload)
            except Exception:  # noqa: BLE001 - the protocol is closing; the reader ends the link
                return
            data = b"".join(self._protocol.data_to_send())
        self._pings[payload] = now
        self._enqueue_raw(data)

    def _read(self) -> None:
        try:
            for event in self._early:
                self._handle(event, time.monotonic_ns())
            poller = select.poll()
            poller.register(self._sock, select.POLLIN)
            while self._reason is None:
                if not self._reading.wait(0.1):
                    continue
                if not poller.poll(1000):
                    continue
                if not self._reading.is_set():
                    continue
                if not self._receive():
                    break
        except (OSError, ValueError) as error:
            self._lose(f"reading failed: {error}")
        finally:
            self._lose("the reader ended")
            self._keeper.join()
            self._sock.close()
            self._guarded(self._on_end, self._reason or "")

    def _receive(self) -> bool:
        try:
            data = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            data = b""
        arrival = time.monotonic_ns()
        with self._protocol_lock:
            if data:
                self._protocol.receive_data(data)
            else:
                self._protocol.receive_eof()
            events = self._protocol.events_received()
            answer = b"".join(self._protocol.data_to_send())
            closing = self._protocol.close_expected()
        for event in events:
            self._handle(event, arrival)
        self._enqueue_raw(answer)
        if not data:
            self._lose(self._closed_because("the peer closed the connection"))
        elif closing:
            self._lose(self._closed_because("the peer said goodbye"))
        return bool(data) and not closing

    def _closed_because(self, otherwise: str) -> str:
        error = getattr(self._protocol, "parser_exc", None)
        return f"the peer broke the protocol: {error}" if error and not isinstance(error, EOFError) else otherwise

    def _handle(self, event: Any, arrival_ns: int) -> None:
        opcode = getattr(event, "opcode", None)
        if opcode is None:
            return
        name = opcode.name
        if name == "PONG":
            sent = self._pings.pop(bytes(event.data), None)
            if sent is not None:
                self._pings.clear()  # an answer to a later ping answers the earlier ones
                self.round_trip_s = time.monotonic() - sent
        elif name in ("TEXT", "BINARY", "CONT"):
            self._fragments.append(bytes(event.data))
            if event.fin:
                data, self._fragments = b"".join(self._fragments), []
                self.counts.received += 1
                self._guarded(self._on_text, data, arrival_ns)

    def _guarded(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            self.counts.callback_errors += 1
            logging.getLogger(__name__).exception("%s: a callback failed", self.name)

    def _lose(self, reason: str, *, locked: bool = False) -> None:
        """End the link: nothing that waits is sent any more."""
        with contextlib.nullcontext() if locked else self._queue_lock:
            if self._reason is not None:
                return
            self._reason = reason
            self._queue.clear()
            self._urgent.clear()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for the socket
        self._wake.set()
        self._reading.set()
