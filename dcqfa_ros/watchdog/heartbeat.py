"""Heartbeats of arm_node, what the watchdog answers, and when it trips. No sockets, no clock."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

DEFAULT_TIMEOUT_S = 0.1
"""Silence of an armed arm_node after which the safe stop is tripped."""

_MAGIC = b"DCQW"
_BEAT = struct.Struct("<4sBBHQ")  # magic, version, armed, process tag, number
_REPLY = struct.Struct("<4sBBHQ")  # magic, version, status, process tag, number
_VERSION = 1


class Status(IntEnum):
    """What the watchdog says of itself in every reply."""

    READY = 0  # connected to the controller
    BLIND = 1  # not connected: it could not stop the arm
    TRIPPED = 2  # it has tripped, and has not seen arm_node disarmed since


@dataclass(frozen=True)
class Beat:
    """One sign of life: whether the arm is armed, a tag of the sending process, and a running number."""

    armed: bool
    tag: int
    number: int

    def encode(self) -> bytes:
        """Return the datagram."""
        return _BEAT.pack(_MAGIC, _VERSION, self.armed, self.tag, self.number)

    @classmethod
    def decode(cls, data: bytes) -> Beat | None:
        """Return the beat in a datagram, None where it is none."""
        if len(data) != _BEAT.size:
            return None
        magic, version, armed, tag, number = _BEAT.unpack(data)
        return cls(bool(armed), tag, number) if magic == _MAGIC and version == _VERSION and armed < 2 else None


@dataclass(frozen=True)
class Reply:
    """The watchdog's answer to a beat."""

    status: Status
    tag: int
    number: int

    def encode(self) -> bytes:
        """Return the datagram."""
        return _REPLY.pack(_MAGIC, _VERSION, self.status, self.tag, self.number)

    @classmethod
    def decode(cls, data: bytes) -> Reply | None:
        """Return the reply in a datagram, None where it is none."""
        if len(data) != _REPLY.size:
            return None
        magic, version, status, tag, number = _REPLY.unpack(data)
        return cls(Status(status), tag, number) if magic == _MAGIC and version == _VERSION and status < 3 else None


class Monitor:
    """Says when to trip: an armed process has been silent for longer than the time-out.

    Attributes:
        tripped: whether it has, and nobody has been heard disarmed since.
        beats: valid beats so far.
        strangers: beats of another process than the one watched, which are ignored while that one is armed.
    """

    def __init__(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Watch nobody yet.

        Raises:
            ValueError: the time-out is not within 0.02 to 1 s.
        """
        if not 0.02 <= timeout_s <= 1.0:
            raise ValueError(f"time-out {timeout_s} s: expected 0.02 to 1")
        self.timeout_s = timeout_s
        self.tripped = False
        self.beats = self.strangers = 0
        self._armed_tag: int | None = None
        self._seen_s = 0.0

    @property
    def watching(self) -> bool:
        """Whether silence would trip."""
        return self._armed_tag is not None and not self.tripped

    def feed(self, beat: Beat, now_s: float) -> bool:
        """Take in a beat that arrived at ``now_s``; returns False where it is a stranger's and ignored."""
        if self._armed_tag is not None and beat.tag != self._armed_tag and not self.tripped:
            self.strangers += 1
            return False
        self.beats += 1
        self._seen_s = now_s
        if not beat.armed:
            self._armed_tag, self.tripped = None, False
        elif not self.tripped:
            self._armed_tag = beat.tag
        return True

    def wait_s(self, now_s: float) -> float | None:
        """Return the seconds until :meth:`due` may become true; None while nobody is watched."""
        return max(0.0, self._seen_s + self.timeout_s - now_s) if self.watching else None

    def due(self, now_s: float) -> bool:
        """Whether to trip now; true once per silence."""
        if self.watching and now_s - self._seen_s >= self.timeout_s:
            self.tripped = True
            return True
        return False
