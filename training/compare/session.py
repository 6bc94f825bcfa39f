"""Plays a comparison, cell by cell and block by block, and puts its results together."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dcqfa_ros.bench.conditions import versions
from dcqfa_ros.bundle.load import BUNDLE_YAML
from training.checkpoint import CHECKPOINT
from training.compare.config import CompareConfig, CompareError, Entry, Task, found
from training.compare.contenders import SIMULATED, Contender, Runnable
from training.compare.latency import ENGINE, NOT_MEASURED, measured_latency, table_latency
from training.compare.opener import Opener
from training.compare.results import FORMAT as RESULTS_FORMAT
from training.compare.store import CellStore, refuse_other
from training.compare.workers import Block, play_all
from training.files import write_atomically
from training.locks import only_user

FORMAT, BASELINE_FORMAT = 3, 2  # of the facts of entries; those of another one are opened anew, baselines take long
METRIC = "mean over seeds of max over time of clip(coverage / 0.95, 0, 1)"
SIMULATOR = ("gym-pusht", "pymunk", "shapely")
ENGINES = ("onnxruntime", "torch", "numpy")
SPECIFICATION = {"observations", "action", "diffusion"}  # of what runs, beside its weights: units, chunk and sampler
SCORE_DIGITS = 5
Check = Callable[[dict[str, dict[str, Any]]], None]


class Session:
    """One comparison in its folder: ``entries/NAME.json``, ``cells/TASK/NAME.jsonl``, ``results.json``."""

    def __init__(self, config: CompareConfig, folder: Path, data: str | None = None) -> None:
        """Take the comparison, where it is kept, and the path of the demonstrations."""
        self.config, self.folder = config, folder
        self.opener = Opener(config, data)
        self._last: Contender | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder.

        Raises:
            CompareError: one is in it, or the folder cannot be made.
        """
        with only_user(self.folder, "comparison", CompareError):
            yield

    def run(self, workers: int, check: Check | None = None) -> dict[str, Any] | None:
        """Play what is missing; returns the results, None where it was interrupted before the end.

        Args:
            workers: processes.
            check: called before anything is played with the facts of the entries that are known by then (of baselines
                those that were opened before); may refuse.

        Raises:
            UserError: an entry cannot be opened or does not belong to the comparison, the demonstrations are needed and
                are not those of the comparison, the folder holds other results, or the disk refuses; what was played
                is kept.
        """
        config = self.config
        for entry in config.entries:
            self.opener.check(entry)
        facts = {entry.name: self._known(entry) for entry in config.entries}
        for entry in config.entries:
            if facts[entry.name] is None and entry.kind != "baseline":  # cheap to open: find out now what is wrong
                facts[entry.name] = self._facts(entry)
        if check is not None:
            check({name: known for name, known in facts.items() if known is not None})
        blocks, total = [], 0
        for entry in config.entries:
            for task in config.tasks:
                if entry not in config.players(task):
                    continue
                known = facts[entry.name]
                store = None if known is None else self._store(task, entry, known)
                total += len(self._seeds(task))
                blocks += list(self._missing(task, entry, store))
        to_open = {block.entry for block in blocks} | {name for name, known in facts.items() if known is None}
        if any(config.entry(name).baseline is not None for name in to_open):
            _ = self.opener.demonstrations  # refused now, not at the first baseline after hours
        missing = sum(len(block.seeds) for block in blocks)
        engines = versions(ENGINES)
        with tqdm(total=total, initial=total - missing, desc="compare", unit="episode", mininterval=1.0) as bar:
            for played in play_all(blocks, self._runnable(facts), workers):
                block = played.block
                entry, task = config.entry(block.entry), config.task(block.task)
                known = facts[entry.name]
                assert known is not None  # opened before its first block
                store = self._store(task, entry, known)
                store.add(block.seeds, played.scores.scores, played.scores.steps, played.seconds, engines)
                bar.update(len(block.seeds))
                bar.set_postfix(entry=block.entry, task=block.task, refresh=False)
                missing -= len(block.seeds)
        if missing:
            return None
        for entry in config.entries:  # one that no task plays
            facts[entry.name] = facts[entry.name] or self._facts(entry)
        complete = {name: known for name, known in facts.items() if known is not None}
        document = self._document(complete)
        write_atomically(self.folder / "results.json", dump(document))
        return document

    # Entries -------------------------------------------------------------------------------------------------------

    def _runnable(self, facts: dict[str, dict[str, Any] | None]) -> Callable[[str], Runnable]:
        def opened(name: str) -> Runnable:
            entry = self.config.entry(name)
            if self._last is None or self._last.entry.name != name:
                self._last = None  # before the next is opened: one at a time in memory
                self._last = self.opener.open(entry)
            known = facts[name]
            if known is None:
                facts[name] = self._keep(self._last)
                for task in self.config.tasks:  # refused before the first block is played, not after
                    if entry in self.config.players(task):
                        self._store(task, entry, facts[name] or {})
            else:
                refuse_other(f"{self._facts_file(entry)}", known["identity"], plain(self._last.identity()))
            return self._last.runnable

        return opened

    def _facts_file(self, entry: Entry) -> Path:
        return self.folder / "entries" / f"{entry.name}.json"

    def _asked(self, entry: Entry) -> dict[str, Any]:
        """What the facts of an entry follow from, as far as files tell."""
        config = self.config
        named = {field: getattr(entry, field) for field in ("bundle", "checkpoint", "supernet", "trained")}
        named["policy"] = config.policy if entry.baseline else None
        files = {field: file_sha256(found(text)) for field, text in named.items() if text is not None}
        if config.latency.table is not None:
            files["table"] = file_sha256(found(config.latency.table))
        document = plain(entry.model_dump(mode="json", exclude={"note", "stated", "method", "paper", "made_by"}))
        return {
            "format": FORMAT if entry.baseline is None else BASELINE_FORMAT,
            "entry": document,
            "files": files,
            "data": config.data_sha256,
            "steps": config.steps,
            "latency": plain(config.latency.model_dump(mode="json")),
        }

    def _known(self, entry: Entry) -> dict[str, Any] | None:
        """Facts of an entry that was opened before, if its files are still the same."""
        try:
            document = json.loads(self._facts_file(entry).read_bytes())
            known: dict[str, Any] = document["facts"]
            return self._labelled(entry, known) if document["asked"] == self._asked(entry) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _facts(self, entry: Entry) -> dict[str, Any]:
        self._last = self.opener.open(entry)
        return self._keep(self._last)

    def _keep(self, contender: Contender) -> dict[str, Any]:
        entry, spec = contender.entry, contender.runnable.spec
        steps = self.config.steps or spec.diffusion.steps
        if steps > spec.diffusion.most_steps:
            raise CompareError(f"steps {steps}: entry {entry.name} takes 1 to {spec.diffusion.most_steps}")
        latency = None
        if self.config.latency.table is not None:
            simulated = contender.executed == SIMULATED
            latency = table_latency(self.config, self.opener.shape, contender.subnet, steps, simulated)
        facts = plain(
            {
                "name": entry.name,
                "identity": contender.identity(),
                "executed": contender.executed,
                "device_executes": contender.device,
                "sampler": spec.diffusion.sampler,
                "denoising_steps": steps,
                "specification": spec.model_dump(mode="json", include=SPECIFICATION),
                "size": contender.size,
                "cost": contender.cost.model_dump(mode="json"),
                "latency": latency,
                "report": contender.report,
            }
        )
        write_atomically(self._facts_file(entry), dump({"asked": self._asked(entry), "facts": facts}))
        return self._labelled(entry, facts)

    def _labelled(self, entry: Entry, facts: dict[str, Any]) -> dict[str, Any]:
        """Facts with what the comparison's file says of the entry now: words may change without playing anew."""
        labels = {"method": entry.method, "bits": entry.bits, "note": entry.note, "stated": list(entry.stated)}
        return facts | labels

    # Cells ---------------------------------------------------------------------------------------------------------

    def protocol(self, task: Task) -> dict[str, Any]:
        """What must be equal for all that play a task."""
        return plain(
            {
                "metric": METRIC,
                "task": task.name,
                "stress": task.stress.model_dump(mode="json"),
                "steps": self.config.steps,
                "simulator": {k: v for k, v in versions(SIMULATOR).items() if k != "python"},
            }
        )

    def _store(self, task: Task, entry: Entry, facts: dict[str, Any]) -> CellStore:
        key = {name: facts[name] for name in ("identity", "specification")} | {"protocol": self.protocol(task)}
        return CellStore(self.folder / "cells" / task.name / f"{entry.name}.jsonl", key)

    def _seeds(self, task: Task) -> list[int]:
        return [seed for name in task.seeds for seed in self.config.seeds[name].seeds]

    def _missing(self, task: Task, entry: Entry, store: CellStore | None) -> Iterator[Block]:
        for name in task.seeds:
            open_seeds = [s for s in self.config.seeds[name].seeds if store is None or s not in store]
            for start in range(0, len(open_seeds), self.config.block):
                seeds = tuple(open_seeds[start : start + self.config.block])
                yield Block(entry.name, task.name, task.stress, seeds, self.config.steps)

    # Results -------------------------------------------------------------------------------------------------------

    def _document(self, facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        config = self.config
        cells = []
        for task in config.tasks:
            for entry in config.players(task):
                store = self._store(task, entry, facts[entry.name])
                cells += [
                    {
                        "entry": entry.name,
                        "task": task.name,
                        "seeds": name,
                        "first_seed": config.seeds[name].first,
                        "protocol": self.protocol(task),
                        "weights": facts[entry.name]["identity"]["weights"],
                        "artifact": facts[entry.name]["identity"]["artifact"],
                        "scores": [round(store[seed][0], SCORE_DIGITS) for seed in config.seeds[name].seeds],
                        "mean_steps": _mean([store[seed][1] for seed in config.seeds[name].seeds]),
                        "engines": store.engines(config.seeds[name].seeds),
                    }
                    for name in task.seeds
                ]
        if config.latency.measured_rounds is not None:
            self._measure(facts, config.latency.measured_rounds)
        return plain(
            {
                "format": RESULTS_FORMAT,
                "name": config.name,
                "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "reference": config.reference,
                "margin": config.margin,
                "data": config.data_sha256,
                "policy": list(config.policy_sha256),
                "versions": versions(ENGINES),
                "entries": [
                    {field: value for field, value in facts[entry.name].items() if field != "specification"}
                    for entry in config.entries
                ],
                "cells": cells,
            }
        )

    def _measure(self, facts: dict[str, dict[str, Any]], rounds: int) -> None:
        """Measured latencies; those of the same artifacts are taken from the folder."""
        file = self.folder / "latency.json"
        exported = [entry for entry in self.config.entries if facts[entry.name]["executed"] != SIMULATED]
        artifacts = {e.name: [facts[e.name]["identity"]["artifact"], facts[e.name]["specification"]] for e in exported}
        key = plain({"as": ENGINE, "rounds": rounds, "steps": self.config.steps, "artifacts": artifacts})
        try:
            document = json.loads(file.read_bytes())
            rows = document["rows"] if document["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            rows = None
        if rows is None:
            runnables = {entry.name: self.opener.open(entry).runnable for entry in exported}
            rows = plain(measured_latency(runnables, rounds, self.config.steps))
            write_atomically(file, dump({"key": key, "rows": rows}))
        for name, known in facts.items():
            known["latency"] = rows.get(name, NOT_MEASURED)


def file_sha256(path: Path) -> str:
    """SHA-256 of what a source is: a checkpoint file, or a bundle's description, which holds those of its files.

    Raises:
        CompareError: there is no such file.
    """
    from dcqfa_ros.paths import find_bundle

    if path.is_dir() and (path / CHECKPOINT).is_file():
        path = path / CHECKPOINT
    elif not path.is_file():
        path = find_bundle(str(path)) / BUNDLE_YAML
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
            return digest.hexdigest()
    except OSError as error:
        raise CompareError(f"{path}: cannot be read ({error.strerror})") from error


def plain(document: Any) -> Any:
    """A document as it comes back from JSON."""
    return json.loads(json.dumps(document))


def dump(document: Any) -> bytes:
    """A document as a file, lists of numbers on one line each."""
    text = json.dumps(document, indent=1)
    return (re.sub(r"\[\s+(-?[\d.e+-]+(?:,\s+-?[\d.e+-]+)*)\s+\]", _one_line, text) + "\n").encode()


def _one_line(match: Any) -> str:
    return "[" + ", ".join(part.strip() for part in match[1].split(",")) + "]"


def _mean(values: list[int]) -> float:
    return round(sum(values) / len(values), 2)


def default_workers() -> int:
    """Processes: one per core that this one may use."""
    return len(os.sched_getaffinity(0))
