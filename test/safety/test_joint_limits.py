"""A twist is scaled until no joint is too fast or runs into its end, also in singular postures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.safety.cartesian_limits import LimitError
from dcqfa_ros.safety.joint_limits import INOVO_JOINT_SPEEDS, JointLimits
from dcqfa_ros.safety.limits import NotFiniteActionError

LOWER, UPPER = [-6.0] * 6, [6.0] * 6


class Linear:
    """An arm with a constant Jacobian."""

    def __init__(self, jacobian: np.ndarray) -> None:
        self.matrix = jacobian

    def jacobian(self, joints: np.ndarray, point: np.ndarray | None = None) -> np.ndarray:
        return self.matrix

    def forward(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (joints @ self.matrix.T)[..., :3], np.broadcast_to(np.eye(3), (*joints.shape[:-1], 3, 3))


@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
@settings(max_examples=200, deadline=None)
def test_no_joint_exceeds_its_speed_or_brakes_too_late(seed: int, rank: int) -> None:
    random = np.random.default_rng(seed)
    jacobian = random.normal(size=(6, rank)) @ random.normal(size=(rank, 6))
    limits = JointLimits(Linear(jacobian), INOVO_JOINT_SPEEDS, LOWER, UPPER, braking=3.0)
    joints = random.uniform(-6.2, 6.2, size=6)
    twist = random.normal(size=6) * 10.0 ** random.uniform(-2, 6)
    factor = limits.factor(joints, twist)
    assert 0.0 <= factor <= 1.0
    speeds = limits.joint_speeds(joints, twist * factor)
    assert (np.abs(speeds) <= np.array(INOVO_JOINT_SPEEDS) * (1 + 1e-4)).all()
    ahead = np.where(speeds > 0, 6.0 - joints, joints + 6.0)
    assert (speeds**2 / (2 * 3.0) <= np.maximum(ahead, 0.0) * (1 + 1e-4) + 1e-9).all()


def test_a_joint_beyond_its_end_may_come_back_but_go_no_further() -> None:
    limits = JointLimits(Linear(np.eye(6)), INOVO_JOINT_SPEEDS, LOWER, UPPER)
    joints = np.array([6.1, 0, 0, 0, 0, 0])
    assert limits.factor(joints, np.array([0.1, 0, 0, 0, 0, 0])) == 0.0 and limits.tightest == 0
    assert limits.factor(joints, np.array([-0.1, 0, 0, 0, 0, 0])) == 1.0
    assert limits.clamped == 1


def test_a_path_is_refused_by_joint_and_reason() -> None:
    limits = JointLimits(Linear(np.eye(6)), INOVO_JOINT_SPEEDS, LOWER, UPPER)
    start = np.zeros(6)

    def why(times: list[float], *rows: list[float]) -> str | None:
        return limits.check_path(np.array(times), np.array(rows, dtype=float).reshape(len(rows), -1), start)

    assert why([1.0, 2.0], [0.5] * 6, [1.0] * 6) is None
    assert "joint 3 would move at 2.60" in str(why([1.0], [0, 0, 2.6, 0, 0, 0]))
    assert "joint 6 would be at 6.500" in str(why([10.0], [0, 0, 0, 0, 0, 6.5]))
    assert "rise" in str(why([1.0, 1.0], [0.0] * 6, [0.0] * 6))
    assert "rise" in str(why([0.0], [0.0] * 6))
    assert "NaN" in str(why([1.0], [0, 0, 0, 0, 0, float("nan")]))
    assert "expected" in str(why([1.0], [0.0] * 5))


@pytest.mark.parametrize(
    ("speeds", "lower", "upper"),
    [
        ([], [], []),
        ([1.0] * 6, [-1.0] * 6, [float("inf")] * 6),
        ([5.0] * 6, [-1.0] * 6, [1.0] * 6),
        ([0.0] * 6, [-1.0] * 6, [1.0] * 6),
        ([float("nan")] * 6, [-1.0] * 6, [1.0] * 6),
        ([1.0] * 6, [1.0] * 6, [-1.0] * 6),
        ([1.0] * 6, [-1.0] * 5, [1.0] * 6),
    ],
)
def test_absent_or_exaggerated_joint_limits_are_refused(
    speeds: list[float], lower: list[float], upper: list[float]
) -> None:
    with pytest.raises(LimitError, match="joint"):
        JointLimits(Linear(np.eye(6)), speeds, lower, upper)


def test_a_joint_beyond_its_end_is_named_while_it_goes_on() -> None:
    limits = JointLimits(Linear(np.eye(6)), INOVO_JOINT_SPEEDS, LOWER, UPPER)
    there, onwards = np.array([0, 0, 6.1, 0, 0, -6.1]), np.array([0, 0, 0.1, 0, 0, 0])
    assert "joint 3 is at 6.100 rad, outside -6.000 to 6.000" in str(limits.beyond(there, onwards))
    assert limits.beyond(there, -onwards) is None and limits.beyond(there * 0.98, onwards) is None
    assert "joint 6" in str(limits.beyond(there, np.array([0, 0, 0, 0, 0, -0.1])))
    assert "NaN" in str(limits.beyond(np.full(6, np.nan), onwards))


def test_what_is_not_finite_is_refused() -> None:
    limits = JointLimits(Linear(np.eye(6)), INOVO_JOINT_SPEEDS, LOWER, UPPER)
    with pytest.raises(NotFiniteActionError):
        limits.factor(np.zeros(6), np.array([0, 0, np.nan, 0, 0, 0]))
    with pytest.raises(NotFiniteActionError):
        limits.factor(np.full(6, np.inf), np.zeros(6))
