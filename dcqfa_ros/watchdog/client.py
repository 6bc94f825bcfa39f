"""arm_node's side of the watchdog: send heartbeats from the control thread, know whether somebody listens."""

from __future__ import annotations

import os
import socket
import time

from dcqfa_ros.watchdog.address import Address
from dcqfa_ros.watchdog.heartbeat import Beat, Reply, Status

ALIVE_S = 0.3
"""A watchdog that has not answered for so long counts as gone."""

_RETRY_S = 0.2


class WatchdogClient:
    """Sends beats and hears answers on one datagram socket; never blocks. Used from the control thread.

    Attributes:
        sent: beats handed to the socket.
        answered: answers heard.
    """

    def __init__(self, address: str) -> None:
        """Prepare for the watchdog at ``address`` (``unix:/path`` or ``udp:127.0.0.1:PORT``).

        Raises:
            AddressError: not an address.
        """
        self._address = Address.parse(address)
        self._socket: socket.socket | None = None
        self._tag = (os.getpid() ^ time.monotonic_ns()) & 0xFFFF
        self._number = 0
        self._retry_s = self._heard_s = float("-inf")
        self._status = Status.BLIND
        self.sent = self.answered = 0

    def beat(self, armed: bool) -> None:
        """Send one sign of life and take in the answers so far."""
        now = time.monotonic()
        if self._socket is None and not self._open(now):
            return
        assert self._socket is not None
        self._number += 1
        try:
            self._hear(now)
            self._socket.send(Beat(armed, self._tag, self._number).encode())
            self.sent += 1
        except BlockingIOError:
            pass  # its queue is full: it does not answer either, which problem() says
        except OSError:
            self._drop(now)

    def _open(self, now: float) -> bool:
        if now < self._retry_s:
            return False
        try:
            self._socket = self._address.connect()
        except OSError:
            self._retry_s = now + _RETRY_S
        return self._socket is not None

    def _drop(self, now: float) -> None:
        self.close()
        self._retry_s = now + _RETRY_S

    def _hear(self, now: float) -> None:
        assert self._socket is not None
        while True:
            try:
                reply = Reply.decode(self._socket.recv(64))
            except BlockingIOError:
                return
            if reply is not None and reply.tag == self._tag:
                self._heard_s, self._status = now, reply.status
                self.answered += 1

    def problem(self) -> str | None:
        """Why the watchdog cannot be relied on now; None where it can."""
        age = time.monotonic() - self._heard_s
        if age > ALIVE_S:
            heard = "has never answered" if self._heard_s == float("-inf") else f"has not answered for {age:.2f} s"
            start = f"start `python -m dcqfa_ros.watchdog --listen {self._address}`"
            return f"the watchdog at {self._address} {heard}: {start}"
        if self._status is Status.BLIND:
            return f"the watchdog at {self._address} has no connection to the controller and could not stop the arm"
        if self._status is Status.TRIPPED:
            return f"the watchdog at {self._address} has tripped the safe stop"
        return None

    def close(self) -> None:
        """Close the socket; :meth:`beat` opens it again."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
