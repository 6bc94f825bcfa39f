"""The simulated cell's state in shared memory: written by the process that owns the world, read by simulated cameras.

One small record per cell lies in ``/dev/shm``. Nobody waits for anybody: the record has two slots, the writer fills the
one that is not current and then names it current, and a reader copies the current one and tries again when the writer
has come round meanwhile. A checksum guards against processors that reorder stores (ARM). The writer holds a file lock
for as long as it lives, so a reader can tell a cell that stands still from one whose process has died, and the record
of a killed cell is taken over by the next one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.sim.tee import Float64, check_state

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - files are opened without following links, for their owner only
_MAGIC = b"DCQFAc1\0"
_CURRENT = struct.Struct("<Q")  # number of the newest complete write; its slot is the number modulo 2
_PAYLOAD = struct.Struct("<Qq5d2d")  # number of the write, monotonic ns, state, target (NaN: none yet)
_CHECKSUM = struct.Struct("<I")
_CURRENT_AT = len(_MAGIC)
_SLOTS_AT = _CURRENT_AT + _CURRENT.size
_SLOT_SIZE = _PAYLOAD.size + 8  # the checksum, padded
_SIZE = _SLOTS_AT + 2 * _SLOT_SIZE
_READ_ATTEMPTS = 200
_LOCK_ATTEMPTS = 20
_LOCK_PAUSE_S = 0.005
_MAX_DOMAIN = 232


class CellStateError(DriverError):
    """The cell's shared state is missing, stale, unreadable or taken; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class CellState:
    """One consistent copy of the cell's state.

    Attributes:
        sequence: number of the write, from 1; it grows by one with every write.
        stamp_ns: ``time.monotonic_ns`` of the writer (the same clock in every process of a host).
        state: agent x, y, block x, y [px], block theta [rad]; shape (5,), float64.
        target: last commanded position, shape (2,), float64, px; None before the first command.
    """

    sequence: int
    stamp_ns: int
    state: Float64
    target: Float64 | None


def cell_state_name(domain: int, namespace: str) -> str:
    """Return the record's name for a ROS domain and namespace: two cells share one only if they share both.

    Raises:
        ValueError: the domain is outside 0..232, or the namespace is not names of letters, digits and ``_`` with ``/``.
    """
    if not 0 <= domain <= _MAX_DOMAIN:
        raise ValueError(f"domain: expected 0 to {_MAX_DOMAIN}, got {domain}")
    inner = namespace.strip("/")
    if inner and not all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", part) for part in inner.split("/")):
        raise ValueError(f"namespace: expected names of letters, digits and '_' separated by '/', got {namespace!r}")
    return f"dcqfa_cell_{domain}" + "".join(f".{part}" for part in inner.split("/") if part)


def _path(name: str, directory: Path) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name) or name.startswith("."):
        raise ValueError(f"cell state name: expected letters, digits, '_' and '.', got {name!r}")
    return directory / name


def _slot_at(number: int) -> int:
    return _SLOTS_AT + (number % 2) * _SLOT_SIZE


class CellStateWriter:
    """Owns the record ``name`` and writes to it. One writer per name and host; a dead one's record is taken over."""

    def __init__(self, name: str, directory: Path = SHARED_MEMORY) -> None:
        """Take the name.

        Args:
            name: see ``cell_state_name``.
            directory: where shared memory is mounted.

        Raises:
            CellStateError: another process owns the name, or shared memory cannot be used.
        """
        self._path = _path(name, directory)
        self._file = self._take()
        try:
            os.ftruncate(self._file, _SIZE)
            self._memory = mmap.mmap(self._file, _SIZE)
            self._memory[:_CURRENT_AT] = _MAGIC
        except OSError as error:
            self._path.unlink()
            os.close(self._file)
            raise CellStateError(f"{self._path}: cannot hold {_SIZE} bytes of shared memory: {error}") from error
        self._number = 0
        self._closed = False

    def _take(self) -> int:
        """Return a descriptor of an empty file with its lock held.

        A killed writer's file is replaced, not reused: truncating it would crash readers that still map it.
        """
        for _ in range(_LOCK_ATTEMPTS):
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise CellStateError(f"{self._path}: cannot create the simulated cell's record: {error}") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), self._path.stat()):
                    if os.fstat(file).st_size == 0:
                        return file
                    self._path.unlink()
            except BlockingIOError:
                time.sleep(_LOCK_PAUSE_S)  # a cell that is stopping, or a reader that looks whether its cell lives
            except FileNotFoundError:
                pass  # the previous owner closed between open and lock: take the new file
            os.close(file)
        raise CellStateError(
            f"{self._path}: another simulated cell runs in this ROS domain and namespace; stop it, or start this one "
            "in another namespace or ROS_DOMAIN_ID"
        )

    def write(self, state: ArrayLike, target: ArrayLike | None, stamp_ns: int | None = None) -> None:
        """Publish ``state`` (5,) and ``target`` (2,) px (None: no command yet), stamped now unless given.

        Raises:
            ValueError: the state or target is not made of finite numbers of that shape; the old record stays.
            CellStateError: the writer is closed.
        """
        if self._closed:
            raise CellStateError(f"{self._path}: the writer is closed")
        values = check_state(state)
        goal = np.full(2, np.nan) if target is None else np.asarray(target, dtype=np.float64)
        if goal.shape != (2,) or (target is not None and not np.isfinite(goal).all()):
            raise ValueError(f"target: expected two finite numbers (x, y in px), got {goal.tolist()}")
        stamp = time.monotonic_ns() if stamp_ns is None else stamp_ns
        number = self._number + 1
        payload = _PAYLOAD.pack(number, stamp, *values.tolist(), *goal.tolist())
        slot = payload + _CHECKSUM.pack(zlib.crc32(payload))
        memory, start = self._memory, _slot_at(number)
        memory[start : start + len(slot)] = slot
        memory[_CURRENT_AT:_SLOTS_AT] = _CURRENT.pack(number)
        self._number = number

    def close(self) -> None:
        """Remove the record; safe to call more than once. Readers then report that the cell is gone."""
        if self._closed:
            return
        self._closed = True
        self._path.unlink(missing_ok=True)  # before the lock is let go, so that nobody's new record is removed
        self._memory.close()
        os.close(self._file)


