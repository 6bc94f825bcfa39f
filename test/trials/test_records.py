"""Records survive the round trip through files, files are replaced whole, and bad lines are named."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dcqfa_ros.errors import UserError
from dcqfa_ros.trials.records import (
    RecordError,
    TrialMode,
    TrialRecord,
    append_record,
    read_records,
    summarize,
    write_csv,
    write_summary,
)


def make_record(**changes: Any) -> TrialRecord:
    """Return a plausible record."""
    fields: dict[str, Any] = {
        "seed": 100_000,
        "score": 0.8,
        "steps": 3,
        "stop_reason": "step_limit",
        "variant": "w8a8",
        "device": "test computer",
        "curve": (0.1, 0.76, 0.5),
        "missed_ticks": 2,
        "starved_ticks": 1,
        "chunks": 1,
        "inference_ms_p50": 20.5,
        "inference_ms_p99": 31.25,
        "started": "2025-01-02T03:04:05+00:00",
        "mode": TrialMode.REALTIME,
        "cell": "pusht",
    }
    return TrialRecord(**(fields | changes))


share = st.floats(0, 1)
records = st.builds(
    make_record,
    seed=st.integers(0, 2**32 - 1),
    score=share,
    curve=st.lists(share, max_size=8).map(tuple),
    variant=st.text(min_size=1, max_size=20),
    stop_reason=st.text(min_size=1, max_size=20),
    inference_ms_p50=st.none() | st.floats(0, 1e6),
    mode=st.sampled_from(TrialMode),
)


@given(record=records)
def test_every_record_survives_json_exactly(record: TrialRecord) -> None:
    line = record.model_dump_json()
    assert "\n" not in line
    assert TrialRecord.model_validate_json(line) == record


def test_appended_records_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    written = [make_record(seed=seed, variant="a\u2028b\nc") for seed in range(3)]
    for record in written:
        append_record(path, record)
    assert read_records(path) == written
    assert [p.name for p in tmp_path.iterdir()] == ["trials.jsonl"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trials.jsonl"
    append_record(path, make_record())

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        append_record(path, make_record(seed=1))
    monkeypatch.undo()
    assert read_records(path) == [make_record()]
    assert [p.name for p in tmp_path.iterdir()] == ["trials.jsonl"]


def test_bad_lines_are_named_with_their_field(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    good = make_record().model_dump(mode="json")
    for bad, field in (
        (good | {"score": 1.5}, "score"),
        (good | {"surprise": 1}, "surprise"),
        (good | {"started": "yesterday"}, "started"),
        (good | {"started": "2025-01-02T03:04:05+02:00"}, "started"),
        ({k: v for k, v in good.items() if k != "seed"}, "seed"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(RecordError, match=rf"trials\.jsonl: line 2: {field}"):
            read_records(path)
    path.write_text("{")
    with pytest.raises(RecordError, match="line 1"):
        read_records(path)
    with pytest.raises(RecordError, match="incomplete"):
        append_record(path, make_record())
    with pytest.raises(RecordError, match="cannot read"):
        read_records(tmp_path / "missing.jsonl")
    assert issubclass(RecordError, UserError)


@given(st.binary(max_size=200))
def test_reading_arbitrary_bytes_ends_in_records_or_a_named_error(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "trials.jsonl"
    path.write_bytes(content)
    try:
        read = read_records(path)
    except RecordError:
        return
    assert all(isinstance(record, TrialRecord) for record in read)


def test_csv_has_a_row_per_trial_without_the_curves(tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    write_csv(path, [make_record(), make_record(seed=7, inference_ms_p50=None, device='a "b", c')])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["100000", "7"]
    assert rows[0]["mode"] == "realtime"
    assert rows[1]["device"] == 'a "b", c'
    assert rows[1]["inference_ms_p50"] == ""
    assert not {"curve", "parts", "swaps"} & set(rows[0])


def test_summary_holds_what_was_asked_for(tmp_path: Path) -> None:
    trials = [
        make_record(seed=1, score=0.5, missed_ticks=3),
        make_record(seed=2, score=1.0, missed_ticks=4, variant="fp32", stop_reason="success"),
        make_record(seed=3, score=0.6, missed_ticks=9, mode=TrialMode.LOCKSTEP),
    ]
    summary = summarize(trials, "pusht_keypoints", {"dcqfa_ros": "0.1.0"}, Path("out/report.html"))
    path = tmp_path / "summary.json"
    write_summary(path, summary)
    content = json.loads(path.read_text())
    assert content["mean_score"] == pytest.approx(0.7)
    assert content["ci95"] == pytest.approx(4.30265 * 0.264575 / 3**0.5, abs=1e-4)
    assert content["missed_ticks"] == 7  # lockstep has no deadlines
    assert content["variant"] == "w8a8, fp32"
    assert content["device"] == "test computer"
    assert content["trials"][1] == {
        "seed": 2,
        "score": 1.0,
        "steps": 3,
        "stop_reason": "success",
        "mode": "realtime",
    }
    assert content["bundle"] == "pusht_keypoints"
    assert content["report"] == "out/report.html"
    assert content["versions"] == {"dcqfa_ros": "0.1.0"}


def test_a_summary_of_one_trial_has_no_interval_and_of_none_is_refused() -> None:
    assert summarize([make_record()], "b", {}).ci95 is None
    with pytest.raises(ValueError, match="at least one"):
        summarize([], "b", {})


def test_success_is_a_full_score() -> None:
    assert make_record(score=1.0).success
    assert not make_record(score=0.999).success


def test_records_refuse_numbers_that_are_none() -> None:
    for field in ("score", "inference_ms_p50"):
        with pytest.raises(ValidationError, match=field):
            make_record(**{field: float("nan")})
