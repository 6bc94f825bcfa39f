"""What a force/torque sensor reads of the tool itself, taken off: bias, weight, zero; and a low-pass filter.

Conventions: a wrench is the load that acts on the sensor's tool side, in the sensor's frame, Fx Fy Fz (N) then Mx My Mz
(N m), float64 (6,). A tool of mass m (kg) whose centre of mass is at c (m, sensor frame) loads the sensor with
``F = m g``, ``M = c x m g``, where g is the acceleration of gravity in the sensor's frame.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcqfa_ros.errors import UserError
from dcqfa_ros.rotations import rotation_of

Floats = NDArray[np.float64]

GRAVITY = 9.80665
"""Standard gravity, m/s^2, along -z of ``world``."""
MAX_MASS_KG = 30.0
MAX_ARM_M = 1.0
ZERO_SAMPLES = 200
"""Readings whose mean becomes the zero: 2 s of the stream."""
STEADY_FORCE_N, STEADY_TORQUE_NM = 0.5, 0.05
"""Largest standard deviation, and change from the first to the second half, of readings that count as steady."""
STEADY_ANGLE_RAD = math.radians(0.5)
"""Largest turn of the sensor during such readings."""


class ToolLoadError(UserError, ValueError):
    """A tool load or an orientation that cannot be; the message names the field and what was expected."""


class ZeroRefusedError(UserError):
    """The present load cannot be taken as zero; the message says why and what to do. The zero stays as it was."""


@dataclass(frozen=True)
class ToolLoad:
    """What hangs on the sensor, and what the sensor reads with nothing on it.

    Attributes:
        mass: kg.
        centre_of_mass: (3,) m, sensor frame.
        bias: (6,) N and N m, sensor frame.
    """

    mass: float = 0.0
    centre_of_mass: tuple[float, ...] = (0.0, 0.0, 0.0)
    bias: tuple[float, ...] = (0.0,) * 6

    def __post_init__(self) -> None:
        """Refuse what no tool is.

        Raises:
            ToolLoadError: a number is missing, not finite or out of range; the message names the field.
        """
        if not 0.0 <= self.mass <= MAX_MASS_KG:
            raise ToolLoadError(f"mass: expected 0 to {MAX_MASS_KG:g} kg, got {self.mass}")
        _check("centre_of_mass", self.centre_of_mass, 3, MAX_ARM_M, "m")
        _check("bias", self.bias, 6, 300.0, "N, N m")

    def weight(self, rotation: Floats) -> Floats:
        """Return the load (6,) of the tool's weight with the sensor at ``rotation`` (3, 3): sensor to world."""
        force = -self.mass * GRAVITY * rotation[2]
        return np.concatenate([force, np.cross(np.asarray(self.centre_of_mass), force)])


def _check(name: str, values: Sequence[float], count: int, limit: float, unit: str) -> None:
    if len(values) != count or not all(abs(value) <= limit for value in values):
        raise ToolLoadError(f"{name}: expected {count} numbers within +-{limit:g} ({unit}), got {list(values)}")


def rotation_matrix(quaternion: ArrayLike, name: str = "orientation") -> Floats:
    """Return the matrix (3, 3) of a quaternion (x, y, z, w), which is normalised first.

    Raises:
        ToolLoadError: not four finite numbers, or none that differs clearly from zero.
    """
    q = np.asarray(quaternion, dtype=np.float64)
    norm = float(np.linalg.norm(q)) if q.shape == (4,) else math.nan
    if not 0.5 < norm < 2.0:
        raise ToolLoadError(f"{name}: expected a unit quaternion (x, y, z, w), got {q.tolist()}")
    return rotation_of(q)


class LowPass:
    """First-order low-pass filter for readings that need not come evenly; it begins anew after a gap."""

    def __init__(self, cutoff_hz: float, gap_s: float = 0.2) -> None:
        """Set the cut-off (-3 dB), Hz; 0 passes everything. ``gap_s`` is the pause after which the past is forgotten.

        Raises:
            ToolLoadError: the cut-off is negative or not finite.
        """
        if not 0.0 <= cutoff_hz < 1e6:
            raise ToolLoadError(f"low_pass_hz: expected 0 (off) or more, got {cutoff_hz}")
        self._cutoff, self._gap_ns = cutoff_hz, gap_s * 1e9
        self._stamp_ns = 0
        self._value: Floats | None = None

    def update(self, stamp_ns: int, value: Floats) -> Floats:
        """Return the filtered ``value`` of the reading taken at ``stamp_ns``."""
        if self._cutoff == 0.0:
            return value
        passed_ns = stamp_ns - self._stamp_ns
        if self._value is None or not 0 < passed_ns <= self._gap_ns:
            self._value = value
        else:
            share = 1.0 - math.exp(-2.0 * math.pi * self._cutoff * passed_ns * 1e-9)
            self._value = self._value + share * (value - self._value)
        self._stamp_ns = stamp_ns
        return self._value


@dataclass(frozen=True)
class _Reading:
    stamp_ns: int
    raw: Floats
    remainder: Floats  # what is left of raw without bias and weight
    rotation: Floats | None


