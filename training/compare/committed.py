"""Results against what they are to stand beside: the comparison that a YAML describes, and committed results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from training.compare.config import CompareConfig, CompareError, Task
from training.compare.results import Cell, EntryResult, Results, unlike_cells
from training.compare.store import differing, shown

MADE_OF = ("kind", "bits", "variant", "subnet", "baseline", "baseline_bits", "options", "seed")  # of identity and entry
SHOWN = 4  # differences in an error


def unlike_described(
    results: Results, config: CompareConfig, more_seeds: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Fields in which results are not what a comparison describes, with both values.

    Entries, tasks and seed sets that one of the two does not have are passed over.

    Args:
        results: that were played.
        config: the comparison.
        more_seeds: the comparison may have further seeds before and after those that were played.
    """
    for field, there, here in (
        ("data", (results.data,), (config.data_sha256,)),
        ("policy", results.policy, config.policy_sha256),
    ):
        if not set(there) & set(here):
            yield f"{field}_sha256", " or ".join(there), " or ".join(here)
    for field in ("name", "reference", "margin"):
        if getattr(results, field) != getattr(config, field):
            yield field, getattr(results, field), getattr(config, field)
    entries = {entry.name: entry for entry in config.entries}
    for entry in results.entries:
        if entry.name in entries:
            played, asked = ({f: getattr(o, f) for f in MADE_OF} for o in (entry.identity, entries[entry.name]))
            for name, there, here in differing(played, asked):
                yield f"entry {entry.name}: {name}", there, here
    tasks = {task.name: task for task in config.tasks}
    for cell in results.cells:
        task, seeds = tasks.get(cell.task), config.seeds.get(cell.seeds)
        if cell.entry not in entries or task is None or seeds is None:
            continue
        what = f"cell {', '.join(cell.key)}"
        if not (more_seeds and _holds(seeds.seeds, cell.start_seeds)):
            played_seeds = {"first_seed": cell.first_seed, "seeds": len(cell.scores)}
            fields = differing(played_seeds, {"first_seed": seeds.first, "seeds": seeds.count})
            yield from ((f"{what}: {field}", there, here) for field, there, here in fields)
        stress = cell.protocol.stress.model_dump(mode="json"), task.stress.model_dump(mode="json")
        yield from ((f"{what}: {field}", there, here) for field, there, here in differing(*stress, "stress"))
        if cell.protocol.steps != config.steps:
            yield f"{what}: steps", cell.protocol.steps, config.steps


def check_belongs(results: Results, config: CompareConfig, where: str) -> None:
    """Refuse results that are not of the comparison that ``config`` describes.

    Raises:
        CompareError: other data, another full-precision policy, name, reference or margin, or an entry or a cell that
            is not what the comparison says of it; the field is named.
    """
    _refuse(
        unlike_described(results, config),
        f"{where}: not of comparison {config.name}",
        "of the comparison",
        "give the --config that these results are of, or play it anew",
    )


def check_replaceable(
    committed: Results,
    where: str,
    config: CompareConfig,
    plays: CompareConfig,
    protocol: Callable[[Task], dict[str, Any]],
    merged: Sequence[Results],
) -> None:
    """Refuse, before anything is played, a comparison whose results could not replace committed ones.

    Args:
        committed: would be replaced.
        where: their file.
        config: the comparison.
        plays: the part of it that is played.
        protocol: of a task, as it would be played.
        merged: further results that are joined with what is played.

    Raises:
        CompareError: a cell or some of its seeds would be lost, or what is compared is another; the field is named.
    """
    advice = f"remove {where} first if it is to be given up"
    _refuse(unlike_described(committed, config, more_seeds=True), f"--save-results: {where}", "now", advice)
    planned = {
        (entry.name, task.name, seeds): protocol(task)
        for task in plays.tasks
        for entry in plays.players(task)
        for seeds in task.seeds
    }
    for cell in committed.cells:
        if cell.key in planned:
            fields = differing(cell.protocol.model_dump(mode="json"), planned[cell.key], "protocol")
            _refuse(fields, f"--save-results: {where}: cell {', '.join(cell.key)}", "now", advice)
        elif all(other.cell(*cell.key) is None for other in merged):
            raise _lost(cell, where)


def check_same_networks(committed: Results, where: str, facts: dict[str, dict[str, Any]]) -> None:
    """Refuse, before anything is played, entries that are other networks than those of results to be replaced.

    Args:
        committed: would be replaced.
        where: their file.
        facts: of the entries, as far as they are known.

    Raises:
        CompareError: naming the entry and the field.
    """
    for entry in committed.entries:
        if entry.name in facts:
            _refuse(
                differing(_network(entry), _network(facts[entry.name])),
                f"--save-results: {where}: entry {entry.name}",
                "now",
                f"remove {where} first if it is to be given up",
            )


def check_replaces(results: Results, committed: Results, where: str) -> None:
    """Refuse to replace committed results by some that hold less of them, or that are of something else.

    Raises:
        CompareError: a cell or some of its seeds would be lost, or what is compared is another; the field is named.
    """
    advice = f"what was played is kept; remove {where} first if it is to be given up"
    for field in ("name", "data", "reference", "margin"):
        one, other = getattr(committed, field), getattr(results, field)
        _refuse(differing(one, other, field), f"--save-results: {where}", "now", advice)
    check_same_networks(committed, where, {e.name: e.model_dump(mode="json") for e in results.entries})
    for cell in committed.cells:
        new = results.cell(*cell.key)
        if new is None:
            raise _lost(cell, where)
        fields = [field for field in unlike_cells(cell, new) if field[0] not in ("first_seed", "seeds")]
        if not _holds(new.start_seeds, cell.start_seeds):
            fields.append(("seeds", _seeds(cell.start_seeds), _seeds(new.start_seeds)))
        _refuse(iter(fields), f"--save-results: {where}: cell {', '.join(cell.key)}", "now", advice)


def _holds(all_of: range, some: range) -> bool:
    """Whether consecutive seeds hold others."""
    return all_of.start <= some.start and some.stop <= all_of.stop


def _seeds(seeds: range) -> str:
    return f"{seeds.start} to {seeds.stop - 1}"


def _lost(cell: Cell, where: str) -> CompareError:
    return CompareError(
        f"--save-results: {where} holds {cell.entry} on {cell.task}, {cell.seeds}, which is not played; keep it with "
        f"--merge {where}, or remove that file first"
    )


def _refuse(fields: Iterator[tuple[str, Any, Any]], what: str, now: str, advice: str) -> None:
    """Refuse where there is a field that differs.

    Raises:
        CompareError: naming the first of them with both values.
    """
    found = list(fields)
    if found:
        text = "; ".join(f"{field} is {shown(there)}, {shown(here)} {now}" for field, there, here in found[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise CompareError(f"{what}: {text}{more}; {advice}")


def _network(facts: EntryResult | dict[str, Any]) -> dict[str, Any]:
    """What makes an entry the network that it is and how it is sampled; files differ in their last bits by machine."""
    known = facts.model_dump(mode="json") if isinstance(facts, EntryResult) else facts
    identity = {field: value for field, value in known["identity"].items() if field != "artifact"}
    return {"identity": identity, "sampler": known["sampler"], "denoising_steps": known["denoising_steps"]}
