"""A tiny rosbridge server in a thread: notes when the safe stop is tripped, can refuse, hang up, or break off."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import threading
import time
from typing import Any

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Controller:
    """Accepts any number of connections; use it as a context manager.

    Attributes:
        trips: monotonic times of the calls of ``/psu/safe_stop/trip``.
        refusing: answer trips with ``success: false``.
        connections: accepted so far.
    """

    def __init__(self) -> None:
        self.trips: list[float] = []
        self.pings = 0
        self.refusing = False
        self.connections = 0
        self._open: list[socket.socket] = []
        self._deaf: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self.hang_up()

    def hang_up(self) -> None:
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._open.clear()

    def hang(self) -> None:
        """Keep the present connections, but answer nothing on them any more."""
        self._deaf += self._open

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._server.accept()
                self._open.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._shake(sock)
            self.connections += 1
            while True:
                opcode, payload = self._read(sock)
                if sock in self._deaf:
                    continue
                if opcode == 9:
                    self.pings += 1
                    self._write(sock, 10, payload)
                elif opcode == 1:
                    self._on(sock, json.loads(payload))
                elif opcode == 8:
                    return

    def _on(self, sock: socket.socket, frame: dict[str, Any]) -> None:
        if frame.get("service") == "/psu/safe_stop/trip":
            self.trips.append(time.monotonic())
            values = {"success": not self.refusing, "message": ""}
            answer = {
                "op": "service_response",
                "id": frame["id"],
                "service": frame["service"],
                "values": values,
                "result": True,
            }
            text = json.dumps(answer).encode()
            self._write(sock, 1, text[:10], final=False)  # in two frames, between which a ping comes
            self._write(sock, 9, b"hello")
            self._write(sock, 0, text[10:])

    @staticmethod
    def _shake(sock: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            more = sock.recv(1024)
            if not more:
                raise OSError
            data += more
        key = next(
            line.split(b": ")[1] for line in data.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key")
        )
        accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
        sock.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
            + accept
            + b"\r\n\r\n"
        )

    @staticmethod
    def _exactly(sock: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = sock.recv(count - len(data))
            if not more:
                raise OSError
            data += more
        return data

    def _read(self, sock: socket.socket) -> tuple[int, bytes]:
        head = self._exactly(sock, 2)
        assert head[0] & 0x80 and head[1] & 0x80, "a client sends whole masked frames"
        length = head[1] & 0x7F
        if length == 126:
            length = int.from_bytes(self._exactly(sock, 2), "big")
        mask = self._exactly(sock, 4)
        body = self._exactly(sock, length)
        return head[0] & 15, bytes(b ^ mask[i % 4] for i, b in enumerate(body))

    @staticmethod
    def _write(sock: socket.socket, opcode: int, payload: bytes, final: bool = True) -> None:
        assert len(payload) < 65536
        size = bytes([len(payload)]) if len(payload) < 126 else b"\x7e" + len(payload).to_bytes(2, "big")
        sock.sendall(bytes([opcode | (0x80 if final else 0)]) + size + payload)