class CellStateReader:
    """Reads the record ``name``. The cell may start after, stop before, or restart under the reader."""

    def __init__(self, name: str, maximum_age_s: float | None = None, directory: Path = SHARED_MEMORY) -> None:
        """Choose the cell; it is looked for when it is read.

        Args:
            name: see ``cell_state_name``.
            maximum_age_s: refuse a record older than this; None accepts any age while the cell's process lives (a
                cell in lockstep stands still for as long as the policy thinks).
            directory: where shared memory is mounted.
        """
        if maximum_age_s is not None and not maximum_age_s > 0:
            raise ValueError(f"maximum_age_s: expected a positive number of seconds or None, got {maximum_age_s}")
        self._path = _path(name, directory)
        self._maximum_age_s = maximum_age_s
        self._file = -1
        self._memory: mmap.mmap | None = None

    def read(self) -> CellState:
        """Return a consistent copy of the newest state.

        Raises:
            CellStateError: no cell runs under this name, its process has died, it has shown nothing yet, or its state
                is older than ``maximum_age_s``. The next call looks again.
        """
        if self._memory is None:
            self._attach()
        try:
            self._check_alive()
            state = self._copy()
        except CellStateError:
            self.close()
            raise
        if self._maximum_age_s is not None:
            age = (time.monotonic_ns() - state.stamp_ns) * 1e-9
            if age > self._maximum_age_s:
                raise CellStateError(
                    f"{self._path}: the simulated cell's state is {age:.2f} s old (at most {self._maximum_age_s:g} s "
                    "are accepted): its process runs but does not tick"
                )
        return state

    def close(self) -> None:
        """Let go of the record; safe to call more than once. A later ``read`` attaches again."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _attach(self) -> None:
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            if os.fstat(self._file).st_size == _SIZE:
                self._memory = mmap.mmap(self._file, _SIZE, prot=mmap.PROT_READ)
                return
        except FileNotFoundError as error:
            raise CellStateError(
                f"{self._path}: no simulated cell runs in this ROS domain and namespace; start one (cell:=pusht)"
            ) from error
        except OSError as error:
            self.close()
            raise CellStateError(f"{self._path}: cannot read the simulated cell's state: {error}") from error
        self.close()
        raise CellStateError(f"{self._path}: not a complete record of a simulated cell (expected {_SIZE} bytes)")

    def _check_alive(self) -> None:
        """Raise when nobody holds the writer's lock."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        fcntl.flock(self._file, fcntl.LOCK_UN)
        raise CellStateError(f"{self._path}: the simulated cell that showed its state here is gone")

    def _copy(self) -> CellState:
        memory = self._memory
        assert memory is not None  # read() attaches first
        if memory[:_CURRENT_AT] != _MAGIC:
            raise CellStateError(f"{self._path}: written by another version; stop the cell and start it again")
        number = 0
        for _ in range(_READ_ATTEMPTS):
            (number,) = _CURRENT.unpack_from(memory, _CURRENT_AT)
            start = _slot_at(number)
            slot = memory[start : start + _PAYLOAD.size + _CHECKSUM.size]
            payload = slot[: _PAYLOAD.size]
            found, stamp, *numbers = _PAYLOAD.unpack(payload)
            (checksum,) = _CHECKSUM.unpack_from(slot, _PAYLOAD.size)
            if number != 0 and found == number and checksum == zlib.crc32(payload):
                target = np.array(numbers[5:])
                return CellState(number, stamp, np.array(numbers[:5]), None if np.isnan(target).any() else target)
        if number == 0:
            raise CellStateError(f"{self._path}: the simulated cell has not shown a state yet: reset it first")
        raise CellStateError(f"{self._path}: no consistent state in {_READ_ATTEMPTS} attempts: the record is damaged")
