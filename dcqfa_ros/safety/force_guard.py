"""Force and torque guard: slow the arm down in contact, stop it at a limit, back away along the contact normal.

A state machine without a clock of its own: it is fed with wrenches as they arrive, in the thread they arrive in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.safety.cartesian_limits import LimitError
from dcqfa_ros.safety.stops import Stop, StopCode

Floats = NDArray[np.float64]


_GROWTH, _GROWTH_N = 1.2, 5.0  # a retreat ends where the force exceeds this much of that at its begin, and N more


class Contact(str, Enum):
    """What the wrench asks of the arm."""

    FREE = "free"
    SLOW = "slow"  # in contact: speeds are reduced
    STOPPED = "stopped"  # a limit was crossed: latched until reset
    RETREAT = "retreat"  # stopped, and backing away


@dataclass(frozen=True, slots=True)
class ForceLimits:
    """Thresholds of the guard; each below is where it lets go again (hysteresis).

    Attributes:
        slow_force, slow_force_below: N.
        stop_force, stop_force_below: N; a stop can be reset below ``stop_force_below``.
        slow_torque, slow_torque_below, stop_torque, stop_torque_below: N m.
        slow_factor: share of the commanded speed that is left while slow, 0..1.
        retreat_distance: how far to back away after a stop by force, m; 0: stay.
        retreat_speed: m/s.
    """

    slow_force: float
    slow_force_below: float
    stop_force: float
    stop_force_below: float
    slow_torque: float
    slow_torque_below: float
    stop_torque: float
    stop_torque_below: float
    slow_factor: float
    retreat_distance: float
    retreat_speed: float

    def __post_init__(self) -> None:
        """Refuse limits that are absent, out of order or beyond their hard maximum.

        Raises:
            LimitError: names the limit.
        """
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), FORCE_RANGES[field.name]
            if not (isinstance(value, (int, float)) and low <= value <= high):
                raise LimitError(f"force guard: {field.name} is {value}, expected {low:g} to {high:g}")
        for kind in ("force", "torque"):
            order = [f"slow_{kind}_below", f"slow_{kind}", f"stop_{kind}"]
            values = [getattr(self, name) for name in order]
            if not values[0] < values[1] < values[2]:
                raise LimitError(f"force guard: expected {' < '.join(order)}, got {values}")
            if not getattr(self, f"stop_{kind}_below") < values[2]:
                raise LimitError(f"force guard: expected stop_{kind}_below < stop_{kind}")


FORCE_RANGES: dict[str, tuple[float, float]] = {
    "slow_force": (0.5, 100.0),
    "slow_force_below": (0.1, 100.0),
    "stop_force": (1.0, 150.0),
    "stop_force_below": (0.1, 150.0),
    "slow_torque": (0.05, 15.0),
    "slow_torque_below": (0.01, 15.0),
    "stop_torque": (0.1, 20.0),
    "stop_torque_below": (0.01, 20.0),
    "slow_factor": (0.0, 1.0),
    "retreat_distance": (0.0, 0.05),
    "retreat_speed": (0.001, 0.05),
}
"""What a configuration may ask for; the sensor's own range is 300 N and 30 N m."""


