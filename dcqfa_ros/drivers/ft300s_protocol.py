"""Bytes on the line of a Robotiq FT 300-S: registers, stream frames, and which frames are believed. Pure Python.

Source: Robotiq FT 300-S Instruction Manual, chapter 4 (control over Modbus RTU and data stream).

A stream frame is 16 bytes: ``20 4E``, six int16 little-endian (1/100 N, 1/1000 N m), CRC-16. The header also occurs in
payloads, so frames are told by their CRC.

**When a frame is believed.** A CRC-16 lets one in 65,536 randomly damaged frames pass; with the header, random bytes
look like a frame once in 2^32 positions. That is too often for a force guard, so more is asked for:

* A frame counts only when it begins where the one before it ended. After any loss, therefore, the second of two
  adjacent valid frames is the first one believed: random bytes do that once in 2^64 positions.
* For :data:`SUSPECT_FRAMES` frames (10 s) after any damage the line is *suspect*: a frame must also continue the course
  of those before within :data:`NEAR`. One that does not waits for the next frame, which says whether the change was
  real; at most :data:`MAX_WITHHELD` frames wait, so that no course of the load blinds the guard. On a line without
  damage nothing waits: a collision reaches the force guard with its own frame.

So after damage the second of two valid frames is believed while the load changes by less than :data:`NEAR` per frame
(80 N/s, 4 N m/s), and the third while it changes faster.

What remains is damage spread over more than 16 bits that follows a valid frame at once, meets the CRC (2^-16) *and*
keeps all six values within :data:`NEAR` of their course, or that comes alone after 10 s without damage.
``dcqfa_ros.sim.fuzz_ft300s`` measures it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from dcqfa_ros.drivers.modbus import crc16, read_request, write_request

SLAVE = 9
BAUD_RATE = 19_200
BYTE_NS = 10 * 1_000_000_000 // BAUD_RATE
"""Time of one byte on the line (8N1: ten bits)."""

HEADER = b"\x20\x4e"
FRAME_BYTES = 16
FRAME_NS = FRAME_BYTES * BYTE_NS
"""Time of one frame on the line, 8.33 ms."""
STREAM_HZ = 100.0
STREAM_PERIOD_NS = 10_000_000
POLL_HZ = 30.0
"""What reading the registers again and again reaches."""

WRENCH_REGISTER, ACCELERATION_REGISTER = 180, 190
STREAM_REGISTER, STREAM_ON = 410, 0x0200
FIRMWARE_REGISTER, SERIAL_NUMBER_REGISTER, PRODUCTION_YEAR_REGISTER = 500, 510, 514
REGISTER_COUNTS = {
    WRENCH_REGISTER: 6,
    ACCELERATION_REGISTER: 3,
    FIRMWARE_REGISTER: 3,
    SERIAL_NUMBER_REGISTER: 4,
    PRODUCTION_YEAR_REGISTER: 1,
}

STOP_SEQUENCE = b"\xff" * 50
"""Ends a stream; the sensor is silent for more than :data:`SILENCE_S` afterwards."""
SILENCE_S = 0.08

AXES = ("Fx", "Fy", "Fz", "Mx", "My", "Mz")
COUNTS_PER_NEWTON, COUNTS_PER_NEWTON_METRE = 100.0, 1000.0
OVERRANGE_COUNTS = 30_000
"""Measuring range of every axis: 300 N and 30 N m. Readings beyond it are no measurement."""

NEAR = (80, 80, 80, 40, 40, 40)
"""Change that is believed at once on a suspect line: 0.8 N, 0.04 N m (eight times the noise) in 10 ms, from the
reading before or from a straight course."""
FAR = (6000,) * 6
"""Change that is believed as part of a movement that goes on for a second frame: 60 N, 6 N m in 10 ms."""
MAX_WITHHELD = 3
"""At most so many adjacent valid frames are withheld, however the load changes."""
SUSPECT_FRAMES = 1000

Counts = tuple[int, int, int, int, int, int]
_PAYLOAD = struct.Struct("<6h")


@dataclass(frozen=True, slots=True)
class SensorInfo:
    """Who the sensor is, as its registers say: texts such as ``FTS-4711`` and ``FTS-1.2.3``, and the year."""

    serial_number: str
    production_year: int
    firmware: str


def wrench_request() -> bytes:
    """Return the request for one reading."""
    return read_request(SLAVE, WRENCH_REGISTER, REGISTER_COUNTS[WRENCH_REGISTER])


def info_requests() -> tuple[bytes, bytes]:
    """Return the requests whose answers :func:`sensor_info` reads."""
    identity = REGISTER_COUNTS[SERIAL_NUMBER_REGISTER] + REGISTER_COUNTS[PRODUCTION_YEAR_REGISTER]
    return (
        read_request(SLAVE, FIRMWARE_REGISTER, REGISTER_COUNTS[FIRMWARE_REGISTER]),
        read_request(SLAVE, SERIAL_NUMBER_REGISTER, identity),
    )


def stream_request() -> bytes:
    """Return the request that starts the stream."""
    return write_request(SLAVE, STREAM_REGISTER, [STREAM_ON])


def sensor_info(firmware: Sequence[int], identity: Sequence[int]) -> SensorInfo:
    """Read registers 500 to 502 and 510 to 514.

    Three characters come first in either text; the number of the serial number is in 512 (low) and 513 (high).
    """
    f = [byte for register in firmware for byte in divmod(register, 256)]
    s = [byte for register in identity[:2] for byte in divmod(register, 256)]
    number = (identity[3] << 16) | identity[2]
    return SensorInfo(
        serial_number=f"{_text(s[:3])}-{number:04d}" if number else "unknown",
        production_year=identity[4],
        firmware=f"{_text(f[:3])}-{f[3]}.{f[4]}.{f[5]}",
    )


def info_registers(info: SensorInfo) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return registers 500 to 502 and 510 to 514 for ``info``; the reverse of :func:`sensor_info`.

    Raises:
        ValueError: a text is not of the form ``ABC-1.2.3`` or ``ABC-4711``.
    """
    try:
        letters, _, version = info.firmware.partition("-")
        a, b, c, major, minor, patch = (*letters.encode("ascii"), *(int(part) for part in version.split(".")))
        firmware = tuple(high * 256 + low for high, low in ((a, b), (c, major), (minor, patch)))
        letters, _, digits = info.serial_number.partition("-")
        d, e, f = letters.encode("ascii")
        number = int(digits)
        identity = (d * 256 + e, f * 256, number & 0xFFFF, number >> 16, info.production_year)
        struct.pack(">3H5H", *firmware, *identity)
    except (ValueError, struct.error) as error:
        raise ValueError(
            f"sensor info: expected a firmware like 'FTS-1.2.3', a serial number like 'FTS-4711' and a year, got {info}"
        ) from error
    return firmware, identity


