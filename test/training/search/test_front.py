from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.search.front import Point, front, hypervolumes

values = st.integers(1, 6).map(float)
points = st.lists(st.tuples(values, values, values), max_size=25).map(
    lambda rows: [Point(f"n{index}", *row) for index, row in enumerate(rows)]
)


def row(point: Point) -> tuple[float, float, float]:
    return point.distance, point.latency_ms, point.memory_bytes


def beats(one: Point, other: Point) -> bool:
    return row(one) != row(other) and all(a <= b for a, b in zip(row(one), row(other), strict=True))


@given(points)
def test_the_front_is_what_no_other_point_beats(given_points: list[Point]) -> None:
    found = front(given_points)
    for point in given_points:
        beaten = any(beats(other, point) for other in given_points)
        assert (row(point) in {row(other) for other in found}) == (not beaten)
    assert len({row(point) for point in found}) == len(found)
    assert [point.latency_ms for point in found] == sorted(point.latency_ms for point in found)


@given(points, points)
def test_more_points_never_dominate_less(some: list[Point], others: list[Point]) -> None:
    part, whole = hypervolumes(some, [*some, *others])
    assert 0.0 <= part <= whole + 1e-12 <= 1.0 + 2e-12


def test_the_volume_of_known_points() -> None:
    best, worst = Point("a", 1.0, 1.0, 1.0), Point("b", 10.0, 2.0, 2.0)
    assert hypervolumes([best, worst], [worst]) == pytest.approx([1.0, (0.1 / 1.1) ** 3])
    assert hypervolumes([], []) == [0.0, 0.0]
