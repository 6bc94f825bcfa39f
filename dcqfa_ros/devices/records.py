"""Latencies measured on this computer, kept in the user's cache: a bundle is sealed and cannot be written to.

A record belongs to the weights it was measured with (the SHA-256 of the variant's denoiser), so it dies with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from dcqfa_ros.atomic import replace_file
from dcqfa_ros.bundle.schema import LatencyRecord, Name, Sha256, VariantSpec
from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import cache_directory
from dcqfa_ros.runtime.engines import ONNXRUNTIME, RUNTIMES, RuntimeFacts

FILE_NAME = "latency.json"


class RecordsError(UserError, ValueError):
    """The file of measured latencies cannot be read or written; names the file and what to do."""


class LocalRecord(StrictModel):
    """One measurement: ``weights`` is the SHA-256 of the denoiser it was taken with."""

    variant: Name
    weights: Sha256
    record: LatencyRecord


class LocalRecords(StrictModel):
    """The whole file."""

    schema_version: Literal[1] = 1
    records: tuple[LocalRecord, ...] = ()


def records_file() -> Path:
    """Return where measurements are kept; the file may not exist yet."""
    return cache_directory() / FILE_NAME


def load_records(file: Path | None = None) -> LocalRecords:
    """Return the measurements; none where the file does not exist.

    Raises:
        RecordsError: the file is there but cannot be read or is not of this schema.
    """
    file = file or records_file()
    try:
        return LocalRecords.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return LocalRecords()
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "document"
        raise RecordsError(f"{file}: {field}: {first['msg']}; delete the file and measure again") from error
    except OSError as error:
        raise RecordsError(f"{file}: cannot be read ({error.strerror})") from error


def save_records(new: Iterable[LocalRecord], file: Path | None = None) -> Path:
    """Add measurements, atomically; a new one replaces that of the same weights, device, runtime, threads and steps.

    Raises:
        RecordsError: the file cannot be read or written.
    """
    file = file or records_file()
    merged = {_key(r): r for r in load_records(file).records} | {_key(r): r for r in new}
    text = json.dumps(LocalRecords(records=tuple(merged.values())).model_dump(mode="json"), indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, f"{text}\n".encode(), 0o600)
    except OSError as error:
        raise RecordsError(f"{file}: cannot be written ({error.strerror})") from error
    return file


def records_of(variant: VariantSpec, local: LocalRecords) -> tuple[LatencyRecord, ...]:
    """Return what is known of a variant's latency: this computer's measurements first, then the bundle's records."""
    weights = variant.weights
    own = tuple(r.record for r in local.records if r.weights == weights)
    return own + variant.latency


def bench_records(document: Mapping[str, Any]) -> tuple[LocalRecord, ...]:
    """Return the rows of this software's runtimes in what ``dcqfa bench engine --json`` prints.

    Each belongs to the weights it measured. Rows of other engines are for comparison only.

    Raises:
        KeyError: a field is missing.
        ValueError: a field's value is not of its kind.
        TypeError: a field is not of its structure.
    """
    versions = document["versions"]
    return tuple(
        LocalRecord(
            variant=row["variant"],
            weights=row["weights"],
            record=LatencyRecord(
                device=document["fingerprint"],
                runtime=f"{row['engine']} {_version(RUNTIMES[row['engine']], versions)}",
                kind="measured",
                threads=row["threads"],
                steps=row["steps"],
                p50_ms=row["p50_ms"],
                p99_ms=row["p99_ms"],
                command=f"dcqfa bench engine --bundle {document['bundle']} --steps {row['steps']} "
                f"--threads {row['threads']}"
                + ("" if row["engine"] == ONNXRUNTIME else f" --runtimes {row['engine']}"),
            ),
        )
        for row in document["rows"]
        if row["engine"] in RUNTIMES
    )


def _version(facts: RuntimeFacts, versions: Mapping[str, str]) -> str:
    """Return the version of a runtime among those of packages.

    Raises:
        KeyError: none of its packages is among them.
    """
    for name in facts.distributions:
        if name in versions:
            return versions[name]
    raise KeyError(f"versions.{facts.distributions[0]}")


def _key(local: LocalRecord) -> tuple[str, str, str, int, int]:
    r = local.record
    return local.weights, r.device, _runtime_name(r.runtime), r.threads, r.steps


def _runtime_name(text: str) -> str:
    return text.split()[0].split("/")[0]


def matches(record: LatencyRecord, device: str, runtime: str, threads: int | None, steps: int) -> bool:
    """Whether a record says something about this device, runtime (any version), step count and thread count.

    ``threads`` None: of any thread count, as on a GPU.
    """
    return (
        (record.device, _runtime_name(record.runtime), record.steps) == (device, runtime, steps)
        and threads in (None, record.threads)
    )  # fmt: skip


def is_of_version(record: LatencyRecord, version: str | None) -> bool:
    """Whether a record was taken with this version of its runtime; a prediction may leave the version open."""
    _, _, recorded = record.runtime.partition(" ")
    if not recorded:
        return record.kind == "predicted"
    return recorded == version
