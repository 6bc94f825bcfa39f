"""What an emulated FT 300-S is, what it does wrong, and what it says of the frames it sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcqfa_ros.drivers import ft300s_protocol as ft
from dcqfa_ros.errors import UserError


def wrench_counts(wrench: Sequence[float]) -> ft.Counts:
    """Return counts for six values in N and N m, held at int16's ends as an overloaded sensor does."""
    if len(wrench) != 6 or not all(-1e9 < value < 1e9 for value in wrench):
        raise EmulatorError(f"wrench: expected six finite numbers (N, N m), got {list(wrench)}")
    scale = (ft.COUNTS_PER_NEWTON,) * 3 + (ft.COUNTS_PER_NEWTON_METRE,) * 3
    a, b, c, d, e, f = (max(-32768, min(32767, round(v * s))) for v, s in zip(wrench, scale, strict=True))
    return a, b, c, d, e, f


class EmulatorError(UserError):
    """The emulator cannot do what it was asked for; the message says what to do."""


@dataclass
class FT300SOptions:
    """What the emulated sensor is and does wrong.

    Attributes:
        link: path of a symbolic link to the pseudo-terminal, which disappears while unplugged; None: none.
        serial_number: like ``FTS-4711``.
        firmware: like ``FTS-1.2.3``.
        production_year: register 514.
        wrench: constant load, N and N m, until :meth:`FT300SEmulator.set_load`.
        noise: standard deviation of force, N; a hundredth of it in N m for torque.
        rate_hz: frames per second.
        paced: bytes leave one by one, as at 19200 baud; otherwise a frame leaves whole when its last byte would.
        boot_streaming: the sensor streams when it has booted, without being asked.
        stream_works: whether a request for the stream is obeyed.
        boot_s: time after plugging in before the sensor does anything.
        answer_delay_s: from a request's last byte to its answer's first.
        damaged_share: share of frames of which a byte is changed.
        cut_share: share of frames that lose some bytes.
        noise_share: share of frames before which random bytes come.
        seed: of noise and damage.
    """

    link: Path | None = None
    serial_number: str = "FTS-4711"
    firmware: str = "FTS-2.0.1"
    production_year: int = 2024
    wrench: Sequence[float] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    noise: float = 0.05
    rate_hz: float = ft.STREAM_HZ
    paced: bool = False
    boot_streaming: bool = False
    stream_works: bool = True
    boot_s: float = 0.0
    answer_delay_s: float = 0.004
    damaged_share: float = 0.0
    cut_share: float = 0.0
    noise_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no sensor could have.

        Raises:
            EmulatorError: one is out of range; the message names it.
        """
        if not 1.0 <= self.rate_hz <= ft.STREAM_HZ:
            raise EmulatorError(f"rate_hz: expected 1 to {ft.STREAM_HZ:g}, got {self.rate_hz}")
        for name in ("noise", "boot_s", "answer_delay_s"):
            if not 0.0 <= getattr(self, name) < 1e6:
                raise EmulatorError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("damaged_share", "cut_share", "noise_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise EmulatorError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        wrench_counts(self.wrench)
        try:
            ft.info_registers(ft.SensorInfo(self.serial_number, self.production_year, self.firmware))
        except ValueError as error:
            raise EmulatorError(str(error)) from error


@dataclass(frozen=True, slots=True)
class SentFrame:
    """One frame that left: its number from 0, when it was sampled and when its last byte left (monotonic ns), counts.

    ``intact`` is False when bytes of it were changed or lost.
    """

    number: int
    sampled_ns: int
    last_byte_ns: int
    counts: ft.Counts
    intact: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}
