"""Wrenches from the sensor's frame to the tool centre point and to ``world``."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.rotations import rotation_of
from dcqfa_ros.safety.cartesian_limits import LimitError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SensorMount:
    """Where the force/torque sensor sits, seen from the tool centre point.

    Attributes:
        position: origin of the sensor's frame in the tool frame, m.
        quaternion: orientation of the sensor's frame in the tool frame, (x, y, z, w).
        sign: 1 where the sensor reports what the environment exerts on the tool, -1 where it is the other way round.
    """

    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    quaternion: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)
    sign: float = 1.0
    _rotation: Floats = field(init=False, repr=False, compare=False)
    _offset: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a mount that cannot be.

        Raises:
            LimitError: the position is not finite or beyond 1 m, the quaternion is none, or the sign is not 1 or -1.
        """
        if len(self.position) != 3 or not all(abs(p) <= 1.0 for p in self.position):
            raise LimitError(f"sensor mount: position is {self.position}, expected three numbers within 1 m")
        if self.sign not in (1.0, -1.0):
            raise LimitError(f"sensor mount: sign is {self.sign}, expected 1 or -1")
        try:
            object.__setattr__(self, "_rotation", rotation_of(self.quaternion))
        except ValueError as error:
            raise LimitError(f"sensor mount: {error}") from error
        object.__setattr__(self, "_offset", np.asarray(self.position, np.float64))

    def to_tool(self, force: Floats, torque: Floats) -> tuple[Floats, Floats]:
        """Return force (3,) N and torque (3,) N m at the tool centre point in the tool frame."""
        turned = self.sign * (self._rotation @ force)
        moment: Floats = self.sign * (self._rotation @ torque) + np.cross(self._offset, turned)
        return turned, moment
