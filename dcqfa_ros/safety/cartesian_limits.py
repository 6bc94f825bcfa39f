"""Limits of a Cartesian velocity stream: speed, acceleration and jerk, and a workspace box with braking distance.

Each axis is a jerk-limited axis of its own, with 1/sqrt(3) of the limit on the length of the vector, so the vector
never exceeds its limit. A new velocity is emitted only if *braking from it* keeps every limit too: stays below the
speed limit and ends inside the box. Braking was possible from the velocity before, so there is always one to emit.
Plain Python numbers: six axes at 100 Hz cost less this way than small arrays do.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.errors import UserError
from dcqfa_ros.safety.limits import NotFiniteActionError

AXES = ("vx", "vy", "vz", "wx", "wy", "wz")
_STEPS = (1.0, 0.75, 0.5, 0.25, 0.125)  # shares of the way from braking to the wanted acceleration that are tried
_SHARE = 1.0 / sqrt(3.0)
_SHORTEST_S = 1e-4  # a call that follows another sooner changes nothing
_REACHED = 1e-12  # m/s and rad/s: a speed this near to what is wanted is that, or rest would never be exactly zero


class LimitError(UserError, ValueError):
    """A limit is absent, not finite, or beyond its hard maximum; the message names it and what is allowed."""


@dataclass(frozen=True, slots=True)
class MotionLimits:
    """Limits of the length of the linear and of the angular velocity vector and of their derivatives.

    Hard maxima (no configuration exceeds them): see :data:`HARD_MAXIMA`.

    Attributes:
        linear_speed, linear_acceleration, linear_jerk: m/s, m/s^2, m/s^3.
        angular_speed, angular_acceleration, angular_jerk: rad/s, rad/s^2, rad/s^3.
    """

    linear_speed: float
    linear_acceleration: float
    linear_jerk: float
    angular_speed: float
    angular_acceleration: float
    angular_jerk: float

    def __post_init__(self) -> None:
        """Refuse limits that are absent (NaN), not positive, or beyond the hard maximum.

        Raises:
            LimitError: names the limit.
        """
        for field in fields(self):
            _within(field.name, getattr(self, field.name), HARD_MAXIMA[field.name])


HARD_MAXIMA = {
    "linear_speed": 1.0,
    "linear_acceleration": 5.0,
    "linear_jerk": 200.0,
    "angular_speed": 2.0,
    "angular_acceleration": 10.0,
    "angular_jerk": 400.0,
}
"""Largest values that a configuration may ask for: those of careful work near people, not of the arm."""

MAXIMUM_REACH = 3.0
"""Metres from the base beyond which no workspace box may extend."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Box that the tool centre point must not leave, in ``world``, metres: (x, y, z) of two corners."""

    minimum: tuple[float, float, float]
    maximum: tuple[float, float, float]

    @classmethod
    def of(cls, minimum: Sequence[float], maximum: Sequence[float]) -> Workspace:
        """Return the box between two corners.

        Raises:
            LimitError: a corner is absent or not three finite numbers within reach, or they are the wrong way round.
        """
        low, high = _corner("minimum", minimum), _corner("maximum", maximum)
        for axis, a, b in zip("xyz", low, high, strict=True):
            if b - a < 1e-3:
                raise LimitError(f"workspace: minimum {axis} {a:g} is not below maximum {b:g} m")
        return cls(low, high)

    def holds(self, position: Sequence[float] | NDArray[np.floating], tolerance: float = 0.0) -> bool:
        """Whether ``position`` (3,) is inside, or outside by at most ``tolerance`` metres per axis."""
        return all(
            a - tolerance <= p <= b + tolerance for p, a, b in zip(position, self.minimum, self.maximum, strict=True)
        )


