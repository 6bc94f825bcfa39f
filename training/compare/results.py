"""Results of a comparison as one JSON document: read back, refused where its cells must not stand in one table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dcqfa_ros.bundle.schema import Name, Text
from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.bundle.types import Sha256
from training.compare.config import LAST_SEED, BitsName, CompareError
from training.compare.cost import Cost
from training.compare.store import differing
from training.stress import Stress

FORMAT = 1
Score = Annotated[float, Field(ge=0.0, le=1.0)]


class Size(StrictModel):
    """Size of an entry: by the paper's convention (parameters x bits / 8), and of ``artifact_of``, MiB."""

    parameters: Annotated[int, Field(ge=1)]
    paper_mib: float
    artifact_mib: float
    artifact_of: Text


class LatencyRow(StrictModel):
    """Latency of one chunk, ms, on ``device``, and of which kind; None where it cannot be told, ``note`` says why."""

    ms: float | None
    device: Text | None
    kind: Text
    note: Text | None
    onnxruntime: Text | None = None
    python: Text | None = None


class Identity(StrictModel):
    """What must agree before results are put together; see :meth:`training.compare.contenders.Contender.identity`."""

    kind: Literal["bundle", "checkpoint", "supernet", "baseline"]
    weights: Sha256
    artifact: Sha256
    data: Sha256 | None
    policy: Sha256 | None
    bits: BitsName
    variant: Name | None
    subnet: Text | None
    baseline: Name | None
    baseline_bits: Text | None
    options: dict[str, bool | int | float | str]
    seed: int


class EntryResult(StrictModel):
    """Facts of an entry."""

    name: Name
    method: Text
    bits: BitsName
    identity: Identity
    executed: Text
    device_executes: Text | None
    sampler: Text
    denoising_steps: Annotated[int, Field(ge=1)]
    size: Size
    cost: Cost
    latency: LatencyRow | None
    report: dict[str, Any] | None
    note: Text | None
    stated: tuple[Literal["data", "policy"], ...]


class Protocol(StrictModel):
    """How a task was played."""

    metric: Text
    task: Name
    stress: Stress
    steps: int | None
    simulator: dict[str, Text]


class Cell(StrictModel):
    """Scores of an entry on a task, of consecutive seeds from ``first_seed`` on.

    ``engines`` has every version that any of them was played with; None where that was not recorded.
    """

    entry: Name
    task: Name
    seeds: Name
    first_seed: Annotated[int, Field(ge=0, le=LAST_SEED)]
    protocol: Protocol
    weights: Sha256
    artifact: Sha256
    scores: Annotated[tuple[Score, ...], Field(min_length=1)]
    mean_steps: float
    engines: dict[str, tuple[Text, ...]] | None = None

    def by_seed(self) -> dict[int, float]:
        """Score per seed."""
        return dict(enumerate(self.scores, self.first_seed))

    @property
    def key(self) -> tuple[str, str, str]:
        """Entry, task and seed set."""
        return self.entry, self.task, self.seeds

    @property
    def start_seeds(self) -> range:
        """The start seeds."""
        return range(self.first_seed, self.first_seed + len(self.scores))


class Results(StrictModel):
    """The whole document."""

    format: Literal[1]
    name: Name
    written: Text
    reference: Name
    margin: float
    data: Sha256
    policy: tuple[Sha256, ...]
    versions: dict[str, Text]
    entries: Annotated[tuple[EntryResult, ...], Field(min_length=1)]
    cells: Annotated[tuple[Cell, ...], Field(min_length=1)]

    def cell(self, entry: str, task: str, seeds: str) -> Cell | None:
        """One cell, None where it was not played."""
        wanted = (entry, task, seeds)
        return next((cell for cell in self.cells if (cell.entry, cell.task, cell.seeds) == wanted), None)

    def groups(self) -> list[tuple[str, str]]:
        """Tasks with their seed sets, in order."""
        return list(dict.fromkeys((cell.task, cell.seeds) for cell in self.cells))


