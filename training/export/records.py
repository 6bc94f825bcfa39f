"""Evaluations and measured latencies that a bundle keeps with its variants."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dcqfa_ros.bundle.schema import LatencyRecord, QualityRecord
from dcqfa_ros.devices.records import bench_records
from dcqfa_ros.errors import UserError

Record = TypeVar("Record", LatencyRecord, QualityRecord)


class RecordError(UserError, ValueError):
    """A file of results that cannot be recorded; the message names option or file and field."""


@dataclass(frozen=True, slots=True)
class Result(Generic[Record]):
    """A record with the file it comes from, the weights it was taken with and the bundle they were in."""

    record: Record
    weights: str
    file: Path
    bundle: str

    def of(self, bundle: str) -> Record:
        """The record, its command about the bundle called ``bundle``, which holds the same weights."""
        command = " ".join(bundle if word == self.bundle else word for word in self.record.command.split(" "))
        return self.record.model_copy(update={"command": command})


Results = Mapping[str, tuple[Result[Record], ...]]
"""Results by variant."""


def read_quality(arguments: Sequence[str]) -> dict[str, tuple[Result[QualityRecord], ...]]:
    """Read ``VARIANT=FILE`` arguments, each FILE the output of ``dcqfa eval --json``.

    Raises:
        RecordError: an argument has another form, or a file cannot be read, lacks a field, is about a checkpoint, or
            its seeds have gaps.
    """
    records: dict[str, tuple[Result[QualityRecord], ...]] = {}
    for argument in arguments:
        variant, separator, file = argument.partition("=")
        if not (variant and separator and file):
            raise RecordError(f"--quality {argument}: expected VARIANT=FILE")
        records[variant] = (*records.get(variant, ()), _record(variant, Path(file)))
    return records


def read_latency(files: Sequence[Path]) -> dict[str, tuple[Result[LatencyRecord], ...]]:
    """Read the ONNX Runtime rows per variant of files that ``dcqfa bench engine --json`` wrote.

    Raises:
        RecordError: a file cannot be read or lacks a field.
    """
    records: dict[str, tuple[Result[LatencyRecord], ...]] = {}
    for file in files:
        document = _load(file, "dcqfa bench engine --json")
        with _fields_of(file, "dcqfa bench engine --json"):
            for row in bench_records(document):
                result = Result(row.record, row.weights, file, document["bundle"])
                records[row.variant] = (*records.get(row.variant, ()), result)
    return records


def _record(variant: str, file: Path) -> Result[QualityRecord]:
    document = _load(file, "dcqfa eval --json")
    with _fields_of(file, "dcqfa eval --json"):
        seeds, first, steps = list(document["seeds"]), document["first_seed"], document["denoising_steps"]
        if document["variant"] != variant:
            raise RecordError(f"{file}: holds an evaluation of variant {document['variant']!r}, not of {variant!r}")
        weights = document["weights"]
        if not isinstance(weights, str):
            raise RecordError(f"{file}: holds an evaluation of no bundle; export first and evaluate the bundle")
        if seeds != list(range(first, first + len(seeds))):
            raise RecordError(f"{file}: seeds: expected consecutive ones from first_seed {first}")
        record = QualityRecord(
            metric=document["metric"],
            mean=document["mean"],
            ci95=document["ci95"],
            first_seed=first,
            seeds=len(seeds),
            steps=steps,
            command=f"dcqfa eval {document['policy']} --variant {variant} --seeds {len(seeds)} --first-seed {first} "
            f"--steps {steps}",
        )
        return Result(record, weights, file, document["policy"])


def _load(file: Path, source: str) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RecordError(f"{file}: no JSON ({error}); expected the output of `{source}`") from error
    if not isinstance(document, dict):
        raise RecordError(f"{file}: expected the output of `{source}`")
    return document


@contextmanager
def _fields_of(file: Path, source: str) -> Iterator[None]:
    """Name ``file`` where a field of its document is missing or of another kind."""
    try:
        yield
    except KeyError as error:
        raise RecordError(f"{file}: field {error} is missing; expected the output of `{source}`") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{file}: expected the output of `{source}` ({error})") from error