def encode_frame(counts: Sequence[int]) -> bytes:
    """Return the stream frame for six readings in counts (-32768..32767)."""
    body = HEADER + _PAYLOAD.pack(*counts)
    return body + crc16(body).to_bytes(2, "little")


def decode_frame(frame: bytes | bytearray) -> Counts | None:
    """Return the counts in 16 bytes, or None when header or CRC are not those of a frame."""
    if not frame.startswith(HEADER) or crc16(frame[:14]) != frame[14] | frame[15] << 8:
        return None
    return _PAYLOAD.unpack_from(frame, 2)  # type: ignore[return-value]  # "<6h" gives six


def signed(registers: Sequence[int]) -> Counts:
    """Return the counts in registers 180 to 185."""
    return tuple(value - 0x10000 if value & 0x8000 else value for value in registers)  # type: ignore[return-value]


def overrange(counts: Sequence[int]) -> tuple[str, ...]:
    """Return the axes that are beyond the measuring range."""
    return tuple(axis for axis, count in zip(AXES, counts, strict=True) if abs(count) > OVERRANGE_COUNTS)


@dataclass(frozen=True, slots=True)
class Link:
    """A valid reading to which the next one may be adjacent.

    Attributes:
        counts: the reading.
        trusted: the last believed one in the unbroken row up to here, None where there is none.
        before: the reading before this one in that row, None where there is none.
        withheld: how many at the end of the row were not believed; 0 when this one was.
    """

    counts: Counts
    trusted: Counts | None
    before: Counts | None
    withheld: int


class Trust:
    """Decides which valid readings are believed; see the module. ``suspect`` is how long the line stays suspect."""

    def __init__(self) -> None:
        """Begin with a line that nothing bad is known of."""
        self.suspect = 0

    def damaged(self) -> None:
        """Note damage on the line."""
        self.suspect = SUSPECT_FRAMES

    def judge(self, previous: Link | None, counts: Counts) -> Link:
        """Return the link of a valid reading; it is believed when its ``withheld`` is 0.

        Args:
            previous: link of the reading it is adjacent to, None where there is none.
            counts: the reading.
        """
        if previous is None:
            return Link(counts, None, None, 1)
        if self.suspect == 0 or _plausible(previous, counts):
            self.suspect = max(0, self.suspect - 1)
            return Link(counts, counts, previous.counts, 0)
        return Link(counts, previous.trusted, previous.counts, previous.withheld + 1)