def read_results(path: Path) -> Results:
    """Read results and check that they may stand in one table.

    Raises:
        CompareError: the file is missing, not of the schema, or mixes results; the field is named.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise CompareError(
            f"{path}: cannot be read ({error.strerror}); play the comparison and keep it with --save-results"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CompareError(f"{path}: no JSON ({error}); expected results of dcqfa compare") from error
    return parse_results(document, str(path))


def parse_results(document: Any, where: str) -> Results:
    """Results from a JSON document; see :func:`read_results`."""
    try:
        results = Results.model_validate_json(json.dumps(document), strict=True)
    except (TypeError, ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise CompareError(f"{where}: {error}") from error
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "(document)"
        raise CompareError(f"{where}: {field}: {first['msg']}; expected results of dcqfa compare") from error
    check_results(results, where)
    return results


def check_results(results: Results, where: str) -> None:
    """Refuse cells that must not stand in one table.

    Raises:
        CompareError: other data, full-precision policy, weights, seeds, protocol or simulator; the field is named.
    """
    entries = {entry.name: entry for entry in results.entries}
    if len(entries) != len(results.entries):
        raise CompareError(f"{where}: entries: a name is there twice")
    if results.reference not in entries:
        raise CompareError(f"{where}: reference: no entry is called {results.reference}")
    for entry in results.entries:
        for field, have, expected in (
            ("data", entry.identity.data, (results.data,)),
            ("policy", entry.identity.policy, results.policy),
        ):
            if have not in expected and not (have is None and field in entry.stated):
                raise CompareError(
                    f"{where}: entry {entry.name}: identity.{field} is {have}, the comparison's is "
                    f"{' or '.join(expected)}; such results must not be mixed"
                )
    seen: set[tuple[str, str, str]] = set()
    for cell in results.cells:
        what = f"{where}: cell {cell.entry}, {cell.task}, {cell.seeds}"
        if cell.entry not in entries:
            raise CompareError(f"{what}: there is no such entry")
        if (cell.entry, cell.task, cell.seeds) in seen:
            raise CompareError(f"{what}: is there twice")
        seen.add((cell.entry, cell.task, cell.seeds))
        identity = entries[cell.entry].identity
        for field in ("weights", "artifact"):
            if getattr(cell, field) != getattr(identity, field):
                raise CompareError(
                    f"{what}: {field} is {getattr(cell, field)}, its entry's is {getattr(identity, field)}; results "
                    "of different checkpoints must not be mixed"
                )
        if cell.protocol.task != cell.task:
            raise CompareError(f"{what}: protocol.task is {cell.protocol.task}")
    for task, seeds in results.groups():
        group = [cell for cell in results.cells if (cell.task, cell.seeds) == (task, seeds)]
        for cell in group[1:]:
            _refuse_unlike(where, group[0], cell)


def unlike_cells(one: Cell, other: Cell) -> Iterator[tuple[str, Any, Any]]:
    """Fields in which two cells of one task were not played alike, with both values."""

    def document(cell: Cell) -> dict[str, Any]:
        protocol = cell.protocol.model_dump(mode="json")
        return {"first_seed": cell.first_seed, "seeds": len(cell.scores), "protocol": protocol}

    return differing(document(one), document(other))


def _refuse_unlike(where: str, one: Cell, other: Cell) -> None:
    """Refuse two cells of one task that were not played alike."""
    for name, a, b in unlike_cells(one, other):
        raise CompareError(
            f"{where}: task {one.task}, seeds {one.seeds}: {one.entry} and {other.entry} were not played alike: {name} "
            f"is {a} and {b}; such results must not be mixed"
        )


def unlike(one: EntryResult, other: EntryResult, *leave_out: str) -> Iterator[tuple[str, Any, Any]]:
    """Fields in which an entry of two results is another network or sampled in another way, with both values.

    Args:
        one: of the first results.
        other: of the second.
        leave_out: fields of the identity that may differ.
    """

    def document(entry: EntryResult) -> dict[str, Any]:
        identity = entry.identity.model_dump(mode="json", exclude=set(leave_out))
        return {"identity": identity, "sampler": entry.sampler, "denoising_steps": entry.denoising_steps}

    return differing(document(one), document(other))


def joined(results: Sequence[Results], names: Sequence[str]) -> Results:
    """Results of several machines or days as one.

    Args:
        results: at least one; the first one's reference and margin are kept, of a cell that several hold the first
            one's scores, the versions of all and the time when the last was written.
        names: of their files, for errors.

    Raises:
        CompareError: they differ in data, policy or the identity of an entry, or are not played alike.
    """
    first, where = results[0], " and ".join(names)
    entries = {entry.name: entry for entry in first.entries}
    cells = {(cell.entry, cell.task, cell.seeds): cell for cell in first.cells}
    for other, name in zip(results[1:], names[1:], strict=True):
        for field in ("data", "policy"):
            if getattr(first, field) != getattr(other, field):
                raise CompareError(
                    f"{name}: {field} is {getattr(other, field)}, that of {names[0]} {getattr(first, field)}; such "
                    "results must not be mixed"
                )
        for entry in other.entries:
            known = entries.setdefault(entry.name, entry)
            for field, there, here in unlike(known, entry):
                raise CompareError(
                    f"{name}: entry {entry.name}: {field} is {here}, in {names[0]} {there}; such results must not be "
                    "mixed"
                )
        for cell in other.cells:
            played = cells.setdefault((cell.entry, cell.task, cell.seeds), cell)
            _refuse_unlike(f"{name} and before it", played, cell)
    versions = {
        name: " and ".join(dict.fromkeys(part.versions[name] for part in results if name in part.versions))
        for name in dict.fromkeys(name for part in results for name in part.versions)
    }
    update = {"entries": tuple(entries.values()), "cells": tuple(cells.values()), "versions": versions}
    made = first.model_copy(update=update | {"written": max(part.written for part in results)})
    check_results(made, where)
    return made
