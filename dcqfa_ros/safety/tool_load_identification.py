"""Identification of what hangs on a force/torque sensor from readings at several orientations, by least squares.

With the tool still and free, a reading at an orientation in which gravity is g (3,) in the sensor's frame is
``F = m g + b_F`` and ``M = (m c) x g + b_M``: linear in the mass m, the product m c with the centre of mass, and the
bias b. Forces give m and b_F; torques then give m c and b_M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dcqfa_ros.safety.tool_load import (
    GRAVITY,
    MAX_MASS_KG,
    Floats,
    ToolLoad,
    ToolLoadError,
    angle_between,
    rotation_matrix,
    unsteady,
)

MIN_ORIENTATIONS = 4
MAX_CONDITION = 6.0
"""Condition number above which noise and cable forces are amplified too much. Six directions along +-x, +-y, +-z of the
sensor have 1.2, tilts by 60 degrees to three sides 2.8, by 30 degrees 6.3."""
MIN_TILT_DEG = 30.0
"""Least angle by which gravity must turn in the sensor's frame."""
MAX_FORCE_RESIDUAL_N, MAX_TORQUE_RESIDUAL_NM = 1.0, 0.1
"""RMS residuals above which the readings are not those of a rigid tool: wrong mounting, a pulling cable, a contact."""
LIGHT_KG = 0.02
"""Below this mass its centre cannot be told and is given as 0."""


class IdentificationError(ToolLoadError):
    """The readings do not tell the tool's load; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Standstill:
    """Mean of readings at one orientation of the arm.

    Attributes:
        orientation: of the tool centre point in ``world``, quaternion (x, y, z, w).
        wrench: (6,) N and N m as the sensor sent it.
        readings: how many were averaged.
        problem: why it cannot be used; empty when it can.
    """

    orientation: tuple[float, float, float, float]
    wrench: tuple[float, ...]
    readings: int
    problem: str = ""


@dataclass(frozen=True)
class Identified:
    """A tool's load and how well it is known.

    Attributes:
        load: mass, centre of mass, bias.
        force_residual_n: RMS of what the forces differ from the model's, N.
        torque_residual_nm: the same for torques, N m.
        force_condition: condition number of the equations for mass and force bias (1 is best).
        torque_condition: of those for the centre of mass and torque bias.
        mass_error_kg: standard error of the mass.
        centre_error_m: standard errors (3,) of the centre of mass.
        orientations: how many were used.
    """

    load: ToolLoad
    force_residual_n: float
    torque_residual_nm: float
    force_condition: float
    torque_condition: float
    mass_error_kg: float
    centre_error_m: tuple[float, float, float]
    orientations: int


def standstill(orientations: ArrayLike, wrenches: ArrayLike) -> Standstill:
    """Average readings taken at one orientation.

    Args:
        orientations: (n, 4) quaternions of the tool centre point in ``world``.
        wrenches: (n, 6) readings.

    Raises:
        ToolLoadError: shapes or values cannot be.
    """
    q, w = np.asarray(orientations, np.float64), np.asarray(wrenches, np.float64)
    if q.ndim != 2 or q.shape[1:] != (4,) or w.shape != (len(q), 6) or len(q) == 0 or not np.isfinite(w).all():
        raise ToolLoadError(
            f"standstill: expected (n, 4) orientations and (n, 6) finite wrenches, got {q.shape}, {w.shape}"
        )
    q = q * np.where(q @ q[0] < 0, -1.0, 1.0)[:, None]  # q and -q are the same orientation
    first = rotation_matrix(q[0])
    turned = math.degrees(max(angle_between(first, rotation_matrix(other)) for other in q))
    problem = f"the arm turned by {turned:.1f} degrees" if turned > 1.0 else ""
    if not problem and len(w) >= 20:
        problem = unsteady(w)
    x, y, z, s = (q.mean(axis=0) / np.linalg.norm(q.mean(axis=0))).tolist()
    return Standstill((x, y, z, s), tuple(w.mean(axis=0).tolist()), len(w), problem)


def directions(standstills: Sequence[Standstill], sensor_rotation: ArrayLike = (0.0, 0.0, 0.0, 1.0)) -> Floats:
    """Return the direction of gravity (n, 3) in the sensor's frame at each standstill."""
    mounting = rotation_matrix(sensor_rotation, "sensor_rotation")
    rows = [-(rotation_matrix(s.orientation) @ mounting)[2] for s in standstills]
    return np.array(rows).reshape(-1, 3)


