"""A comparison as one JSON document for programs, and as Markdown for documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from training.amortised import amortised, load_amortised
from training.compare.config import CompareConfig, NotPlayed, found, missing_source
from training.compare.paper import PaperFigures
from training.compare.results import Results
from training.compare.table import judged, pairs, rows

NOTHING = "\N{EN DASH}"


def amortised_costs(config: CompareConfig) -> dict[str, Any] | None:
    """Costs of one supernet against one training per device, None where the comparison names no file of them.

    Raises:
        UserError: the file cannot be read.
    """
    return None if config.amortised is None else amortised(load_amortised(found(config.amortised)))


def report(
    results: Results,
    config: CompareConfig,
    paper: PaperFigures,
    costs: dict[str, Any] | None,
    not_played: Sequence[NotPlayed] = (),
) -> dict[str, Any]:
    """Everything that is told of a comparison, JSON-ready.

    Args:
        results: that were played.
        config: the comparison.
        paper: the paper's figures.
        costs: see :func:`amortised_costs`.
        not_played: entries of which there are no results.
    """
    return {
        "name": results.name,
        "written": results.written,
        "reference": results.reference,
        "margin": results.margin,
        "verdict_seeds": config.verdict_seeds,
        "data_sha256": results.data,
        "policy_sha256": list(results.policy),
        "versions": results.versions,
        "rows": rows(results, config, paper),
        "pairs": [pair.document() for pair in pairs(results, config)],
        "claims": [claim.document() for claim in judged(results, config)],
        "amortised": costs,
        "not_played": [entry.document() for entry in not_played],
        "notes": [*notes(results, config, paper), *(f"{entry}." for entry in not_played)],
    }


def not_played(results: Results, config: CompareConfig) -> list[NotPlayed]:
    """The entries of a comparison of which there is no cell."""
    there = {cell.entry for cell in results.cells}
    made = []
    for entry in config.entries:
        if entry.name not in there:
            missing = missing_source(entry)
            made.append(NotPlayed(entry.name, None if missing is None else missing[1], entry.made_by))
    return made


def notes(results: Results, config: CompareConfig, paper: PaperFigures) -> list[str]:
    """What a reader has to know beside the figures."""
    paired = "differences are paired by start seed, with equal noise per seed and chunk"
    lines = [
        f"Intervals are 95 % (Student's t) and not adjusted for the number of comparisons; {paired}.",
        "Embeddings, memory MLP (time), norms and the action head stay at 8 bits or more in every row.",
    ]
    if config.verdict_seeds > 1:
        lines.append(f"Of fewer than {config.verdict_seeds} seeds it is not said what a difference shows.")
    caveats = dict.fromkeys(
        paper.tasks[task.paper].caveat for task in config.tasks if task.paper is not None and task.paper in paper.tasks
    )
    lines += [f"The paper's figures stand beside ours for orientation: {caveat}." for caveat in caveats if caveat]
    for entry in results.entries:
        if entry.stated:
            what = " and ".join({"data": "demonstrations", "policy": "full-precision policy"}[s] for s in entry.stated)
            lines.append(f"{entry.name}: its files do not record its {what}; stated by the comparison's file.")
        if entry.note:
            lines.append(f"{entry.name}: {entry.note}")
        if entry.device_executes:
            lines.append(f"{entry.name}: on a device it is {entry.device_executes}")
        if entry.latency is not None and entry.latency.note:
            lines.append(f"{entry.name}: latency {entry.latency.note}.")
    executed: dict[str, list[str]] = {}
    for entry in results.entries:
        executed.setdefault(entry.executed, []).append(entry.name)
    lines += [f"Evaluated as {how}: {', '.join(names)}." for how, names in executed.items()]
    return lines


def with_interval(mean: float, half: float | None) -> str:
    """``0.907 +- 0.019``."""
    return f"{mean:.3f}" if half is None else f"{mean:.3f} +- {half:.3f}"


def signed(row: dict[str, Any] | None) -> str:
    """``+0.014 (-0.004 to +0.033)`` of a difference."""
    if row is None:
        return NOTHING
    if row["low"] is None:
        return f"{row['mean']:+.3f}"
    return f"{row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def shows_text(row: dict[str, Any] | None) -> str:
    """What a difference shows, in words; of too few seeds, or of the reference, nothing."""
    return NOTHING if row is None or row["shows"] is None else str(row["shows"])


def latency_text(row: dict[str, Any] | None) -> str:
    """``14.2 ms, table``."""
    return NOTHING if row is None or row["ms"] is None else f"{row['ms']:.1f} ms, {row['kind']}"


def within_text(row: dict[str, Any]) -> str:
    """``yes``, ``no``, or the field that makes it another thing than what was committed."""
    if row["differs"] is not None:
        return f"not compared: {row['differs']} differs"
    return "yes" if row["within"] else "no"


def cost_text(row: dict[str, Any]) -> str:
    """Steps, hours and calls of the teacher, as far as they are known."""
    parts = []
    if row["steps"] is not None:
        parts.append(f"{row['steps']:,} steps")
    if row["hours"] is not None:
        parts.append(f"{row['hours']:.2f} h")
    if row["teacher_calls"]:
        parts.append(f"{row['teacher_calls'] / 1e6:.2f} M teacher calls")
    if row["policy_calls"]:
        parts.append(f"{row['policy_calls']:,} policy calls")
    return ", ".join(parts) or NOTHING


def groups(document: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Headings and rows of the tables: one per task and seed set."""
    keys = dict.fromkeys((row["task"], row["seeds"]) for row in document["rows"])
    for task, seeds in keys:
        of = [row for row in document["rows"] if (row["task"], row["seeds"]) == (task, seeds)]
        first, count = of[0]["first_seed"], of[0]["n"]
        stress = f": {of[0]['stress']}" if of[0]["stress"] else ""
        yield f"{task}{stress}, seeds {first} to {first + count - 1} ({seeds})", of


