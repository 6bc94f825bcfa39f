"""What an emulated tool feels: a surface and its own weight, so that force guards can be tried in closed loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GRAVITY = 9.80665


@dataclass(frozen=True, slots=True)
class ContactPlane:
    """A horizontal surface that yields like a spring with a damper; frictionless.

    Attributes:
        height: z of the surface in ``world``, m.
        stiffness: N/m.
        damping: N s/m; only pressing deeper is resisted.
    """

    height: float
    stiffness: float = 5000.0
    damping: float = 20.0

    def force(self, position: Floats, velocity: Floats) -> Floats:
        """Return the force (3,) N in ``world`` on a point at ``position`` (3,) m moving at ``velocity`` (3,) m/s."""
        depth = self.height - float(position[2])
        if depth <= 0.0:
            return np.zeros(3)
        return np.array([0.0, 0.0, self.stiffness * depth + self.damping * max(0.0, -float(velocity[2]))])


@dataclass(frozen=True)
class ToolLoad:
    """The weight of what hangs on the flange.

    Attributes:
        mass: kg.
        centre: of mass (3,), in the frame of the flange, m.
    """

    mass: float
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def weight(self, rotation: Floats) -> Floats:
        """Return the force (3,) N in the frame of the flange, whose orientation in ``world`` is ``rotation`` (3, 3)."""
        return rotation.T @ np.array([0.0, 0.0, -self.mass * GRAVITY])


def cross(a: Floats | tuple[float, float, float], b: Floats) -> Floats:
    """Return the cross product of two vectors (3,); much faster than numpy's for one pair."""
    (ax, ay, az), (bx, by, bz) = (np.asarray(a).tolist(), b.tolist())
    return np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])
