"""Opening of WebSocket connections, from either end; errors say what is wrong with the peer."""

from __future__ import annotations

import contextlib
import importlib
import logging
import socket
import time
from typing import Any, Literal

from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.drivers.rosbridge_link import READ_BYTES, LinkError, OnEnd, OnText, WebSocketLink

MAX_MESSAGE_BYTES = 4 * 2**20
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)  # Linux
_UNSENT_BYTES = 4096  # what may wait in the kernel where a stop cannot overtake it: about ten velocity demands
_QUIET = logging.getLogger(__name__ + ".quiet")
_QUIET.disabled = True  # the protocol logs every connection; what went wrong is reported by this module's errors


def open_link(
    host: str, port: int, *, timeout_s: float, name: str, on_text: OnText, on_end: OnEnd, **options: float
) -> WebSocketLink:
    """Connect to a WebSocket server and start the link's threads.

    Raises:
        LinkError: the host is unknown or silent, nothing listens there, or what listens is no WebSocket server.
    """
    client, uri = _module("websockets.client"), _module("websockets.uri")
    invalid = _module("websockets.exceptions").InvalidURI
    where = f"{name}: ws://{host}:{port}"
    deadline = time.monotonic() + timeout_s
    try:
        target = uri.parse_uri(f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}")
    except (ValueError, invalid) as error:
        raise LinkError(f"{where}: not an address: {error}; give a host name or an IP address") from None
    try:
        sock = socket.create_connection((host, port), timeout=timeout_s)
    except (socket.gaierror, UnicodeError):
        raise LinkError(f"{where}: the host name is unknown: check host and the network") from None
    except ConnectionRefusedError:
        raise LinkError(
            f"{where}: connection refused: nothing listens on this port; is the controller (or 'dcqfa emulate inovo') "
            "running, and is 9090 its rosbridge port?"
        ) from None
    except TimeoutError:
        raise LinkError(f"{where}: no answer within {timeout_s:g} s: check host, cable and power") from None
    except (OSError, OverflowError) as error:
        raise LinkError(f"{where}: cannot connect: {error}") from None
    try:
        prepare(sock)
        protocol = client.ClientProtocol(target, max_size=MAX_MESSAGE_BYTES, logger=_QUIET)
        protocol.send_request(protocol.connect())
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        sock.sendall(b"".join(protocol.data_to_send()))
        events = _shake_hands(sock, protocol, deadline)
    except TimeoutError:
        sock.close()
        raise LinkError(
            f"{where}: connected, but no WebSocket handshake within {timeout_s:g} s: is this the rosbridge port?"
        ) from None
    except (OSError, EOFError, _Refused) as error:
        sock.close()
        raise LinkError(
            f"{where}: the WebSocket handshake failed ({error}): is this the rosbridge port (9090 on the controller)?"
        ) from None
    return WebSocketLink(sock, protocol, events, name=where, on_text=on_text, on_end=on_end, **options)


def accept_link(
    sock: socket.socket, *, timeout_s: float, name: str, on_text: OnText, on_end: OnEnd, **options: float
) -> WebSocketLink:
    """Answer the handshake of a client that has just connected, and start the link's threads.

    Raises:
        LinkError: it does not speak WebSocket; the socket is closed.
    """
    server = _module("websockets.server")
    deadline = time.monotonic() + timeout_s
    try:
        prepare(sock)
        protocol = server.ServerProtocol(max_size=MAX_MESSAGE_BYTES, logger=_QUIET)
        events = _shake_hands(sock, protocol, deadline, wanted=1)
        protocol.send_response(protocol.accept(events.pop(0)))
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        sock.sendall(b"".join(protocol.data_to_send()))
        if protocol.handshake_exc is not None:
            raise _Refused(str(protocol.handshake_exc))
    except (OSError, EOFError, _Refused) as error:
        sock.close()
        raise LinkError(f"{name}: not a WebSocket client: {error}") from None
    return WebSocketLink(sock, protocol, events, name=name, on_text=on_text, on_end=on_end, **options)


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """The handshake was answered, but not as WebSocket demands."""


def prepare(sock: socket.socket) -> None:
    """Set what low latency needs: no Nagle delay, and little unsent data in the kernel."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # not on every kernel; then up to a socket buffer waits where nothing overtakes
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT_BYTES)


def _shake_hands(sock: socket.socket, protocol: Any, deadline: float, wanted: Literal[0, 1] = 0) -> list[Any]:
    """Read until the handshake has ended (client) or a request is there (server); returns the events read so far."""
    events: list[Any] = []
    while True:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        data = sock.recv(READ_BYTES)
        if data:
            protocol.receive_data(data)
        else:
            protocol.receive_eof()
        events += protocol.events_received()
        if protocol.handshake_exc is not None:
            raise _Refused(str(protocol.handshake_exc))
        if protocol.state.name == "OPEN" or len(events) >= wanted > 0:
            return events
        if not data:
            raise EOFError("the peer closed the connection")
        if time.monotonic() > deadline:
            raise TimeoutError


def require_websockets() -> None:
    """Check that connections can be made and accepted at all.

    Raises:
        DriverError: the package is missing; it says what to install.
    """
    _module("websockets.server")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise DriverError(
            "the Python package 'websockets', which the arm's controller is reached with, is not installed: "
            "pip install -r requirements/cell.txt"
        ) from None
