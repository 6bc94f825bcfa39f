"""Damage on the line of a force/torque sensor, and what the stream parser makes of it.

:func:`fuzz` sends random and damaged chunks between intact frames and counts false wrenches; :func:`fuzz_collisions`
measures what a CRC cannot see, by damaging frames and giving them a valid CRC afterwards.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dcqfa_ros.drivers.ft300s_protocol import FRAME_BYTES, HEADER, NEAR, Counts, StreamParser, encode_frame
from dcqfa_ros.drivers.modbus import crc16

_BATCH = 1000
_SLOPES = (
    50,
    50,
    50,
    25,
    25,
    25,
)  # most counts by which an intact frame differs from the one before: 50 N/s, 2.5 N m/s
_NOISE = (10, 10, 10, 5, 5, 5)
_HEADER_VALUE = int.from_bytes(HEADER, "little")  # 200 N: a payload that holds the header
_EXAMPLES = 5

Damage = Callable[[bytes, random.Random], bytes]


@dataclass
class FuzzReport:
    """Result of a campaign.

    Attributes:
        chunks: damaged or random chunks sent.
        octets: bytes sent in all.
        intact: intact frames sent between them.
        wrenches: frames the parser believed.
        false_wrenches: believed frames that differ from what the sensor read by more than ``NEAR`` (0.8 N, 0.04 N m).
        altered: believed frames that differ from it by less, which no receiver can tell from the sensor's noise: damage
            of more than 16 bits that met the CRC.
        collisions: damaged frames that met header and CRC at the right place.
        exceptions: exceptions out of the parser.
        recoveries: stretches of at least two intact frames after damage.
        recovery_frames: most intact frames after damage up to and with the first believed one.
        late_recoveries: stretches in which the second intact frame was not believed.
        remembered: most bytes that the parser kept.
        examples: the first few failures, for people.
    """

    chunks: int = 0
    octets: int = 0
    intact: int = 0
    wrenches: int = 0
    false_wrenches: int = 0
    altered: int = 0
    collisions: int = 0
    exceptions: int = 0
    recoveries: int = 0
    recovery_frames: int = 0
    late_recoveries: int = 0
    remembered: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """No false wrench, no exception, and every recovery within two intact frames."""
        return not (self.false_wrenches or self.exceptions or self.late_recoveries) and self.recovery_frames <= 2


def _bits(frame: bytes, rng: random.Random) -> bytes:
    value = int.from_bytes(frame, "little")
    for _ in range(rng.randint(1, 8)):
        value ^= 1 << rng.randrange(8 * len(frame))
    return value.to_bytes(len(frame), "little")


def _burst(frame: bytes, rng: random.Random) -> bytes:
    length = rng.randint(1, 12)
    start = rng.randrange(len(frame) - length + 1)
    return frame[:start] + rng.randbytes(length) + frame[start + length :]


def _scatter(frame: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(frame)
    for _ in range(rng.randint(2, 8)):
        damaged[rng.randrange(len(frame))] = rng.randrange(256)
    return bytes(damaged)


def _cut(frame: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(frame))
    return frame[:start] + frame[start + rng.randint(1, len(frame)) :]


def _inserted(frame: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(1, len(frame))  # bytes before a frame would leave it intact
    return frame[:start] + rng.randbytes(rng.randint(1, 8)) + frame[start:]


def _noise(_frame: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(1, 40))


def _headers(_frame: bytes, rng: random.Random) -> bytes:
    return HEADER + rng.randbytes(14) if rng.random() < 0.5 else HEADER * rng.randint(1, 12)


DAMAGES: tuple[Damage, ...] = (
    _bits, _burst, _scatter, _cut, _inserted, _noise, _headers,
)  # fmt: skip
"""Flipped bits, overwritten bytes in a row and scattered, lost and inserted bytes, noise, headers without frames."""


class _Signal:
    """Readings as of an arm that touches things: bounded slopes, sometimes a load that looks like the header."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._values = [0, 0, 900, 0, 0, 0]
        self._slopes = [0] * 6
        self._moving = self._resting = 0

    def next(self) -> Counts:
        """Return the next reading."""
        rng = self._rng
        if self._moving:
            self._moving -= 1
            self._values = [v + s for v, s in zip(self._values, self._slopes, strict=True)]
        elif self._resting:
            self._resting -= 1
        else:
            self._choose()
        a, b, c, d, e, f = (v + int(rng.random() * (2 * n + 1)) - n for v, n in zip(self._values, _NOISE, strict=True))
        return a, b, c, d, e, f

    def _choose(self) -> None:
        rng = self._rng
        if rng.random() < 0.3:
            goals = [_HEADER_VALUE, 0, 0, 0, 0, 0]
            rng.shuffle(goals)
        else:
            goals = [rng.randint(-15_000, 15_000) for _ in range(6)]
        ways = [goal - value for goal, value in zip(goals, self._values, strict=True)]
        self._moving = 1 + max(abs(way) // slope for way, slope in zip(ways, _SLOPES, strict=True))
        self._slopes = [int(way / self._moving) for way in ways]
        self._resting = rng.randint(20, 200)


def fuzz(
    chunks: int,
    seed: int = 0,
    parser: StreamParser | None = None,
    damages: tuple[Damage, ...] = DAMAGES,
) -> FuzzReport:
    """Feed ``chunks`` random or damaged chunks, each followed by none to five intact frames, cut at random places.

    Args:
        chunks: how many damaged chunks.
        seed: of everything random; equal seeds give equal campaigns.
        parser: the parser to try; a new one by default.
        damages: what makes a damaged chunk from a frame.

    About 20 s for a million chunks on one core.
    """
    rng = random.Random(seed)
    signal = _Signal(rng)
    parser = StreamParser() if parser is None else parser
    report = FuzzReport()
    offset = 0
    for first in range(0, chunks, _BATCH):
        stream = bytearray()
        intact: dict[int, Counts] = {}
        stretches: list[list[int]] = []
        damaged: list[tuple[int, int, bytes, Counts]] = []
        readings: list[tuple[int, Counts]] = []
        for _ in range(min(_BATCH, chunks - first)):
            counts = signal.next()
            frame = encode_frame(counts)
            chunk = rng.choice(damages)(frame, rng)
            damaged.append((len(stream), len(chunk), frame, counts))
            stream += chunk
            readings.append((offset + len(stream), counts))
            report.chunks += 1
            if chunk != frame and len(chunk) == FRAME_BYTES and chunk.startswith(HEADER):
                report.collisions += crc16(chunk[:14]) == int.from_bytes(chunk[14:], "little")
            stretch = []
            last = len(damaged) == _BATCH  # a batch ends with an intact frame, which nothing behind it can complete
            for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 2, 3, 5)) or last):
                counts = signal.next()
                stream += encode_frame(counts)
                intact[offset + len(stream)] = counts
                readings.append((offset + len(stream), counts))
                stretch.append(offset + len(stream))
            stretches.append(stretch)
        _keep_survivors(damaged, stream, offset, intact, stretches)
        report.intact += sum(len(stretch) for stretch in stretches)
        believed = _feed(parser, bytes(stream), offset, intact, readings, report, rng)
        offset += len(stream)
        _judge_recovery(stretches, believed, report)
    report.octets = offset
    return report


