"""Built engines on disk. What is not whole, unaltered and exactly what was asked for is built again, never used.

An entry is ``<digest>.engine`` with a sidecar ``<digest>.json``: the key in words, size and SHA-256 of the engine
file. The digest is that of the key. The engine is put in place first, the sidecar last, each in one step, so a process
that is killed leaves no entry or one that is noticed. The SHA-256 finds damage, not malice: an engine is code for the
GPU, and the folder belongs to the user (one of another user, or that others may write to, is refused).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcqfa_ros.paths import cache_directory
from dcqfa_ros.runtime.errors import EngineError

_log = logging.getLogger(__name__)
SCHEMA = 1
DEFAULT_LIMIT = 4 << 30
_LOCK_POLL_S = 0.05
_STALE_S = 3600.0


def default_folder() -> Path:
    """``engines`` in the user's cache folder of this package. It may not exist yet."""
    return cache_directory() / "engines"


@dataclass(frozen=True, slots=True)
class EngineKey:
    """Everything that a serialized engine depends on.

    Attributes:
        onnx_sha256: of the lowered graph that the builder read, shapes fixed.
        runtime: ``tensorrt`` or ``tensorrt_rtx``.
        version: of the runtime.
        capability: compute capability, ``8.7``.
        multiprocessors: of the device: kernels are chosen by timing them on it. 0 for a build without a device.
        driver: as :meth:`dcqfa_ros.runtime.cudart.CudaRuntime.driver` gives it.
        flags: what the build asks for beyond the graph.
    """

    onnx_sha256: str
    runtime: str
    version: str
    capability: str
    multiprocessors: int
    driver: str
    flags: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The key as JSON holds it."""
        return {**asdict(self), "flags": list(self.flags)}

    def digest(self) -> str:
        """SHA-256 of the key, hexadecimal: the name of its files."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class CachedEngine:
    """A serialized engine and where it comes from.

    Attributes:
        plan: the bytes to deserialize.
        built: whether it was built now.
        notes: what was wrong with the entry there was, or why the new one was not kept; empty when all is well.
    """

    plan: bytes
    built: bool
    notes: tuple[str, ...] = ()


