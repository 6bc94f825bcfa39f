"""A WebSocket client (RFC 6455) of what a watchdog needs: text out, text in, ping and pong, on one plain socket."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import socket
import struct
import time
from urllib.parse import urlsplit

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TEXT, _CLOSE, _PING, _PONG = 0x1, 0x8, 0x9, 0xA
MAXIMUM_MESSAGE = 1 << 20
_SEND_S = 0.5


class WebSocketError(OSError):
    """The peer cannot be reached, refuses, breaks the protocol, or has closed."""


class WebSocket:
    """A connected client; use :meth:`connect`. Receives without blocking, sends with a short time-out."""

    def __init__(self, sock: socket.socket, rest: bytes = b"") -> None:
        """Take over a socket after the handshake; ``rest`` has been read beyond it."""
        self._socket = sock
        self._data = bytearray(rest)
        self._message = bytearray()
        self.heard_s = time.monotonic()

    @classmethod
    def connect(cls, url: str, timeout_s: float = 2.0) -> WebSocket:
        """Connect to ``ws://host[:port][/path]``.

        Raises:
            WebSocketError: it did not work within ``timeout_s``; says why.
        """
        parts = urlsplit(url)
        if parts.scheme != "ws" or not parts.hostname:
            raise WebSocketError(f"{url!r} is no ws:// address")
        try:
            sock = socket.create_connection((parts.hostname, parts.port or 80), timeout_s)
        except OSError as error:
            raise WebSocketError(f"{url}: {error}") from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            rest = _shake_hands(sock, parts.netloc, parts.path or "/", timeout_s)
        except (OSError, ValueError) as error:
            sock.close()
            raise WebSocketError(f"{url}: {error}") from error
        return cls(sock, rest)

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._socket.fileno()

    def send_text(self, text: str) -> None:
        """Send one text message.

        Raises:
            WebSocketError: the connection is gone or takes nothing.
        """
        self._send(_TEXT, text.encode())

    def ping(self) -> None:
        """Send a ping; the pong renews :attr:`heard_s`.

        Raises:
            WebSocketError: see :meth:`send_text`.
        """
        self._send(_PING, b"")

    def receive(self) -> list[str]:
        """Return the text messages that are complete; reads what is there without waiting, answers pings.

        Raises:
            WebSocketError: the peer closed the connection or broke the protocol.
        """
        self._socket.setblocking(False)
        try:
            data = self._socket.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            data = None
        except OSError as error:
            raise WebSocketError(str(error)) from error
        if data is not None:
            if not data:
                raise WebSocketError("the controller closed the connection")
            self._data += data
            self.heard_s = time.monotonic()
        return list(self._messages())

    def _messages(self) -> list[str]:
        found = []
        while (frame := self._frame()) is not None:
            final, opcode, payload = frame
            if opcode == _PING:
                self._send(_PONG, payload)
            elif opcode == _CLOSE:
                raise WebSocketError("the controller closed the connection")
            elif opcode in (0x0, _TEXT, 0x2):
                self._message += payload
                if len(self._message) > MAXIMUM_MESSAGE:
                    raise WebSocketError(f"a message is longer than {MAXIMUM_MESSAGE} bytes")
                if final:
                    found.append(self._message.decode("utf-8", "replace"))
                    self._message.clear()
            elif opcode != _PONG:
                raise WebSocketError(f"unknown frame type {opcode}")
        return found

    def _frame(self) -> tuple[bool, int, bytes] | None:
        """Take one frame off the data read so far; None where it is not complete."""
        data = self._data
        if len(data) < 2:
            return None
        if data[0] & 0x70 or data[1] & 0x80:
            raise WebSocketError("a frame has reserved bits or a mask, which a server does not send")
        length, begin = data[1] & 0x7F, 2
        if length >= 126:
            begin = 4 if length == 126 else 10
            if len(data) < begin:
                return None
            length = int.from_bytes(data[2:begin], "big")
        if length > MAXIMUM_MESSAGE:
            raise WebSocketError(f"a frame is longer than {MAXIMUM_MESSAGE} bytes")
        if len(data) < begin + length:
            return None
        frame = bool(data[0] & 0x80), data[0] & 0x0F, bytes(data[begin : begin + length])
        del data[: begin + length]
        return frame

    def _send(self, opcode: int, payload: bytes) -> None:
        mask = os.urandom(4)
        header = bytes([0x80 | opcode])
        if len(payload) < 126:
            header += bytes([0x80 | len(payload)])
        elif len(payload) < 1 << 16:
            header += b"\xfe" + struct.pack(">H", len(payload))
        else:
            header += b"\xff" + struct.pack(">Q", len(payload))
        body = bytes(b ^ mask[i % 4] for i, b in enumerate(payload))
        try:
            self._socket.settimeout(_SEND_S)
            self._socket.sendall(header + mask + body)
        except OSError as error:
            raise WebSocketError(f"sending failed: {error}") from error

    def close(self) -> None:
        """Say goodbye where that works at once, and close."""
        with contextlib.suppress(OSError):
            self._send(_CLOSE, b"\x03\xe8")
        self._socket.close()


def _shake_hands(sock: socket.socket, host: str, path: str, timeout_s: float) -> bytes:
    """Ask for WebSocket and check the answer; returns what was read beyond it."""
    key = base64.b64encode(os.urandom(16))
    request = (
        f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key.decode()}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    sock.sendall(request.encode())
    end, data = time.monotonic() + timeout_s, b""
    while b"\r\n\r\n" not in data:
        sock.settimeout(max(0.001, end - time.monotonic()))
        more = sock.recv(4096)
        if not more or len(data) > 1 << 16 or time.monotonic() > end:
            raise ValueError("no answer to the WebSocket handshake")
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if status.split(" ")[1:2] != ["101"]:
        raise ValueError(f"the WebSocket handshake was refused: {status}")
    wanted = base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()  # noqa: S324 - the protocol's own choice
    if headers.get("sec-websocket-accept") != wanted:
        raise ValueError("the answer to the WebSocket handshake does not belong to the request")
    return rest
