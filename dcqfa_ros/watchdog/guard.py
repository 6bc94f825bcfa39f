"""The watchdog's loop: one selector over heartbeats and the connection to the controller, no threads."""

from __future__ import annotations

import json
import os
import selectors
import time
from collections.abc import Callable
from typing import Any

from dcqfa_ros.watchdog.address import Address
from dcqfa_ros.watchdog.heartbeat import DEFAULT_TIMEOUT_S, Beat, Monitor, Reply, Status
from dcqfa_ros.watchdog.websocket import WebSocket, WebSocketError

SERVICE = "/psu/safe_stop/trip"
_PING_S = 0.5
_SILENT_S = 2.0  # without anything from the controller, after which the connection is made anew
_RECONNECT_S = 0.5
_CONNECT_S = 0.3  # short: while it connects, it watches nobody, and says so
_ANSWER_S = 0.2  # to wait for the answer to a trip before it is sent again
_IDLE_S = 0.25
_LEAVE_S = 1.0  # to wait, when told to end, for an armed arm_node to end first


class Watchdog:
    """Trips the safe stop of the controller at ``url`` when heartbeats at ``address`` cease while armed."""

    def __init__(
        self, url: str, address: Address, timeout_s: float = DEFAULT_TIMEOUT_S, log: Callable[..., None] | None = None
    ) -> None:
        """Bind the heartbeat socket; the controller is connected by :meth:`run`.

        Raises:
            AddressError: the address is taken.
            ValueError: the time-out is out of range.
        """
        self.monitor = Monitor(timeout_s)
        self._url, self._address = url, address
        self._log = log or write_line
        self._selector = selectors.DefaultSelector()
        self._beats = address.listen()
        self._selector.register(self._beats, selectors.EVENT_READ)
        self._link: WebSocket | None = None
        self._retry_s = self._ping_s = 0.0
        self._calls = 0
        self._pending_s: float | None = None  # since when a trip waits to be acknowledged
        self._sent_s = float("-inf")
        self._stopping_s: float | None = None  # since when
        self._was_connected: bool | None = None

    def stop(self) -> None:
        """Make :meth:`run` return soon; safe in a signal handler."""
        if self._stopping_s is None:
            self._stopping_s = time.monotonic()

    def run(self) -> None:
        """Watch until :meth:`stop`.

        A signal that ends a whole cell reaches this process and ``arm_node`` at once. While the arm is armed, or a trip
        is not acknowledged, the watching goes on for a moment: ``arm_node`` may hang while it ends.
        """
        self._log("started", url=self._url, listen=str(self._address), timeout_ms=self.monitor.timeout_s * 1e3)
        while self._stopping_s is None or self._is_needed(time.monotonic() - self._stopping_s):
            self._step()

    def _is_needed(self, stopping_s: float) -> bool:
        return stopping_s < _LEAVE_S and (self.monitor.watching or self._pending_s is not None)

    def _step(self) -> None:
        now = time.monotonic()
        waits = [_IDLE_S, self.monitor.wait_s(now), 0.02 if self._pending_s is not None else None]
        for _ in self._selector.select(min(w for w in waits if w is not None)):
            pass
        # Beats first: one that has arrived in time counts, however late this process was woken.
        self._read_beats(time.monotonic())
        now = time.monotonic()
        if self.monitor.due(now):
            self._log("silence", limit_ms=self.monitor.timeout_s * 1e3)
            self._pending_s = now
            self._sent_s = float("-inf")
        if self._pending_s is not None and now - self._sent_s > _ANSWER_S:
            if self._link is not None and self._link.heard_s < self._sent_s:
                self._lose(f"nothing heard for {_ANSWER_S:g} s after a trip")  # it may be dead; a new one tells
            self._trip(now)
        self._read_controller()
        self._keep_connection(time.monotonic())

    def _read_beats(self, now: float) -> None:
        for _ in range(1000):
            try:
                data, sender = self._beats.recvfrom(64)
            except (BlockingIOError, ConnectionError):
                return
            beat = Beat.decode(data)
            if beat is not None and self.monitor.feed(beat, now):
                self._answer(beat, sender)

    def _answer(self, beat: Beat, sender: Any) -> None:
        status = Status.TRIPPED if self.monitor.tripped else Status.READY if self._link is not None else Status.BLIND
        try:
            self._beats.sendto(Reply(status, beat.tag, beat.number).encode(), sender)
        except OSError:
            return  # it has gone meanwhile, which the silence will say

    # Controller

    def _trip(self, now: float) -> None:
        if self._link is None:
            self._connect(now)
        link = self._link
        if link is None:
            self._sent_s = now
            return
        self._calls += 1
        call = {"op": "call_service", "id": f"watchdog:{os.getpid()}:{self._calls}", "service": SERVICE, "args": {}}
        try:
            link.send_text(json.dumps(call))
        except WebSocketError as error:
            self._lose(str(error))
            return
        self._sent_s = now
        self._log("trip", service=SERVICE, attempt=self._calls)

    def _read_controller(self) -> None:
        link = self._link
        if link is None:
            return
        try:
            messages = link.receive()
        except WebSocketError as error:
            self._lose(str(error))
            return
        for text in messages:
            try:
                frame = json.loads(text)
            except ValueError:
                continue
            if isinstance(frame, dict) and frame.get("op") == "service_response" and self._pending_s is not None:
                self._on_response(frame)

    def _on_response(self, frame: dict[str, Any]) -> None:
        values = frame.get("values")
        done = frame.get("result") is True and not (isinstance(values, dict) and values.get("success") is False)
        if done and self._pending_s is not None:
            self._log("tripped", after_ms=round((time.monotonic() - self._pending_s) * 1e3, 1))
            self._pending_s = None
        else:
            self._log("trip refused", answer=values)

    def _keep_connection(self, now: float) -> None:
        link = self._link
        # A connection is made only while nobody relies on this process: it takes time in which nothing is watched.
        if link is None:
            if now >= self._retry_s and not self.monitor.watching:
                self._connect(now)
        elif now - link.heard_s > _SILENT_S:
            self._lose(f"nothing heard for {_SILENT_S:g} s")
        elif now >= self._ping_s:
            self._ping_s = now + _PING_S
            try:
                link.ping()
            except WebSocketError as error:
                self._lose(str(error))

    def _connect(self, now: float) -> None:
        self._retry_s = now + _RECONNECT_S
        try:
            self._link = WebSocket.connect(self._url, _CONNECT_S)
        except WebSocketError as error:
            if self._was_connected is not False:
                self._was_connected = False
                self._log("no connection", reason=str(error))
            return
        self._was_connected = True
        self._selector.register(self._link, selectors.EVENT_READ)
        self._log("connected", url=self._url)

    def _lose(self, reason: str) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        self._selector.unregister(link)
        link.close()
        self._was_connected = False
        self._sent_s = float("-inf")
        self._log("connection lost", reason=reason)

    def close(self) -> None:
        """Close everything."""
        if self._link is not None:
            self._selector.unregister(self._link)
            self._link.close()
            self._link = None
        self._selector.close()
        self._beats.close()
        self._address.unlink()


def write_line(event: str, **values: object) -> None:
    """Write one event as a JSON line to stdout; losing stdout must not end a watchdog."""
    try:
        print(json.dumps({"watchdog": event, "time": round(time.time(), 3), **values}), flush=True)
    except (OSError, ValueError):
        return
