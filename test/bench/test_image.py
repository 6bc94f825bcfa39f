"""The image benchmark counts every picture sent, measures between two real processes and refuses senseless options."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.bench.image import BenchError, run_image_bench, summarize
from dcqfa_ros.cli import main

SENT = {"sent": 10, "late": 1, "profile": "dcqfa", "rmw": "rmw_fastrtps_cpp", "shm": 100, "problem": None}


def test_pictures_that_never_arrived_count_as_lost() -> None:
    result = summarize(SENT, [(0, 1.0), (1, 3.0), (9, 2.0)], 640, 480, 30.0)
    assert (result.delivered, result.p50_ms, result.max_ms, result.frames, result.late) == (0.3, 2.0, 3.0, 10, 1)


def test_a_picture_counts_once_and_by_its_first_arrival() -> None:
    result = summarize(SENT, [(4, 1.0), (4, 9.0), (77, 5.0)], 640, 480, 30.0)
    assert (result.delivered, result.max_ms) == (0.1, 1.0)


def test_nothing_received_has_no_latency() -> None:
    result = summarize(SENT, [], 640, 480, 30.0)
    assert (result.delivered, result.p50_ms, result.p99_ms) == (0.0, None, None)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1e3)), max_size=30))
def test_shares_and_percentiles_stay_within_their_bounds(received) -> None:
    result = summarize(SENT, received, 640, 480, 30.0)
    assert 0.0 <= result.delivered <= 1.0
    if result.p50_ms is not None and result.p99_ms is not None and result.max_ms is not None:
        assert 0.0 <= result.p50_ms <= result.p99_ms <= result.max_ms


def test_small_pictures_travel_between_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "image", "--seconds", "0.5", "--width", "64", "--height", "48", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) >= {"delivered", "p50_ms", "p99_ms", "frames", "profile", "rmw", "shm"}
    assert document["frames"] == 15
    assert document["delivered"] > 0


@pytest.mark.parametrize(
    ("options", "words"), [({"seconds": 0.0}, "seconds"), ({"width": 0}, "width"), ({"rate": float("nan")}, "rate")]
)
def test_senseless_options_are_refused_by_name(options: dict, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        run_image_bench(**options)


def test_a_refusal_is_one_line_for_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "image", "--rate", "0"]) == 2
    assert capsys.readouterr().err == "dcqfa: error: rate: expected 0.1 to 1000, got 0\n"