def excitation(gravity: Floats) -> tuple[float, float, str]:
    """Tell how well orientations with gravity directions (n, 3) determine the load.

    Returns:
        Condition numbers of the force and of the torque equations (infinite where something is not determined), and
        what is missing; empty when nothing is.
    """
    count = len(gravity)
    if count == 0:
        return math.inf, math.inf, f"no standstill yet, expected at least {MIN_ORIENTATIONS}"
    force, torque = _condition(_force_equations(gravity)), _condition(_torque_equations(gravity))
    if count < MIN_ORIENTATIONS:
        return force, torque, f"{count} standstills, expected at least {MIN_ORIENTATIONS}"
    widest = math.degrees(math.acos(float(np.clip((gravity @ gravity.T).min(), -1.0, 1.0))))
    if widest < MIN_TILT_DEG:
        text = f"gravity turns by {widest:.0f} degrees at most in the sensor's frame, expected {MIN_TILT_DEG:g} or more"
        return force, torque, f"{text}; tilt the tool further"
    worst = max(force, torque)
    if worst > MAX_CONDITION:
        axis = "xyz"[int(np.argmin(np.ptp(gravity, axis=0)))]
        which = "mass and force bias" if force > torque else "centre of mass and torque bias"
        text = (
            f"the orientations hardly determine {which} (condition number {worst:.1f}, expected at most "
            f"{MAX_CONDITION:g}); gravity varies least along the sensor's {axis} axis: tilt further, or add "
            "orientations in which that axis points up and down"
        )
        return force, torque, text
    return force, torque, ""


def identify(standstills: Sequence[Standstill], sensor_rotation: ArrayLike = (0.0, 0.0, 0.0, 1.0)) -> Identified:
    """Find mass, centre of mass and bias from standstills of the free tool.

    Args:
        standstills: at least four, in which gravity turns widely in the sensor's frame.
        sensor_rotation: orientation of the sensor's frame in the tool frame, quaternion (x, y, z, w).

    Raises:
        IdentificationError: a standstill was not one, the orientations do not determine the load, the readings are not
            those of a rigid tool, or the result is no tool.
    """
    for number, s in enumerate(standstills, 1):
        if s.problem:
            raise IdentificationError(f"standstill {number} of {len(standstills)}: {s.problem}; record it again")
    gravity = directions(standstills, sensor_rotation)
    force_condition, torque_condition, missing = excitation(gravity)
    if missing:
        raise IdentificationError(f"poor excitation: {missing}")
    wrenches = np.array([s.wrench for s in standstills])
    forces, force_residual, force_errors = _solve(_force_equations(gravity), wrenches[:, :3])
    torques, torque_residual, torque_errors = _solve(_torque_equations(gravity), wrenches[:, 3:])
    mass = float(forces[0]) / GRAVITY
    if mass < -LIGHT_KG:
        raise IdentificationError(
            f"the mass comes out as {mass:.3f} kg: sensor_rotation turns the sensor the wrong way round, or the sensor "
            "reports what the tool feels instead of what acts on it"
        )
    for name, residual, limit, unit in (
        ("forces", force_residual, MAX_FORCE_RESIDUAL_N, "N"),
        ("torques", torque_residual, MAX_TORQUE_RESIDUAL_NM, "N m"),
    ):
        if not residual <= limit:
            raise IdentificationError(
                f"the {name} miss those of a rigid tool by {residual:.3g} {unit} (RMS), expected at most {limit:g}: "
                "sensor_rotation is wrong, a cable pulls, or the tool touched something"
            )
    mass = max(0.0, mass)
    light = mass < LIGHT_KG
    centre = np.zeros(3) if light else torques[:3] / (mass * GRAVITY)
    errors = np.zeros(3) if light else torque_errors[:3] / (mass * GRAVITY)
    bias = [*forces[1:].tolist(), *torques[3:].tolist()]
    try:
        load = ToolLoad(min(mass, MAX_MASS_KG + 1.0), tuple(centre.tolist()), tuple(bias))
    except ToolLoadError as error:
        raise IdentificationError(f"the readings give no tool: {error}; check sensor_rotation") from error
    return Identified(
        load,
        force_residual,
        torque_residual,
        force_condition,
        torque_condition,
        float(force_errors[0]) / GRAVITY,
        (float(errors[0]), float(errors[1]), float(errors[2])),
        len(standstills),
    )


def _force_equations(gravity: Floats) -> Floats:
    """Return (3 n, 4): columns of the weight (N) and the force bias."""
    rows = [np.column_stack([g, np.eye(3)]) for g in gravity]
    return np.concatenate(rows)


def _torque_equations(gravity: Floats) -> Floats:
    """Return (3 n, 6): columns of weight times centre of mass (N m) and the torque bias; c x g = -[g]x c."""
    rows = []
    for x, y, z in gravity:
        cross = np.array([[0.0, z, -y], [-z, 0.0, x], [y, -x, 0.0]])
        rows.append(np.column_stack([cross, np.eye(3)]))
    return np.concatenate(rows)


def _condition(equations: Floats) -> float:
    singular = np.linalg.svd(equations, compute_uv=False)
    if len(equations) < equations.shape[1] or singular[-1] < 1e-9 * singular[0]:
        return math.inf
    return float(singular[0] / singular[-1])


def _solve(equations: Floats, values: Floats) -> tuple[Floats, float, Floats]:
    """Return solution, RMS residual and standard errors of the least-squares problem."""
    right = values.ravel()
    solution: Floats = np.linalg.lstsq(equations, right, rcond=None)[0].astype(np.float64)
    residuals = right - equations @ solution
    freedom = max(1, len(right) - equations.shape[1])
    variance = float(residuals @ residuals) / freedom
    covariance = variance * np.linalg.inv(equations.T @ equations)
    return solution, float(np.sqrt(np.mean(residuals**2))), np.sqrt(np.diag(covariance))