def _corner(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    numbers = [float(v) for v in values]
    if len(numbers) != 3 or not all(isfinite(v) and abs(v) <= MAXIMUM_REACH for v in numbers):
        raise LimitError(
            f"workspace: {name} is {numbers}, expected three numbers of at most {MAXIMUM_REACH:g} m; a cell without a "
            "workspace box is refused"
        )
    return numbers[0], numbers[1], numbers[2]


def _within(name: str, value: float, maximum: float) -> None:
    if not (isinstance(value, (int, float)) and isfinite(value) and 0.0 < value <= maximum):
        raise LimitError(f"limit {name}: expected a number above 0 and at most {maximum:g}, got {value}")


class AxisLimit:
    """Speed as a function of time with bounded acceleration and jerk, in steps of at most a period."""

    __slots__ = ("_step", "acceleration", "jerk")

    def __init__(self, acceleration: float, jerk: float, period_s: float) -> None:
        """Set the bounds (1/s^2 and 1/s^3 of the axis' unit) and the longest step in seconds."""
        self.acceleration, self.jerk = acceleration, jerk
        self._step = jerk * period_s  # the most by which the acceleration may change in one period

    def towards(self, target: float, v: float, a: float, dt: float) -> float:
        """Return the acceleration for the next ``dt`` s on the way from speed ``v``, acceleration ``a``, to ``target``.

        From rest it never overshoots: it is the largest acceleration that can be taken back to 0 in time, in steps.
        """
        error = target - v
        step = self._step
        wanted = sqrt(step * step + 2.0 * self.jerk * abs(error)) - step
        wanted = math.copysign(min(wanted, self.acceleration, abs(error) / dt), error)
        change = self.jerk * dt
        return min(max(wanted, a - change), a + change)

    def peak(self, v: float, a: float) -> float:
        """Largest speed, without its sign, that braking from (``v``, ``a``) passes through."""
        return max(abs(v), abs(v + a * abs(a) / (2.0 * self.jerk)))

    def excursion(self, v: float, a: float) -> float:
        """Distance in the positive direction, at most, that braking from (``v``, ``a``) still covers."""
        jerk = self.jerk
        if a >= 0.0:
            top = v + a * a / (2.0 * jerk)
            return top * (a / jerk) + self._stopping(top) if top > 0.0 else 0.0
        if v <= 0.0:
            return 0.0
        ramp = -a / jerk
        top = v - a * ramp / 2.0  # speed at which a braking that is now at `a` would have begun
        if jerk * top <= a * a:  # nearly at rest: it stops while the deceleration is being taken back
            return v * ramp
        return self._stopping(top) - (top * ramp - jerk * ramp**3 / 6.0)

    def _stopping(self, v: float) -> float:
        """Distance of a symmetrical braking from ``v`` at constant speed to rest."""
        if v * self.jerk >= self.acceleration**2:
            return v * (v / self.acceleration + self.acceleration / self.jerk) / 2.0
        return v * sqrt(v / self.jerk)


class TwistLimiter:
    """Bounds a stream of twists that is sampled once per period, or earlier.

    A step that comes early may change the velocity by as much less; one that comes late by no more than a period's.

    Attributes:
        clamped: how often each limit made a difference: ``linear_speed``, ``angular_speed``, ``acceleration``,
            ``workspace`` (the box slowed the arm down) and ``hard`` (it had to be slowed down faster than the
            acceleration limit, because the arm was not where its commands would have brought it).
        velocity: (6,) the twist of the last period, m/s and rad/s.
        acceleration: (6,) its change per second.
    """

    def __init__(
        self, limits: MotionLimits, workspace: Workspace, period_s: float, latency_s: float = 0.0, margin: float = 0.002
    ) -> None:
        """Begin at rest.

        Args:
            limits: of speed, acceleration and jerk.
            workspace: box of the tool centre point.
            period_s: longest time between two calls of :meth:`bound`, seconds.
            latency_s: time from a command to its motion, seconds, at most; the box keeps that much more distance.
            margin: distance that is always kept from the walls of the box, metres.

        Raises:
            LimitError: period, latency or margin are out of range.
        """
        _within("period_s", period_s, 0.1)
        if not (0.0 <= latency_s <= 0.5 and 0.0 <= margin <= 0.1):
            raise LimitError(f"latency {latency_s} s and margin {margin} m: expected 0 to 0.5 s and 0 to 0.1 m")
        self.limits, self.workspace, self.period_s = limits, workspace, period_s
        self.clamped = dict.fromkeys(("linear_speed", "angular_speed", "acceleration", "workspace", "hard"), 0)
        self._latency_ns, self._margin = round(latency_s * 1e9), margin
        linear = AxisLimit(limits.linear_acceleration * _SHARE, limits.linear_jerk * _SHARE, period_s)
        angular = AxisLimit(limits.angular_acceleration * _SHARE, limits.angular_jerk * _SHARE, period_s)
        self._axes = (linear,) * 3 + (angular,) * 3
        # Commands that may not show in the position yet; a position older than all of them stops the arm anyway.
        self._sent: deque[tuple[int, tuple[float, float, float]]] = deque(maxlen=256)
        self.velocity: tuple[float, ...] = (0.0,) * 6
        self.acceleration: tuple[float, ...] = (0.0,) * 6
        self._last_ns: int | None = None

    def reset(self) -> None:
        """Begin again at rest (the arm was stopped)."""
        self.velocity = self.acceleration = (0.0,) * 6
        self._sent.clear()
        self._last_ns = None

    def scale_down(self, factor: float) -> None:
        """Take the last twist to ``factor`` (0..1) of itself: a later stage had to; counted as ``hard``."""
        self.clamped["hard"] += 1
        self.velocity = tuple([v * factor for v in self.velocity])
        self.acceleration = (0.0,) * 6
        if self._sent:
            stamp, v = self._sent.pop()
            self._sent.append((stamp, (v[0] * factor, v[1] * factor, v[2] * factor)))

    def bound(
        self,
        twist: Sequence[float] | NDArray[np.floating],
        position: Sequence[float] | NDArray[np.floating],
        stamp_ns: int,
        now_ns: int,
    ) -> tuple[float, ...]:
        """Return the twist (6,) to send for this period.

        Args:
            twist: wanted (vx, vy, vz, wx, wy, wz), m/s and rad/s, ``world``.
            position: measured tool centre point (3,), metres, ``world``.
            stamp_ns: monotonic time of the measurement.
            now_ns: monotonic time.

        Raises:
            NotFiniteActionError: NaN, infinity, or not six numbers (three of the position); nothing has changed.
        """
        wanted = [float(v) for v in twist]
        place = [float(p) for p in position]
        _finite(wanted, place)
        self._to_speed(wanted, 0, self.limits.linear_speed, "linear_speed")
        self._to_speed(wanted, 3, self.limits.angular_speed, "angular_speed")
        dt = self.period_s if self._last_ns is None else min(self.period_s, (now_ns - self._last_ns) / 1e9)
        if dt < _SHORTEST_S:
            return self.velocity
        predicted = self._predict(place, stamp_ns, now_ns)
        steps = [
            axis.towards(w, v, a, dt)
            for axis, w, v, a in zip(self._axes, wanted, self.velocity, self.acceleration, strict=True)
        ]
        brakes = [
            axis.towards(0.0, v, a, dt) for axis, v, a in zip(self._axes, self.velocity, self.acceleration, strict=True)
        ]
        rooms = [
            (high - self._margin - p, p - low - self._margin)
            for p, low, high in zip(predicted, self.workspace.minimum, self.workspace.maximum, strict=True)
        ]
        for i in range(3):
            steps[i] = self._inside(i, steps[i], brakes[i], rooms[i], dt)
        self._coupled(steps, brakes, 0, self.limits.linear_speed, dt)
        self._coupled(steps, brakes, 3, self.limits.angular_speed, dt)
        new = [_reached(v + a * dt, w) for v, a, w in zip(self.velocity, steps, wanted, strict=True)]
        held = self._hold_back(new, rooms)
        self._within_speed(new, 0, self.limits.linear_speed)
        self._within_speed(new, 3, self.limits.angular_speed)
        if new != wanted:
            self.clamped["acceleration"] += 1
        # What had to be sudden is over: carried on as an acceleration it would run past zero to the other side.
        self.acceleration = tuple(
            [
                0.0 if i in held else min(max((n - v) / dt, -axis.acceleration), axis.acceleration)
                for i, (n, v, axis) in enumerate(zip(new, self.velocity, self._axes, strict=True))
            ]
        )
        self.velocity = tuple(new)
        self._last_ns = now_ns
        self._sent.append((now_ns, (new[0], new[1], new[2])))
        return self.velocity

    def _to_speed(self, twist: list[float], first: int, limit: float, name: str) -> None:
        """Shorten three entries of ``twist`` to ``limit``, keeping their direction."""
        largest = max(abs(v) for v in twist[first : first + 3])
        if largest == 0.0:
            return
        # Scaled before squaring: 1e300 is a finite command too.
        length = largest * sqrt(sum((v / largest) ** 2 for v in twist[first : first + 3]))
        if length > limit:
            self.clamped[name] += 1
            for i in range(first, first + 3):
                twist[i] = (twist[i] / largest) * (limit * (1.0 - 1e-9) / (length / largest))

    def _predict(self, place: list[float], stamp_ns: int, now_ns: int) -> list[float]:
        """Where the tool centre point will be once everything sent so far has been executed."""
        seen_ns = min(stamp_ns, now_ns) - self._latency_ns  # commands sent before show in the position
        while len(self._sent) > 1 and self._sent[1][0] <= seen_ns:
            self._sent.popleft()
        predicted = list(place)
        for index, (begin, v) in enumerate(self._sent):
            end = self._sent[index + 1][0] if index + 1 < len(self._sent) else now_ns
            seconds = max(0, end - max(begin, seen_ns)) * 1e-9
            for i in range(3):
                predicted[i] += v[i] * seconds
        return predicted

    def _inside(self, i: int, step: float, brake: float, room: tuple[float, float], dt: float) -> float:
        """Return the acceleration nearest to ``step``, from ``brake`` on, after which braking ends inside the box."""
        axis, v = self._axes[i], self.velocity[i]
        for share in _STEPS:
            a = brake + (step - brake) * share
            after = v + a * dt
            # The period itself, during which the arm may also hold this speed, and one more for a late tick.
            reach = 2.0 * self.period_s * abs(after)
            ahead, behind = axis.excursion(after, a), axis.excursion(-after, -a)
            if (ahead == 0.0 or ahead + reach <= room[0]) and (behind == 0.0 or behind + reach <= room[1]):
                if share < 1.0:
                    self.clamped["workspace"] += 1
                return a
        self.clamped["workspace"] += 1
        return brake

    def _coupled(self, steps: list[float], brakes: list[float], first: int, limit: float, dt: float) -> None:
        """Draw three accelerations towards braking until the vector keeps its speed limit while braking."""
        axes = range(first, first + 3)
        for share in _STEPS:
            tried = [brakes[i] + (steps[i] - brakes[i]) * share for i in axes]
            peaks = (self._axes[i].peak(self.velocity[i] + a * dt, a) for i, a in zip(axes, tried, strict=True))
            if sum(p * p for p in peaks) <= limit * limit:
                break
        else:
            tried = [brakes[i] for i in axes]
        steps[first : first + 3] = tried

    def _within_speed(self, new: list[float], first: int, limit: float) -> None:
        """Last resort for the speed: steps of changing length may miss it by what one step changes."""
        length = sqrt(sum(v * v for v in new[first : first + 3]))
        if length > limit:
            for i in range(first, first + 3):
                new[i] *= limit * (1.0 - 1e-9) / length

    def _hold_back(self, new: list[float], rooms: list[tuple[float, float]]) -> set[int]:
        """Last resort where the arm is nearer to a wall than its commands: never past it within two periods.

        Returns the axes that were held back.
        """
        held = set()
        for i, (ahead, behind) in enumerate(rooms):
            slack = self._margin  # spent only here
            high, low = (max(0.0, room + slack) / (2.0 * self.period_s) for room in (ahead, behind))
            if not -low <= new[i] <= high:
                new[i] = min(max(new[i], -low), high)
                self.clamped["hard"] += 1
                held.add(i)
        return held


def _reached(speed: float, wanted: float) -> float:
    return wanted if abs(speed - wanted) <= _REACHED else speed


def _finite(twist: list[float], place: list[float]) -> None:
    if len(twist) != 6 or len(place) != 3:
        raise NotFiniteActionError(f"a twist has 6 entries and a position 3, got {len(twist)} and {len(place)}")
    for name, value in zip(AXES, twist, strict=True):
        if not isfinite(value):
            raise NotFiniteActionError(f"twist {name!r} is {value}")
    for name, value in zip("xyz", place, strict=True):
        if not isfinite(value):
            raise NotFiniteActionError(f"measured position {name!r} is {value}")
