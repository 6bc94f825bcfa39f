"""Where heartbeats go: a Unix datagram socket or UDP on this host."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path


class AddressError(ValueError):
    """Not an address of the watchdog, or it is taken; the message says what is expected."""


@dataclass(frozen=True)
class Address:
    """``unix:/path/to/socket`` or ``udp:127.0.0.1:PORT``."""

    family: int
    target: str | tuple[str, int]

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address that ``text`` names.

        Raises:
            AddressError: it names none, or a host that is not this one.
        """
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest.startswith("/") and len(os.fsencode(rest)) < 108:
            return cls(socket.AF_UNIX, rest)
        host, _, port = rest.rpartition(":")
        if kind == "udp" and host in ("127.0.0.1", "localhost") and port.isdigit() and int(port) < 65536:
            return cls(socket.AF_INET, ("127.0.0.1", int(port)))
        raise AddressError(
            f"watchdog address {text!r}: expected unix:/path (below 108 bytes) or udp:127.0.0.1:PORT on this host"
        )

    def listen(self) -> socket.socket:
        """Return a non-blocking socket bound here; a socket file that a dead process left is replaced.

        Raises:
            AddressError: another process listens here, or the path cannot be used.
        """
        sock = socket.socket(self.family, socket.SOCK_DGRAM)
        try:
            if isinstance(self.target, str):
                self._take_over(self.target)
            sock.bind(self.target)
        except OSError as error:
            sock.close()
            raise AddressError(f"watchdog cannot listen at {self}: {error}") from error
        except AddressError:
            sock.close()
            raise
        if isinstance(self.target, str):
            Path(self.target).chmod(0o600)
        sock.setblocking(False)
        return sock

    def _take_over(self, path: str) -> None:
        if not os.path.lexists(path):
            return
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            raise AddressError(f"watchdog cannot listen at {self}: the file is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(path)
            except OSError:
                Path(path).unlink()  # nobody listens any more
                return
        raise AddressError(f"watchdog cannot listen at {self}: another process does")

    def unlink(self) -> None:
        """Remove the socket file."""
        if isinstance(self.target, str):
            with contextlib.suppress(OSError):
                Path(self.target).unlink()

    def connect(self) -> socket.socket:
        """Return a non-blocking socket that sends here and hears the answers.

        Raises:
            OSError: nobody listens here (Unix sockets only; UDP shows it later).
        """
        sock = socket.socket(self.family, socket.SOCK_DGRAM)
        try:
            if self.family == socket.AF_UNIX:
                sock.bind("")  # an abstract name of the kernel's choice, for the answers
            sock.connect(self.target)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        return sock

    def __str__(self) -> str:
        return f"unix:{self.target}" if isinstance(self.target, str) else f"udp:{self.target[0]}:{self.target[1]}"


def default_address(domain: int, namespace: str = "") -> str:
    """Return where the graph of a ROS domain and namespace expects its watchdog: a Unix socket of this user."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    name = re.sub(r"[^A-Za-z0-9]+", "_", namespace.strip("/"))
    return f"unix:{folder}/dcqfa_watchdog_{os.getuid()}_{domain}{'_' if name else ''}{name}.sock"