class EngineCache:
    """A folder of built engines, shared by all processes of a user."""

    def __init__(self, folder: Path | None = None, limit: int = DEFAULT_LIMIT, timeout: float = 1800.0) -> None:
        """Name the folder; it is made when the first engine is kept.

        Args:
            folder: default: :func:`default_folder`.
            limit: bytes of engines kept; the entries that were not used for longest are removed beyond it.
            timeout: seconds to wait for another process that builds the same engine.
        """
        self.folder = default_folder() if folder is None else folder
        self.limit, self.timeout = limit, timeout

    def get(self, key: EngineKey, build: Callable[[], bytes], rejected: str | None = None) -> CachedEngine:
        """Return the engine of a key; built, and kept, where there is no sound entry.

        Args:
            key: what the engine depends on.
            build: builds it.
            rejected: why the entry must not be used although it is whole (it could not be deserialized), or None.

        Raises:
            EngineError: the folder is another user's or can be written by others, or another process has held the lock
                for too long; and whatever ``build`` raises.
        """
        notes: list[str] = []
        try:
            with self._lock(key):
                plan = None if rejected else self._read(key, notes)
                if rejected:
                    notes.append(f"{self._engine(key)}: {rejected}; built again")
                if plan is not None:
                    return CachedEngine(plan, built=False)
                begin = time.monotonic()
                plan = build()
                try:
                    self._write(key, plan, time.monotonic() - begin)
                    self.prune(keep=key.digest())
                except OSError as error:
                    notes.append(f"{self._engine(key)}: cannot be kept ({error.strerror}); every start builds it again")
        except _UnusableFolderError as error:
            notes.append(f"{error}; every start builds the engine again")
            plan = build()
        for note in notes:
            _log.warning("engine cache: %s", note)
        return CachedEngine(plan, built=True, notes=tuple(notes))

    def prune(self, limit: int | None = None, keep: str = "") -> list[str]:
        """Remove entries until at most ``limit`` bytes of engines are left, the least recently used first.

        What is left of interrupted writes for over an hour goes too, as do engines without a sidecar.

        Args:
            limit: bytes; default: the cache's.
            keep: digest of an entry that stays.

        Returns:
            Digests removed.
        """
        limit = self.limit if limit is None else limit
        entries: list[tuple[bool, float, int, str]] = []
        now = time.time()
        for path in _list(self.folder):
            with suppress(OSError):
                status = path.stat()
                if path.name.startswith(".") and path.suffix == ".part" and now - status.st_mtime > _STALE_S:
                    path.unlink()
                elif path.suffix == ".engine" and path.stem != keep:
                    sidecar = path.with_suffix(".json")
                    used = sidecar.stat().st_mtime if sidecar.exists() else status.st_mtime
                    whole = sidecar.exists() or now - status.st_mtime < _STALE_S
                    entries.append((whole, used, status.st_size, path.stem))
        total = sum(size for _, _, size, _ in entries) + _size(self.folder / f"{keep}.engine")
        removed = []
        for whole, _, size, digest in sorted(entries):
            if whole and total <= limit:
                break
            for suffix in (".json", ".engine"):  # an engine without a sidecar is no entry
                with suppress(FileNotFoundError):
                    (self.folder / f"{digest}{suffix}").unlink()
            total -= size
            removed.append(digest)
        return removed

    def _read(self, key: EngineKey, notes: list[str]) -> bytes | None:
        """The engine of a sound entry; None, and why in ``notes``, where there is none."""
        engine, sidecar = self._engine(key), self._sidecar(key)
        if not engine.exists() and not sidecar.exists():
            return None
        try:
            document = json.loads(sidecar.read_bytes())
            plan = engine.read_bytes()
            problem = _problem(document, key, plan)
        except FileNotFoundError as error:
            problem = f"{Path(str(error.filename)).name} is missing"
        except (OSError, ValueError) as error:
            problem = f"it or its sidecar cannot be read ({error})"
        if problem is None:
            with suppress(OSError):
                os.utime(sidecar)  # used now: pruned last
            return plan
        notes.append(f"{engine}: {problem}; built again")
        return None

    def _write(self, key: EngineKey, plan: bytes, seconds: float) -> None:
        document = {
            "schema": SCHEMA,
            "key": key.document(),
            "engine": {"sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan)},
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 3),
        }
        # The sidecar of an older engine must not stand beside the new one, not even for a moment.
        self._sidecar(key).unlink(missing_ok=True)
        _replace(self._engine(key), plan)
        _replace(self._sidecar(key), json.dumps(document, indent=1).encode())

    @contextmanager
    def _lock(self, key: EngineKey) -> Iterator[None]:
        """Hold the lock of a key, so that two processes do not build one engine. The kernel frees a dead holder's lock.

        Keys share 256 lock files, which are never removed: removing a lock file lets two holders in.
        """
        path = self.folder / f".{key.digest()[:2]}.lock"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.stat()
            if status.st_uid != os.geteuid():
                raise EngineError(
                    f"{self.folder}: it belongs to user {status.st_uid}, and engines are code; expected a folder of "
                    f"user {os.geteuid()}: set another (XDG_CACHE_HOME)"
                )
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise EngineError(
                    f"{self.folder}: others may write here, and engines are code; run chmod go-w on it or set another"
                )
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _UnusableFolderError(f"{self.folder}: cannot be written ({error.strerror})") from error
        try:
            deadline = time.monotonic() + self.timeout
            while not _try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{path}: another process has been building this engine for {self.timeout:g} s; "
                        "wait for it or end it"
                    )
                time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(descriptor)

    def _engine(self, key: EngineKey) -> Path:
        return self.folder / f"{key.digest()}.engine"

    def _sidecar(self, key: EngineKey) -> Path:
        return self.folder / f"{key.digest()}.json"


class _UnusableFolderError(Exception):
    """The folder cannot be made or written: engines are built and not kept."""


def _problem(document: Any, key: EngineKey, plan: bytes) -> str | None:
    """Why an entry is not sound, or None."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return "the sidecar is not of this format"
    recorded, expected = document.get("key"), key.document()
    if recorded != expected:
        if not isinstance(recorded, dict):
            return "the sidecar holds no key"
        field = next((name for name in expected if recorded.get(name) != expected[name]), "an unknown field")
        return f"{field} in the sidecar is {recorded.get(field)!r}, expected {expected.get(field)!r}"
    engine = document.get("engine")
    if not isinstance(engine, dict) or not isinstance(engine.get("sha256"), str):
        return "the sidecar holds no SHA-256 of the engine"
    if engine.get("bytes") != len(plan):
        return f"it has {len(plan)} bytes, its sidecar says {engine.get('bytes')}"
    if engine["sha256"] != hashlib.sha256(plan).hexdigest():
        return "its SHA-256 is not the one in its sidecar"
    return None


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old one, none or the new one, whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