class ForceGuard:
    """Watches wrenches that the environment exerts on the tool; not thread-safe, the caller holds its lock.

    Attributes:
        contact: what the newest wrench asks for.
        force, torque: length of the newest force, N, and torque, N m.
        slowed: how often the arm was slowed down.
    """

    def __init__(self, limits: ForceLimits) -> None:
        """Begin free of contact."""
        self.limits = limits
        self.contact = Contact.FREE
        self.force = self.torque = 0.0
        self.slowed = 0
        self._normal = np.zeros(3)
        self._begin: Floats | None = None  # where the retreat began
        self._until_ns = 0  # when it ends at the latest
        self._most = 0.0  # N, above which it ends

    @property
    def factor(self) -> float:
        """Share of the commanded speed that is allowed now: 1, the slow factor, or 0 after a stop."""
        if self.contact is Contact.FREE:
            return 1.0
        return self.limits.slow_factor if self.contact is Contact.SLOW else 0.0

    def feed(self, force: Floats, torque: Floats) -> Stop | None:
        """Take in a wrench: ``force`` (3,) N and ``torque`` (3,) N m, both in ``world``.

        Returns:
            The stop that this very wrench causes; None otherwise, also while an earlier stop is latched. A retreat is
            ended by a wrench that is not finite, or that pushes against it.
        """
        if not (np.isfinite(force).all() and np.isfinite(torque).all()):
            stopped = self.contact is Contact.STOPPED
            self._stay()
            return None if stopped else Stop(StopCode.WRENCH_NOT_FINITE, "a wrench holds NaN or infinity")
        # Lengths without numpy: this runs in the wrench callback. 1e200 N is a finite force too.
        self.force = math.hypot(float(force[0]), float(force[1]), float(force[2]))
        self.torque = math.hypot(float(torque[0]), float(torque[1]), float(torque[2]))
        if self.contact is Contact.RETREAT and self._is_worse(force):
            self._stay()
            return Stop(StopCode.FORCE, f"contact force {self.force:.1f} N against the retreat")
        if self.contact in (Contact.STOPPED, Contact.RETREAT):
            return None
        limits = self.limits
        if self.force >= limits.stop_force or self.torque >= limits.stop_torque:
            by_force = self.force >= limits.stop_force
            self.contact = Contact.STOPPED
            self._normal = np.asarray(force, np.float64) / self.force if by_force else np.zeros(3)
            if by_force:
                return Stop(StopCode.FORCE, f"contact force {self.force:.1f} N, limit {limits.stop_force:g} N")
            return Stop(StopCode.TORQUE, f"contact torque {self.torque:.2f} N m, limit {limits.stop_torque:g} N m")
        if self.force >= limits.slow_force or self.torque >= limits.slow_torque:
            self.slowed += self.contact is Contact.FREE
            self.contact = Contact.SLOW
        elif self.force < limits.slow_force_below and self.torque < limits.slow_torque_below:
            self.contact = Contact.FREE
        return None

    def _is_worse(self, force: Floats) -> bool:
        """Whether backing away meets something else, or leads deeper into the contact (a wrong ``sensor_sign``)."""
        opposed = self.force >= self.limits.slow_force and float(force @ self._normal) < 0.0
        return opposed or self.force > self._most

    @property
    def wants_retreat(self) -> bool:
        """Whether a stop by force asks for backing away that has not begun yet."""
        return self.contact is Contact.STOPPED and self.limits.retreat_distance > 0.0 and bool(self._normal.any())

    def begin_retreat(self, position: Floats, now_ns: int) -> None:
        """Start backing away from ``position`` (3,) m; does nothing unless :attr:`wants_retreat`."""
        if self.wants_retreat:
            self.contact, self._begin = Contact.RETREAT, np.array(position, np.float64)
            seconds = 2.0 * self.limits.retreat_distance / self.limits.retreat_speed + 1.0
            self._until_ns = now_ns + round(seconds * 1e9)
            self._most = _GROWTH * self.force + _GROWTH_N

    def retreat(self, position: Floats, now_ns: int) -> Floats | None:
        """Return the velocity (3,) m/s to back away with, or None when the retreat is over (or none is under way).

        It is over when the force is below ``stop_force_below``, when the distance has been covered in any direction,
        or after twice the time that this takes: what holds the arm back is not to be pushed for ever.
        """
        begin = self._begin
        if self.contact is not Contact.RETREAT or begin is None:
            return None
        covered = float(np.linalg.norm(np.asarray(position, np.float64) - begin))
        gone = self.force < self.limits.stop_force_below
        # "not <": NaN ends it too.
        if gone or not covered < self.limits.retreat_distance or now_ns > self._until_ns:
            self._stay()
            return None
        return self._normal * self.limits.retreat_speed

    def end_retreat(self) -> None:
        """Stay where the arm is, also where a retreat has not begun yet; a stop remains latched."""
        if self.contact is Contact.RETREAT:
            self._stay()
        self._normal = np.zeros(3)

    def _stay(self) -> None:
        self.contact, self._begin = Contact.STOPPED, None
        self._normal = np.zeros(3)

    def obstacle(self) -> str | None:
        """Return why a stop cannot be reset yet: the load is still there. None where it can."""
        if self.force >= self.limits.stop_force_below or self.torque >= self.limits.stop_torque_below:
            force, torque = self.limits.stop_force_below, self.limits.stop_torque_below
            return f"contact {self.force:.1f} N, {self.torque:.2f} N m: below {force:g} N and {torque:g} N m are needed"
        return None

    def reset(self) -> None:
        """Take back a stop; the next wrench decides anew."""
        self.contact, self._begin = Contact.FREE, None
        self._normal = np.zeros(3)
