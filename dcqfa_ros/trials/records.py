"""What is kept of a trial, and the files it is kept in: JSON lines, CSV and ``summary.json``.

Every file is written whole to a temporary neighbour and renamed, so a killed process leaves the old content, never a
torn line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from dcqfa_ros.atomic import replace_file
from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.errors import UserError
from dcqfa_ros.trials.statistics import mean_interval

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1, max_length=2000)]
Milliseconds = Annotated[float, Field(ge=0.0)]


_LISTS = {"curve", "parts", "swaps"}


class RecordError(UserError, ValueError):
    """A record file cannot be read; the message names file, line and field."""


class TrialMode(str, Enum):
    """How time passed during the trial."""

    REALTIME = "realtime"  # control ticks at wall-clock deadlines
    LOCKSTEP = "lockstep"  # the cell waits for the policy (rate:=max)


class TrialSwap(StrictModel):
    """One exchange of variants that ended during a trial.

    Attributes:
        swap_id: its number since the policy was configured.
        time: UTC time in ISO 8601 with time zone at which it ended.
        step: steps of the trial that had been judged when it was reported.
        requested: variant that was asked for, ``BUNDLE:VARIANT`` where it is another bundle's.
        runtime: runtime that was asked for.
        previous: ``<runtime>/<variant>`` before, empty where none ran.
        engine: the same afterwards.
        outcome: ``switched``, ``failed`` (the old variant went on) or ``superseded`` (by a newer request).
        reason: why not switched.
        load_ms: time from the request to the outcome, ms.
        gap_ms: time for which no chunk could be begun, ms.
    """

    swap_id: Count
    time: Text
    step: Count
    requested: Text
    runtime: Text
    previous: str
    engine: str
    outcome: Literal["switched", "failed", "superseded"]
    reason: str = Field(max_length=2000)
    load_ms: Milliseconds
    gap_ms: Milliseconds


class TrialPart(StrictModel):
    """Part of a trial that one engine computed: from chunk ``first_chunk`` (counted from 0) to the next part's."""

    first_chunk: Count
    engine: Text


class TrialRecord(StrictModel):
    """One finished trial.

    Attributes:
        seed: start state and noise.
        score: maximum over the steps of coverage / 0.95, clipped to [0, 1].
        steps: actions executed.
        stop_reason: why it ended, such as ``success``, ``step_limit`` or a fault's name.
        variant: variants of the bundle that ran, in order of use, separated by ``, ``.
        device: the computer the policy ran on.
        curve: coverage after each step, 0..1.
        missed_ticks: control ticks that came over a full period late (always 0 in lockstep).
        starved_ticks: control ticks at which no action was there.
        chunks: action chunks received.
        inference_ms_p50: median time the policy took for a chunk, ms; None without chunks.
        inference_ms_p99: 99th percentile of the same.
        started: UTC time in ISO 8601 with time zone.
        mode: real time or lockstep.
        cell: the cell, such as ``pusht``.
        parts: which engine (``<runtime>/<variant>``) computed which chunks, in order; empty where none did.
        swaps: exchanges of variants that ended during the trial, in order.
    """

    seed: Count
    score: Share
    steps: Count
    stop_reason: Text
    variant: Text
    device: Text
    curve: tuple[Share, ...]
    missed_ticks: Count
    starved_ticks: Count
    chunks: Count
    inference_ms_p50: Milliseconds | None
    inference_ms_p99: Milliseconds | None
    started: Text
    mode: TrialMode
    cell: Text
    parts: tuple[TrialPart, ...] = ()
    swaps: tuple[TrialSwap, ...] = ()

    @field_validator("started")
    @classmethod
    def _is_utc(cls, value: str) -> str:
        try:
            time = datetime.fromisoformat(value)
        except ValueError as error:
            raise ValueError(f"expected an ISO 8601 time, got {value!r}") from error
        if time.utcoffset() != timedelta(0):
            raise ValueError(f"expected a UTC time ending in +00:00, got {value!r}")
        return value

    @property
    def success(self) -> bool:
        """Whether coverage reached 0.95."""
        return self.score >= 1.0


class TrialSummaryRow(StrictModel):
    """A trial as ``summary.json`` lists it."""

    seed: Count
    score: Share
    steps: Count
    stop_reason: Text
    mode: TrialMode


class TrialSummary(StrictModel):
    """Content of ``summary.json``.

    Attributes:
        device: the computer the policy ran on (several: separated by ``, ``).
        variant: the variants that ran, likewise.
        bundle: name of the policy bundle.
        trials: the trials in order.
        mean_score: mean score.
        ci95: half-width of its 95 % Student t interval; None for a single trial.
        missed_ticks: sum over the real-time trials.
        report: path of the HTML report; None when none was asked for.
        versions: software versions by name.
    """

    device: Text
    variant: Text
    bundle: Text
    trials: tuple[TrialSummaryRow, ...] = Field(min_length=1)
    mean_score: Share
    ci95: float | None
    missed_ticks: Count
    report: Text | None
    versions: dict[str, str]


def summarize(
    records: Sequence[TrialRecord], bundle: str, versions: Mapping[str, str], report: Path | None = None
) -> TrialSummary:
    """Return the summary of ``records``.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("summary: expected at least one trial, got none")
    interval = mean_interval([record.score for record in records])
    return TrialSummary(
        device=", ".join(dict.fromkeys(record.device for record in records)),
        variant=", ".join(dict.fromkeys(record.variant for record in records)),
        bundle=bundle,
        trials=tuple(
            TrialSummaryRow(seed=r.seed, score=r.score, steps=r.steps, stop_reason=r.stop_reason, mode=r.mode)
            for r in records
        ),
        mean_score=min(1.0, interval.estimate),
        ci95=interval.half_width,
        missed_ticks=sum(record.missed_ticks for record in records if record.mode is TrialMode.REALTIME),
        report=None if report is None else str(report),
        versions=dict(versions),
    )


def append_record(path: Path, record: TrialRecord) -> None:
    """Add ``record`` to the JSON-lines file ``path``, creating it if needed. One writer at a time.

    Raises:
        RecordError: the file does not end with a complete line, so it was not written by this function.
        OSError: the file cannot be written.
    """
    old = path.read_bytes() if path.exists() else b""
    if old and not old.endswith(b"\n"):
        raise RecordError(f"{path}: line {old.count(10) + 1}: incomplete (no line end); repair or move the file")
    replace_file(path, old + record.model_dump_json().encode() + b"\n")


def read_records(path: Path) -> list[TrialRecord]:
    """Return the records of a JSON-lines file, in order.

    Raises:
        RecordError: the file cannot be read, or a line is not a trial record; the message names line and field.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RecordError(f"{path}: cannot read trial records: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(TrialRecord.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "record"
            raise RecordError(f"{path}: line {number}: {field}: {first['msg']}") from error
    return records


def write_csv(path: Path, records: Sequence[TrialRecord]) -> None:
    """Write ``records`` as a table with a header line; curves, parts and swaps are left to the JSON lines.

    Raises:
        OSError: the file cannot be written.
    """
    columns = [name for name in TrialRecord.model_fields if name not in _LISTS]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(record.model_dump(mode="json", exclude=_LISTS))
    replace_file(path, text.getvalue().encode())


def write_summary(path: Path, summary: TrialSummary) -> None:
    """Write ``summary.json``, indented for people.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file(path, (json.dumps(summary.model_dump(mode="json"), indent=2) + "\n").encode())