def _keep_survivors(
    damaged: list[tuple[int, int, bytes, Counts]],
    stream: bytearray,
    offset: int,
    intact: dict[int, Counts],
    stretches: list[list[int]],
) -> None:
    """Count a frame as intact that stands whole on the line in spite of its damage.

    So it is when its lost last byte equals the byte behind it, which the next frame has then lost, or when the chunk
    before ends with its lost first bytes.
    """
    for (start, length, frame, counts), stretch in zip(damaged, stretches, strict=True):
        found = stream.find(frame, max(0, start - FRAME_BYTES + 1), start + length + FRAME_BYTES - 1)
        if found >= 0:
            end = found + FRAME_BYTES
            intact[offset + end] = counts
            if end > start + length:
                del stretch[:1]


def _feed(
    parser: StreamParser,
    stream: bytes,
    offset: int,
    intact: dict[int, Counts],
    readings: list[tuple[int, Counts]],
    report: FuzzReport,
    rng: random.Random,
) -> set[int]:
    """Feed ``stream``, whose first byte is the ``offset``-th of all; return where believed intact frames end."""
    believed: set[int] = set()
    for piece, fed in _pieces(stream, rng):
        try:
            frames = parser.feed(piece)
        except Exception as error:  # noqa: BLE001 - counting them is the purpose
            report.exceptions += 1
            _note(report, f"{type(error).__name__}: {error} at byte {offset + fed}")
            continue
        for frame in frames:
            end = offset + fed - frame.trailing
            report.wrenches += 1
            if intact.get(end) == frame.counts:
                believed.add(end)
            elif _near(frame.counts, end, readings):
                report.altered += 1
            else:
                report.false_wrenches += 1
                _note(report, f"false wrench {frame.counts} that ends at byte {end}")
        report.remembered = max(report.remembered, parser.pending)
    return believed


