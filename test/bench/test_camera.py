"""The camera benchmark counts every tick of the frame clocks and measures between three real processes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.bench.camera import BenchError, run_camera_bench, stream_figures
from dcqfa_ros.cli import main

PERIOD = 100_000_000  # 10 Hz
BEGIN = 10**18


def arrivals(numbers: list[int], delay_ms: float = 2.0) -> list[tuple[int, int]]:
    return [(BEGIN + n * PERIOD, BEGIN + n * PERIOD + round(delay_ms * 1e6)) for n in numbers]


def test_ticks_without_a_picture_are_lost_also_at_the_end() -> None:
    figures, values = stream_figures(arrivals([0, 1, 2, 5]), BEGIN, BEGIN + 10 * PERIOD, 10.0)
    assert (figures.due, figures.delivered, figures.p50_ms) == (10, 0.4, 2.0)
    assert len(values) == 4


def test_what_lies_outside_the_span_does_not_count_and_nothing_counts_twice() -> None:
    came = [*arrivals([-3, 0, 1]), *arrivals([1], 50.0), *arrivals([4])]
    figures, _ = stream_figures(came, BEGIN, BEGIN + 2 * PERIOD, 10.0)
    assert (figures.due, figures.delivered, figures.max_ms) == (2, 1.0, 2.0)


def test_a_stream_of_which_nothing_came_is_all_lost() -> None:
    figures, values = stream_figures([], BEGIN, BEGIN + 10 * PERIOD, 10.0)
    assert (figures.due, figures.delivered, figures.p99_ms, values) == (10, 0.0, None, [])


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 30))
def test_shares_stay_within_their_bounds(numbers: list[int], span: int) -> None:
    figures, values = stream_figures(arrivals(numbers), BEGIN, BEGIN + span * PERIOD, 10.0)
    assert 0.0 <= figures.delivered <= 1.0
    assert len(values) == round(figures.delivered * figures.due)


def test_two_small_cameras_reach_a_third_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "camera", "--seconds", "1", "--width", "64", "--height", "48", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["streams"]) == {"front/color", "front/depth", "wrist/color", "wrist/depth"}
    assert 0.0 < document["delivered"] <= 1.0
    assert document["p99_ms"] > 0 and document["alignment_ms"] > 0 and document["jpeg_ms"] > 0
    parts = document["cpu_publishers"] + document["cpu_subscriber"] - document["cpu_sources"]
    assert document["cpu_cores"] == pytest.approx(parts)


@pytest.mark.parametrize(
    ("options", "words"), [({"seconds": 0.0}, "seconds"), ({"width": 0}, "width"), ({"rate": float("nan")}, "rate")]
)
def test_senseless_options_are_refused_by_name(options: dict, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        run_camera_bench(**options)