def _plausible(previous: Link, counts: Counts) -> bool:
    last, before, trusted = previous.counts, previous.before, previous.trusted
    if previous.withheld == 0:
        return _within(counts, last, NEAR) or (before is not None and _within(counts, _continued(before, last), NEAR))
    if previous.withheld >= MAX_WITHHELD:
        return True
    if _within(counts, last, NEAR):
        return True
    if trusted is None:
        return previous.withheld > 1 and _within(counts, last, FAR)
    # Back where it was: what stood between was false. Or a second jump in a row: a movement.
    return _within(counts, trusted, NEAR) or _within(counts, last, FAR)


def _continued(a: Counts, b: Counts) -> Counts:
    return tuple(2 * y - x for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def _within(a: Counts, b: Counts, limits: tuple[int, ...]) -> bool:
    return all(-limit <= x - y <= limit for x, y, limit in zip(a, b, limits, strict=True))


@dataclass(frozen=True, slots=True)
class Frame:
    """A believed frame: its counts, and how many bytes came behind its last one in the same chunk."""

    counts: Counts
    trailing: int


class StreamParser:
    """Finds frames in a stream cut into chunks of any size; no input makes it raise or remember without bound.

    Attributes:
        valid: frames with header and CRC in place.
        believed: frames handed out.
        withheld: valid frames that were not believed (see the module).
        crc_errors: headers behind which no frame stood, outside of valid frames.
        discarded: bytes that belong to no valid frame.
        resyncs: times the stream was found again after a loss.
    """

    def __init__(self) -> None:
        """Begin before the first byte of a stream."""
        self.valid = self.believed = self.withheld = self.crc_errors = self.discarded = self.resyncs = 0
        self.trust = Trust()
        self._buffer = bytearray()
        self._base = 0  # where in the stream the buffer begins
        self._covered = 0  # up to where bytes are accounted for, as a valid frame's or as discarded
        self._links: dict[int, Link] = {}  # valid frames by where in the stream they end
        self._lost = False
        self._tail = FRAME_BYTES - 1  # so many bytes of a frame that began earlier may come first: no damage

    @property
    def pending(self) -> int:
        """Bytes that wait for more."""
        return len(self._buffer)

    def reset(self) -> None:
        """Forget what was received, for a stream that begins anew or is joined in the middle; the figures stay."""
        self._base += len(self._buffer)
        self._buffer.clear()
        self._covered = self._base
        self._links = {}
        self._tail = FRAME_BYTES - 1

    def feed(self, data: bytes) -> list[Frame]:
        """Take the next bytes and return the frames that they complete and that are believed, oldest first."""
        buffer = self._buffer
        buffer += data
        frames: list[Frame] = []
        position = 0
        while True:
            start = buffer.find(HEADER, position)
            if start < 0:
                kept = 1 if buffer.endswith(HEADER[:1]) else 0
                position = max(position, len(buffer) - kept)
                break
            position = start
            at = self._base + start
            self._discard(at)
            if len(buffer) - start < FRAME_BYTES:
                break
            counts = decode_frame(buffer[start : start + FRAME_BYTES])
            if counts is None:
                self.crc_errors += at >= self._covered and self._tail <= 0
                position = start + 1
                continue
            end = at + FRAME_BYTES
            link = self.trust.judge(self._links.get(at), counts)
            self.valid += 1
            self._tail = 0
            self._covered = max(self._covered, end)
            if link.withheld:
                # It may be no frame at all: the search goes on inside it.
                self.withheld += 1
                self._links[end] = link
                position = start + 1
                continue
            self._links = {end: link}
            self._believe(frames, counts, len(buffer) - start - FRAME_BYTES)
            position = start + FRAME_BYTES
        self._discard(self._base + position)
        del buffer[:position]
        self._base += position
        if len(self._links) > 1:
            self._links = {end: link for end, link in self._links.items() if end >= self._base}
        return frames

    def _believe(self, frames: list[Frame], counts: Counts, trailing: int) -> None:
        frames.append(Frame(counts, trailing))
        self.believed += 1
        self.resyncs += self._lost
        self._lost = False

    def _discard(self, end: int) -> None:
        """Account for the bytes before ``end`` that belong to no valid frame."""
        count = end - self._covered
        if count <= 0:
            return
        self._covered = end
        self._tail -= count
        if self._tail < 0:
            self.discarded += count
            self._lost = True
            self.trust.damaged()


def _text(characters: Sequence[int]) -> str:
    return "".join(chr(c) if 0x20 < c < 0x7F else "?" for c in characters)