def devices(document: dict[str, Any]) -> str:
    """The devices that latencies are of."""
    found_devices = dict.fromkeys(
        row["latency"]["device"] for row in document["rows"] if row["latency"] and row["latency"]["device"]
    )
    return ", ".join(found_devices) or NOTHING


def markdown(document: dict[str, Any]) -> str:
    """The whole comparison as Markdown."""
    head = (
        f"Written {document['written']}. Reference: {document['reference']}; margin of non-inferiority "
        f"{document['margin']:g}. Latency of one chunk on {devices(document)}. MiB by the paper's convention: "
        "parameters x bits / 8, without scales."
    )
    lines = [f"# Comparison {document['name']}", "", head, ""]
    for heading, of in groups(document):
        lines += [f"## {heading}", ""]
        lines += _table(
            ("method", "bits", "score", "difference, 95 %", "margin", "MiB, paper's", "MiB, artifact", "latency",
             "training", "paper"),
            [_cells(row, document) for row in of],
        )  # fmt: skip
    if document["pairs"]:
        lines += ["## Pairs", ""]
        lines += _table(
            ("first", "second", "task", "seeds", "difference, 95 %", "shows"),
            [(p["first"], p["second"], p["task"], p["seeds"], signed(p), shows_text(p)) for p in document["pairs"]],
        )
    lines += _claims(document["claims"])
    if document["amortised"] is not None:
        lines += _amortised(document["amortised"])
    if document.get("reproduces"):
        lines += ["## Against the committed table", ""]
        lines += _table(
            ("entry", "task", "seeds", "now", "committed", "within its interval"),
            [
                (r["entry"], r["task"], r["seeds"], f"{r['mean']:.3f}",
                 with_interval(r["committed"], r["committed_ci95"]), within_text(r))
                for r in document["reproduces"]
            ],
        )  # fmt: skip
    lines += ["## Notes", "", *(f"- {note}" for note in document["notes"]), ""]
    return "\n".join(lines)


def _cells(row: dict[str, Any], document: dict[str, Any]) -> tuple[str, ...]:
    size, against = row["size"], row["difference"]
    return (
        row["method"],
        row["bits"].upper(),
        with_interval(row["mean"], row["ci95"]),
        "reference" if row["entry"] == document["reference"] else signed(against),
        shows_text(against),
        f"{size['paper_mib']:.2f}",
        f"{size['artifact_mib']:.2f}",
        latency_text(row["latency"]),
        cost_text(row["cost"]),
        NOTHING if row["paper"] is None else f"{row['paper']:.3f}",
    )


def _claims(claims: Sequence[dict[str, Any]]) -> list[str]:
    if not claims:
        return []
    lines = ["## What the paper claims", ""]
    titles = (
        ("found", "Found"),
        ("not found", "Claimed and not found"),
        ("not measured", "Not measured"),
    )
    for verdict, title in titles:
        of = [claim for claim in claims if claim["verdict"] == verdict]
        if not of:
            continue
        lines += [f"### {title}", ""]
        lines += _table(
            ("claim", "paper", "ours: difference, 95 %", "of", "source"),
            [
                (c["text"] + (" (the opposite is found)" if c["opposite_found"] else ""),
                 NOTHING if c["paper_difference"] is None else f"{c['paper_difference']:+.3f}",
                 signed(c["difference"]), f"{c['first']} - {c['second']}, {c['task']}, {c['seeds']}", c["source"])
                for c in of
            ],
        )  # fmt: skip
    return lines


def _amortised(costs: dict[str, Any]) -> list[str]:
    lines = ["## One supernet against one training per device", "", f"On {costs['machine']}.", ""]
    both = zip(costs["steps"]["rows"], costs["hours"]["rows"], strict=True)
    lines += _table(
        ("devices", "supernet, steps", "fixed bits, steps", "supernet, h", "fixed bits, h"),
        [
            (str(s["devices"]), f"{s['supernet']:,.0f}", f"{s['fixed_bit']:,.0f}", f"{h['supernet']:.2f}",
             f"{h['fixed_bit']:.2f}")
            for s, h in both
        ],
    )  # fmt: skip
    for unit in ("steps", "hours"):
        devices_needed = costs[unit]["break_even"]
        what = f"from {devices_needed} devices on" if devices_needed else "for no number of devices"
        lines.append(f"In {unit} the supernet costs no more {what}.")
    lines.append("")
    for kind, runs in costs["sources"].items():
        lines += [
            f"- {kind.replace('_', ' ')}: {r['name']}, {r['steps']:,} steps, {r['hours']:.3f} h ({r['source']})"
            for r in runs
        ]
    return [*lines, ""]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(cells) for cells in body), ""]
