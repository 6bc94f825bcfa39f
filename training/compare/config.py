"""What ``dcqfa compare`` compares: one YAML file, unknown fields refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dcqfa_ros.bundle.document import DocumentError, parse_document
from dcqfa_ros.bundle.errors import BundleNotFoundError
from dcqfa_ros.bundle.schema import Name, Positive, Text
from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.bundle.types import Sha256
from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import find_bundle, share_directory
from training.stress import STANDARD, Stress

LAST_SEED = 2**32 - 1
BITS = ("fp32", "fp16", "fp8", "w8a8", "w4a4", "mixed")
BitsName = Literal["fp32", "fp16", "fp8", "w8a8", "w4a4", "mixed"]
Seed = Annotated[int, Field(ge=0, le=LAST_SEED)]


class CompareError(UserError, ValueError):
    """A comparison that cannot be made; the message names file and field, what was expected, and what to do."""


class StatedCost(StrictModel):
    """Training cost that no file records; ``source`` says where the figures come from."""

    hours: Annotated[float, Field(ge=0.0)] | None = None
    teacher_calls: Annotated[int, Field(ge=0)] | None = None
    source: Text


class Entry(StrictModel):
    """One row: a network at its bits, from exactly one source.

    Attributes:
        name: unique; claims and pairs refer to it.
        method: how it was made, as the table says it.
        paper: the method under which the paper's figures are looked up, where it is called otherwise there.
        bits: what its linear layers run at; checked against the source.
        bundle: a bundle, of which ``variant`` is run (default: its default variant).
        checkpoint: a full-precision run, or a bundle's full-precision policy; ``bits: fp16`` stores its weights as
            float16.
        supernet: a supernet's run or checkpoint, of which ``subnet`` is exported and run.
        baseline: a method of ``training.baselines`` on the comparison's ``policy`` at ``bits``, with ``options``.
        baseline_bits: bits as the method is asked for them, where ``bits`` is ``mixed``.
        trained: of a baseline that trains, its own checkpoint.
        seed: of a baseline.
        stated: what the source does not record and the author of this file states to be that of the comparison: its
            demonstrations (``data``), its full-precision policy (``policy``); the table says so.
        cost: training cost where no file tells.
        note: shown under the table.
        made_by: the command that makes the source, where it is not shipped: without it the entry is left out.
    """

    name: Name
    method: Text
    paper: Text | None = None
    bits: BitsName
    bundle: Text | None = None
    variant: Name | None = None
    checkpoint: Text | None = None
    supernet: Text | None = None
    subnet: Text | None = None
    baseline: Name | None = None
    baseline_bits: Text | None = None
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    trained: Text | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    stated: tuple[Literal["data", "policy"], ...] = ()
    cost: StatedCost | None = None
    note: Text | None = None
    made_by: Text | None = None

    @property
    def kind(self) -> Literal["bundle", "checkpoint", "supernet", "baseline"]:
        """Which source the entry is of."""
        if self.baseline is not None:
            return "baseline"
        if self.bundle is not None:
            return "bundle"
        return "checkpoint" if self.checkpoint is not None else "supernet"

    @model_validator(mode="after")
    def _one_source(self) -> Entry:
        sources = [n for n in ("bundle", "checkpoint", "supernet", "baseline") if getattr(self, n) is not None]
        if len(sources) != 1:
            raise ValueError(
                f"entry {self.name}: expected one of bundle, checkpoint, supernet and baseline, got "
                f"{', '.join(sources) or 'none'}"
            )
        owners = {"variant": "bundle", "subnet": "supernet"}
        owners |= dict.fromkeys(("baseline_bits", "trained", "options", "seed"), "baseline")
        for field, owner in owners.items():
            if getattr(self, field) and getattr(self, owner) is None:
                raise ValueError(f"entry {self.name}: {field} belongs to an entry with {owner}")
        if self.made_by is not None and self.baseline is not None and self.trained is None:
            raise ValueError(f"entry {self.name}: made_by belongs to an entry with a source, such as trained")
        if self.supernet is not None and self.subnet is None:
            raise ValueError(f"entry {self.name}: subnet is missing; name one, such as w4a4")
        if self.baseline is not None:
            if self.bits == "mixed" and self.baseline_bits is None:
                raise ValueError(f"entry {self.name}: baseline_bits is missing; name those of the method, as in w4a16")
            if self.bits != "mixed" and self.baseline_bits not in (None, self.bits):
                raise ValueError(f"entry {self.name}: bits {self.bits} but baseline_bits {self.baseline_bits}")
        if self.kind == "checkpoint" and self.bits not in ("fp32", "fp16"):
            raise ValueError(f"entry {self.name}: a full-precision checkpoint runs at fp32 or fp16, not {self.bits}")
        return self


@dataclass(frozen=True, slots=True)
class NotPlayed:
    """An entry that is left out: the source that is not there (None: it is), and the command that makes it."""

    name: str
    missing: str | None
    made_by: str | None

    def __str__(self) -> str:
        if self.missing is None:
            return f"{self.name}: not played"
        made = f"; made by: {self.made_by}" if self.made_by else ""
        return f"{self.name}: not played, {self.missing} is not there{made}"

    def document(self) -> dict[str, str | None]:
        """As JSON."""
        return {"name": self.name, "missing": self.missing, "made_by": self.made_by}


class SeedSet(StrictModel):
    """``count`` consecutive start seeds from ``first`` on."""

    first: Seed
    count: Positive

    @property
    def seeds(self) -> range:
        """The seeds."""
        return range(self.first, self.first + self.count)

    @model_validator(mode="after")
    def _in_range(self) -> SeedSet:
        if self.first + self.count - 1 > LAST_SEED:
            raise ValueError(f"seeds {self.first} to {self.first + self.count - 1}: start seeds end at {LAST_SEED}")
        return self


class Task(StrictModel):
    """A task, the seed sets it is played on, and the row of the paper's figures it is beside.

    Attributes:
        name: unique.
        seeds: names of seed sets.
        stress: what makes it harder than the published task.
        entries: the entries that play it; all of them where it is empty.
        paper: the paper's task (a name in the file of figures).
    """

    name: Name
    seeds: Annotated[tuple[Name, ...], Field(min_length=1)]
    stress: Stress = STANDARD
    entries: tuple[Name, ...] = ()
    paper: Name | None = None


class Pair(StrictModel):
    """Two entries whose difference ``first - second`` is reported besides those to the reference."""

    first: Name
    second: Name


class Claim(StrictModel):
    """What the paper claims of two entries, to be judged by the interval of ``first - second``.

    ``above``: the difference is above 0; ``below``: below 0; ``not_worse``: above minus the margin.
    """

    text: Text
    source: Text
    kind: Literal["above", "below", "not_worse"]
    first: Name
    second: Name
    task: Name
    seeds: Name
    paper_difference: float | None = None


class Latency(StrictModel):
    """Latency of one chunk: from the look-up ``table`` of a device, or measured here (one thread, batch 1)."""

    table: Text | None = None
    measured_rounds: Annotated[int, Field(ge=5)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Latency:
        if (self.table is None) == (self.measured_rounds is None):
            raise ValueError("latency: expected either table (a file) or measured_rounds (a number of chunks)")
        return self


class CompareConfig(StrictModel):
    """The whole file.

    Attributes:
        policy: the full-precision policy that every entry comes from (bundle, run or checkpoint).
        training: training YAML of ``policy``, which a bundle does not hold.
        policy_sha256: every hash under which files know that policy: of a bundle's full-precision variant, of the
            weights as ``dcqfa train`` records its teacher (read back from a bundle they are not those of the run, bit
            for bit).
        data_sha256: of the demonstrations behind every entry, as the checkpoints record it.
        data: path of the demonstrations, for baselines that calibrate; ``--data`` takes its place.
        reference: the entry that all are compared with.
        margin: of non-inferiority.
        verdict_seeds: fewest seeds of which a difference is said in words (*better*, *non-inferior*), and a claim made.
        block: seeds that are played and kept together; an interruption loses at most one block.
        steps: denoising steps of every entry; None for the policy's own.
        results: the committed results that ``--from-results`` prints.
        paper: the file of the paper's figures.
        amortised: the file of measured costs of one supernet against one training per device.
    """

    name: Name
    policy: Text
    training: Text
    policy_sha256: Annotated[tuple[Sha256, ...], Field(min_length=1)]
    data_sha256: Sha256
    data: Text | None = None
    reference: Name
    margin: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.03
    verdict_seeds: Positive = 1
    block: Annotated[int, Field(ge=1, le=250)] = 50
    steps: Positive | None = None
    latency: Latency
    results: Text
    paper: Text
    amortised: Text | None = None
    seeds: Annotated[dict[Name, SeedSet], Field(min_length=1)]
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    entries: Annotated[tuple[Entry, ...], Field(min_length=1)]
    pairs: tuple[Pair, ...] = ()
    claims: tuple[Claim, ...] = ()

    def entry(self, name: str) -> Entry:
        """The entry called ``name``."""
        return next(entry for entry in self.entries if entry.name == name)

    def task(self, name: str) -> Task:
        """The task called ``name``."""
        return next(task for task in self.tasks if task.name == name)

    def only(self, names: Sequence[str]) -> CompareConfig:
        """The comparison of these entries and the reference alone; claims about others are then not measured.

        Tasks that the reference would play alone are left out, unless it is the one asked for.

        Raises:
            CompareError: there is no such entry, or no task is played by any of them.
        """
        known = [entry.name for entry in self.entries]
        for name in names:
            if name not in known:
                raise CompareError(f"--only {name}: no such entry; there is {', '.join(known)}")
        kept = tuple(entry for entry in self.entries if entry.name in (*names, self.reference))
        tasks = tuple(task for task in self.tasks if not task.entries or set(names) & set(task.entries))
        if not tasks:
            raise CompareError(f"--only {' --only '.join(names)}: no task is played by it; name it in a task's entries")
        return self.model_copy(update={"entries": kept, "tasks": tasks})

    def playable(self, named: Sequence[str] = ()) -> tuple[CompareConfig, list[NotPlayed]]:
        """The comparison without the entries whose source is not there and has a ``made_by``, and those entries.

        Args:
            named: entries that were asked for by name.

        Raises:
            CompareError: the reference or one of ``named`` is among them.
        """
        left_out = []
        for entry in self.entries:
            missing = missing_source(entry)
            if missing is None or entry.made_by is None:
                continue
            if entry.name in named or entry.name == self.reference:
                what = f"--only {entry.name}" if entry.name in named else f"reference {entry.name}"
                raise CompareError(f"{what}: {missing[1]} is not there; make it with: {entry.made_by}")
            left_out.append(NotPlayed(entry.name, missing[1], entry.made_by))
        names = {entry.name for entry in left_out}
        kept = tuple(entry for entry in self.entries if entry.name not in names)
        return self.model_copy(update={"entries": kept}), left_out

    def players(self, task: Task) -> list[Entry]:
        """The entries that play ``task``, in the order of the file."""
        return [entry for entry in self.entries if not task.entries or entry.name in task.entries]

    @model_validator(mode="after")
    def _names_exist(self) -> CompareConfig:
        entries, tasks = [entry.name for entry in self.entries], [task.name for task in self.tasks]
        for what, names in (("entries", entries), ("tasks", tasks)):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"{what}: {twice[0]} is there twice; names must differ")
        _known("reference", [self.reference], entries)
        for task in self.tasks:
            _known(f"task {task.name}: seeds", task.seeds, self.seeds)
            _known(f"task {task.name}: entries", task.entries, entries)
            if task.entries and self.reference not in task.entries:
                raise ValueError(f"task {task.name}: entries: the reference {self.reference} has to play too")
            self._disjoint(task)
        for number, pair in enumerate(self.pairs):
            _known(f"pairs[{number}]", (pair.first, pair.second), entries)
        for number, claim in enumerate(self.claims):
            _known(f"claims[{number}]", (claim.first, claim.second), entries)
            _known(f"claims[{number}].task", [claim.task], tasks)
            _known(f"claims[{number}].seeds", [claim.seeds], self.task(claim.task).seeds)
            count = self.seeds[claim.seeds].count
            if count < self.verdict_seeds:
                raise ValueError(
                    f"claims[{number}].seeds: {claim.seeds} has {count} seeds, expected at least verdict_seeds, "
                    f"{self.verdict_seeds}"
                )
        for first, second in [(p.first, p.second) for p in self.pairs] + [(c.first, c.second) for c in self.claims]:
            if first == second:
                raise ValueError(f"{first} is compared with itself")
        return self

    def _disjoint(self, task: Task) -> None:
        """Refuse seed sets of one task that overlap: their rows would not be independent."""
        if len(set(task.seeds)) != len(task.seeds):
            raise ValueError(f"task {task.name}: seeds: a seed set is named twice")
        ordered = sorted(((self.seeds[name].seeds, name) for name in task.seeds), key=lambda item: item[0].start)
        for (before, one), (after, other) in pairwise(ordered):
            if after.start < before.stop:
                raise ValueError(f"task {task.name}: seeds {one} and {other} overlap")


def _known(field: str, names: Iterable[str], there: Iterable[str] | Mapping[str, Any]) -> None:
    known = list(there)
    for name in names:
        if name not in known:
            raise ValueError(f"{field}: {name} is not there; there is {', '.join(known)}")


def load_compare(path: Path) -> CompareConfig:
    """Read a comparison.

    Raises:
        CompareError: the file is missing, no plain YAML, or has a field that is unknown, missing or refused.
    """
    try:
        return parse_document(path.read_bytes(), CompareConfig)
    except OSError as error:
        raise CompareError(
            f"{path}: cannot be read ({error.strerror}); give the path of a comparison's YAML"
        ) from error
    except DocumentError as error:
        lines = [f"{path}: {field or '(document)'}: {message}" for field, message in error.issues]
        raise CompareError("\n".join(lines)) from error


def missing_source(entry: Entry) -> tuple[str, str] | None:
    """Field and text of the source of an entry that is not there; None where all are."""
    for field in ("checkpoint", "supernet", "trained"):
        text = getattr(entry, field)
        if text is not None and not found(text).exists():
            return field, text
    if entry.bundle is not None:
        try:
            find_bundle(str(found(entry.bundle)))
        except BundleNotFoundError:
            return "bundle", entry.bundle
    return None


def found(text: str) -> Path:
    """A file or folder that a comparison names: as given, or beside the installed ``config`` and ``models``."""
    path = Path(text).expanduser()
    beside = share_directory() / text
    return beside if not path.exists() and beside.exists() else path
