"""Separate graphs: a free ROS domain on this host only, environments for child processes, one stack per namespace.

Demonstrations, tests and benchmarks must never meet a real arm on the same network, nor each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import site
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dcqfa_ros.errors import UserError

_BOOTSTRAP = "_ROS_WHEELS_BOOTSTRAP_COMPLETE"
_FIRST_DOMAIN, _LAST_DOMAIN = 20, 100  # ports of domains above 101 fall into Linux' ephemeral range
_BEFORE_IRON = ("foxy", "galactic", "humble")
_BEYOND_THIS_HOST = ("ROS_STATIC_PEERS", "ROS_DISCOVERY_SERVER", "ROS_SUPER_CLIENT")


class IsolationError(UserError, RuntimeError):
    """No free domain, or the names are taken by another stack."""


@dataclass
class Isolation:
    """A reserved ROS domain whose discovery stays on this host.

    Attributes:
        env: environment for the processes of the graph (a fresh dictionary, see :func:`child_environment`).
        domain: the reserved ``ROS_DOMAIN_ID``.
    """

    env: dict[str, str]
    domain: int
    _lock: int = field(repr=False, default=-1)

    def release(self) -> None:
        """Give the domain back; harmless when repeated. Ending the process does it too."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Isolation:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the domain."""
        self.release()


def localhost_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return ``base`` (this process's environment if None) with discovery limited to this host.

    Iron and later read ``ROS_AUTOMATIC_DISCOVERY_RANGE``; Humble reads ``ROS_LOCALHOST_ONLY``, which later releases
    complain about.
    """
    env = dict(os.environ if base is None else base)
    for name in _BEYOND_THIS_HOST:
        env.pop(name, None)
    env["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    env.pop("ROS_LOCALHOST_ONLY", None)
    if env.get("ROS_DISTRO") in _BEFORE_IRON:
        env["ROS_LOCALHOST_ONLY"] = "1"
    return env


def isolated_environment(base: Mapping[str, str] | None = None) -> Isolation:
    """Reserve a free ROS domain on this host and return the environment for it.

    The reservation is a file lock, so it ends with this process, whatever ends it.

    Raises:
        IsolationError: every domain from 20 to 100 is taken.
    """
    domains = list(range(_FIRST_DOMAIN, _LAST_DOMAIN + 1))
    random.SystemRandom().shuffle(domains)
    for domain in domains:
        lock = _try_lock(_lock_directory() / f"domain-{domain}")
        if lock is None:
            continue
        if _domain_is_quiet(domain):
            env = child_environment(localhost_environment(base))
            env["ROS_DOMAIN_ID"] = str(domain)
            return Isolation(env, domain, lock)
        os.close(lock)
    raise IsolationError(
        f"every ROS domain from {_FIRST_DOMAIN} to {_LAST_DOMAIN} is in use on this host; end other graphs first"
    )


def child_environment(env: Mapping[str, str], python: str = sys.executable) -> dict[str, str]:
    """Return ``env`` made fit for a child process that imports rclpy and dcqfa_ros.

    The rclpy wheels set the library path by starting the interpreter anew once, and mark that in a variable. A child
    that inherits the mark without the path cannot load rclpy, so it gets both (the same interpreter, path complete:
    saves the second start) or neither. A source tree is added at the end of ``PYTHONPATH``, where its ``launch`` and
    ``test`` folders hide nothing.
    """
    fixed = dict(env)
    libraries = [p for p in fixed.get("LD_LIBRARY_PATH", "").split(os.pathsep) if p]
    same = Path(python).absolute() == Path(sys.executable).absolute()
    if not same:  # the libraries of this environment are not those of another's
        libraries = [p for p in libraries if not Path(p).is_relative_to(sys.prefix) or sys.prefix == sys.base_prefix]
        fixed["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    if not same or str(Path(sys.prefix, "lib")) not in libraries:
        fixed.pop(_BOOTSTRAP, None)
    root = str(Path(__file__).resolve().parents[2])
    installed = {os.path.realpath(p) for p in [*site.getsitepackages(), site.getusersitepackages()]}
    paths = [p for p in fixed.get("PYTHONPATH", "").split(os.pathsep) if p]
    if root not in installed and root not in map(os.path.realpath, paths):
        fixed["PYTHONPATH"] = os.pathsep.join([*paths, root])
    fixed["PYTHONUNBUFFERED"] = "1"
    return fixed


@contextlib.contextmanager
def claim_namespace(domain: int, namespace: str) -> Iterator[None]:
    """Hold the names of a stack on this host while the body runs.

    Raises:
        IsolationError: another stack holds them; the message says which process and what to do.
    """
    name = namespace.strip("/").replace("/", "--") or "root"
    path = _lock_directory() / f"stack-{domain}-{name}"
    lock = _try_lock(path)
    if lock is None:
        owner = path.read_text(errors="replace").strip() or "unknown"
        raise IsolationError(
            f"a stack runs already in namespace /{namespace.strip('/')} of ROS domain {domain} (process {owner}); "
            "end it, or choose another namespace:= or ROS_DOMAIN_ID"
        )
    try:
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(lock)


def _lock_directory() -> Path:
    """Return a folder shared by all users of this host, so that they do not choose the same domain."""
    folder = Path(tempfile.gettempdir()) / "dcqfa_locks"
    try:
        folder.mkdir()
        folder.chmod(0o777 | stat.S_ISVTX)
    except FileExistsError:
        pass
    return folder


def _try_lock(path: Path) -> int | None:
    """Return an open descriptor that holds the lock (closed on exec), or None when another process holds it."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:  # without O_CREAT first: Linux refuses it on another user's file in a shared folder
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            descriptor = os.open(path, flags | os.O_CREAT, 0o666)
    except OSError:  # not usable: taken, as far as this process can tell
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    with contextlib.suppress(PermissionError):  # another user's file, which is open to all already
        os.fchmod(descriptor, 0o666)
    return descriptor


def _domain_is_quiet(domain: int) -> bool:
    """Return whether no participant of another program uses the domain: the first one's port can be bound."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("", 7400 + 250 * domain + 10))
        except OSError:
            return False
    return True