def _near(counts: Counts, end: int, readings: list[tuple[int, Counts]]) -> bool:
    """Return whether the frame that ends at ``end`` is like the reading that was sent there, or its neighbours."""
    at = bisect.bisect_left(readings, (end,))
    return any(
        all(abs(a - b) <= limit for a, b, limit in zip(counts, sent, NEAR, strict=True))
        for _, sent in readings[max(0, at - 1) : at + 2]
    )


def _pieces(stream: bytes, rng: random.Random) -> Iterator[tuple[bytes, int]]:
    """Cut at random: mostly a few bytes, sometimes many frames; yield each piece and where it ends."""
    position = 0
    while position < len(stream):
        length = 1 + int(rng.random() * (40 if rng.random() < 0.9 else 400))
        piece = stream[position : position + length]
        position += len(piece)
        yield piece, position


def _judge_recovery(stretches: list[list[int]], believed: set[int], report: FuzzReport) -> None:
    for stretch in stretches:
        at = next((index for index, end in enumerate(stretch, 1) if end in believed), None)
        if at is not None:
            report.recovery_frames = max(report.recovery_frames, at)
        if len(stretch) >= 2:
            report.recoveries += 1
            if at is None or at > 2:
                report.late_recoveries += 1
                _note(report, f"no wrench by the second intact frame, which ends at byte {stretch[1]}")


def _note(report: FuzzReport, text: str) -> None:
    if len(report.examples) < _EXAMPLES:
        report.examples.append(text)


def _collision(damage: Damage) -> Damage:
    """Return damage that a CRC-16 may miss: more than three bits, not all within 16, in payload and CRC only."""

    def collide(frame: bytes, rng: random.Random) -> bytes:
        while True:
            damaged = damage(frame, rng)
            error = int.from_bytes(damaged, "big") ^ int.from_bytes(frame, "big")
            span = error.bit_length() - (error & -error).bit_length() + 1
            if damaged.startswith(HEADER) and error and span > 16 and error.bit_count() > 3:
                body = damaged[:14]
                return body + crc16(body).to_bytes(2, "little")

    return collide


def fuzz_collisions(chunks: int, seed: int = 0) -> tuple[float, FuzzReport]:
    """Let one of twenty damaged chunks be a frame with a damaged payload that meets the CRC all the same.

    Returns:
        Share of these frames that became false wrenches, and the report. Real damage meets the CRC once in 65,536
        times: the share divided by 65,536 is the chance that a frame with a damaged payload becomes a false wrench.
    """
    colliding = tuple(_collision(damage) for damage in (_bits, _burst, _scatter))
    report = fuzz(chunks, seed, damages=(*colliding, *DAMAGES * 8))
    return report.false_wrenches / max(1, report.collisions), report