class WrenchCompensation:
    """Turns raw readings into contact wrenches, keeps the newest ones for zeroing and for their noise.

    Not thread-safe.
    """

    def __init__(
        self, load: ToolLoad, sensor_rotation: ArrayLike = (0.0, 0.0, 0.0, 1.0), low_pass_hz: float = 0.0
    ) -> None:
        """Set tool and mounting.

        Args:
            load: tool and bias.
            sensor_rotation: orientation of the sensor's frame in the frame whose orientation :meth:`update` is given
                (the tool centre point's), quaternion (x, y, z, w).
            low_pass_hz: cut-off of the filter, 0: none.

        Raises:
            ToolLoadError: a value is out of range.
        """
        self.load = load
        self._mounting = rotation_matrix(sensor_rotation, "sensor_rotation")
        self._filter = LowPass(low_pass_hz)
        self._readings: deque[_Reading] = deque(maxlen=ZERO_SAMPLES)
        self.zero: Floats = np.zeros(6)

    @property
    def needs_orientation(self) -> bool:
        """Whether the tool has a weight to take off."""
        return self.load.mass > 0.0

    def update(self, stamp_ns: int, raw: Floats, orientation: Floats | None) -> Floats:
        """Return the contact wrench (6,) for the reading ``raw`` (6,) taken at ``stamp_ns`` (monotonic).

        Args:
            stamp_ns: when it was taken.
            raw: as the sensor sent it.
            orientation: of the tool centre point in ``world``, quaternion (4,); None where it is not known: then the
                tool's weight stays in the result.

        Raises:
            ToolLoadError: ``orientation`` is no unit quaternion.
        """
        rotation = None if orientation is None else rotation_matrix(orientation) @ self._mounting
        remainder = raw - np.asarray(self.load.bias)
        if rotation is not None:
            remainder = remainder - self.load.weight(rotation)
        if self._readings and not 0 < stamp_ns - self._readings[-1].stamp_ns < 200_000_000:
            self._readings.clear()
        self._readings.append(_Reading(stamp_ns, raw, remainder, rotation))
        return self._filter.update(stamp_ns, remainder - self.zero)

    def forget(self) -> None:
        """Forget the newest readings, which are not measurements (overrange) or not continuous."""
        self._readings.clear()

    def take_zero(self) -> Floats:
        """Take the mean of the newest readings as zero and return it (6,).

        Raises:
            ZeroRefusedError: too few readings, the load or the arm moves, or the weight cannot be told from the zero.
        """
        readings = list(self._readings)
        if len(readings) < ZERO_SAMPLES:
            raise ZeroRefusedError(
                f"zero refused: {len(readings)} of {ZERO_SAMPLES} readings in a row so far; keep the tool still and "
                "free, and ask again"
            )
        rotations = [r.rotation for r in readings if r.rotation is not None]
        if self.needs_orientation and len(rotations) < len(readings):
            raise ZeroRefusedError(
                f"zero refused: mass is {self.load.mass:g} kg but tcp_pose does not come, so that the zero would hold "
                "the tool's weight in this orientation; start the arm's node, or set mass to 0"
            )
        turn = max(
            (angle_between(rotations[0], rotation) for rotation in rotations[:: max(1, len(rotations) // 10)]),
            default=0.0,
        )
        if turn > STEADY_ANGLE_RAD:
            raise ZeroRefusedError(
                f"zero refused: the arm turned by {math.degrees(turn):.1f} degrees while {ZERO_SAMPLES} readings came, "
                f"expected at most {math.degrees(STEADY_ANGLE_RAD):g}; keep it still"
            )
        values = np.array([r.remainder for r in readings])
        problem = unsteady(values)
        if problem:
            raise ZeroRefusedError(f"zero refused: {problem}; keep the tool still and free, and ask again")
        self.zero = values.mean(axis=0)
        return self.zero

    def noise_covariance(self) -> Floats | None:
        """Return the covariance (6, 6) of the newest raw readings' noise, N and N m; None before there are 20.

        It is half the covariance of the differences of neighbours, so that slow changes of the load do not count.
        """
        if len(self._readings) < 20:
            return None
        raw = np.array([r.raw for r in list(self._readings)])
        return np.atleast_2d(np.cov(np.diff(raw, axis=0), rowvar=False)) / 2.0


def unsteady(values: Floats) -> str:
    """Return why wrenches (n, 6) were not taken under one steady load; empty when they were."""
    limits = np.array([STEADY_FORCE_N] * 3 + [STEADY_TORQUE_NM] * 3)
    half = len(values) // 2
    for name, spread in (
        ("is noisy", values.std(axis=0)),
        ("changes", np.abs(values[:half].mean(axis=0) - values[half:].mean(axis=0))),
    ):
        worst = int(np.argmax(spread / limits))
        if not spread[worst] <= limits[worst]:
            axis, unit = ("Fx", "Fy", "Fz", "Mx", "My", "Mz")[worst], "N" if worst < 3 else "N m"
            return f"{axis} {name} by {spread[worst]:.3g} {unit}, expected at most {limits[worst]:g}"
    return ""


def angle_between(a: Floats, b: Floats) -> float:
    """Return the angle, rad, between two rotations (3, 3)."""
    return float(np.arccos(np.clip((np.sum(a * b) - 1.0) / 2.0, -1.0, 1.0)))
