"""The folder of one series of trials: records as they come, summary and report at the end."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import dcqfa_ros
from dcqfa_ros.errors import UserError
from dcqfa_ros.trials.records import (
    TrialRecord,
    TrialSummary,
    append_record,
    summarize,
    write_csv,
    write_summary,
)
from dcqfa_ros.trials.report import write_report
from dcqfa_ros.trials.video import TrialVideo, VideoError, trial_video

RECORDS, TABLE, SUMMARY, REPORT = "trials.jsonl", "trials.csv", "summary.json", "report.html"
NAMED_PACKAGES = ("numpy", "onnxruntime", "gym-pusht", "pymunk", "ros-jazzy-rclpy")


class SessionError(UserError):
    """The folder cannot take the trials; the message names it and what to do."""


class TrialSession:
    """Writes ``trials.jsonl``, ``trials.csv``, ``summary.json`` and ``report.html`` into one folder."""

    def __init__(self, folder: Path, bundle: str, overwrite: bool = False) -> None:
        """Create the folder; records of an earlier series are replaced only when ``overwrite`` says so.

        Raises:
            SessionError: the folder holds records already, or cannot be created.
        """
        self.folder, self.bundle = folder, bundle
        self.records: list[TrialRecord] = []
        self.notes: list[str] = []
        self._states: dict[int, tuple[Sequence[NDArray[Any]], Sequence[NDArray[Any]]]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for name in (RECORDS, TABLE, SUMMARY, REPORT):
                    (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise SessionError(f"{folder}: the output folder cannot be written: {error.strerror}") from error
        if (folder / RECORDS).exists():
            raise SessionError(f"{folder}: holds the records of earlier trials; give another output folder")

    def add(self, record: TrialRecord, states: Sequence[NDArray[Any]], targets: Sequence[NDArray[Any]]) -> None:
        """Keep one finished trial at once, so that a killed run loses none of those before."""
        self._states[len(self.records)] = (states, targets)
        self.records.append(record)
        append_record(self.folder / RECORDS, record)
        write_csv(self.folder / TABLE, self.records)

    def finish(self, videos: int = 1, title: str = "Push-T trials") -> TrialSummary:
        """Write summary and report, with a video of the first ``videos`` trials.

        Raises:
            ValueError: there are no records.
        """
        report = self.folder / REPORT
        summary = summarize(self.records, self.bundle, versions(), report)
        films: dict[int, TrialVideo] = {}
        for index in list(self._states)[:videos]:
            states, targets = self._states[index]
            if not states:
                continue
            try:
                films[index] = trial_video(states, targets)
            except VideoError as error:
                self.notes.append(f"no video in the report: {error}")
                break
        write_report(report, title, self.records, summary, films)
        write_summary(self.folder / SUMMARY, summary)
        return summary


def versions() -> dict[str, str]:
    """Versions of this project, Python and the packages that decide the result."""
    found = {"dcqfa_ros": dcqfa_ros.__version__, "python": platform.python_version()}
    for package in NAMED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # an installed ROS brings its packages without Python metadata
    return found
