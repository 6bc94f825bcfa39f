"""``dcqfa compare``: one table of methods, bits and tasks on equal seeds."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands import EXIT_INTERRUPTED, ArgumentError, check_least

if TYPE_CHECKING:
    from training.compare.config import CompareConfig
    from training.compare.results import Results

DEFAULT_CONFIG = "compare/pusht.yaml"
REPORT = ("report.json", "report.md", "report.html")


def compare(subparsers: Any) -> None:
    """Register ``dcqfa compare``."""
    parser = subparsers.add_parser(
        "compare",
        help="one table of methods, bits and tasks on equal seeds",
        description="Play every entry of a comparison on every task and the same seeds, and print one table: scores, "
        "paired differences with 95 %% intervals, sizes by both conventions, latency, training cost, the paper's "
        "figures and which of its claims are found. What can be exported plays as the graphs that a robot runs. Scores "
        "are kept block by block: Ctrl-C ends after the blocks being played, and the same command goes on. Results of "
        "other data, weights, seeds, protocol or simulator are never mixed: the field that differs is named. Writes "
        "results.json and report.json, .md and .html to --out.",
        epilog="example: dcqfa compare --config config/compare/pusht_quick.yaml --data pusht_cchi_v7_replay.zarr",
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="YAML", help="comparison (default: %(default)s)")
    parser.add_argument("--data", help="path of the demonstrations, which baselines calibrate on")
    parser.add_argument("--out", type=Path, help="folder of scores and reports (default: compare/NAME)")
    parser.add_argument(
        "--only", action="append", metavar="ENTRY", help="play this entry and the reference alone (may be repeated)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that play (default: one per core)")
    parser.add_argument(
        "--from-results",
        nargs="?",
        const="",
        metavar="FILE",
        help="play nothing: print the committed results (or those of FILE)",
    )
    parser.add_argument(
        "--merge", action="append", default=[], type=Path, metavar="FILE", help="results of another machine to join"
    )
    parser.add_argument("--save-results", action="store_true", help="write the results to the file that the YAML names")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_compare)


def _compare(args: argparse.Namespace) -> int:
    check_least(args, workers=1)
    if args.save_results and args.from_results is not None and not args.merge:
        raise ArgumentError("--save-results: nothing new to save with --from-results; leave one of them out")
    if args.only is not None and args.from_results is not None:
        raise ArgumentError("--only: says what is played, and --from-results plays nothing; leave one of them out")
    from dcqfa_ros.paths import find_config
    from training.compare.committed import check_belongs, check_replaces
    from training.compare.config import found, load_compare
    from training.compare.page import render
    from training.compare.paper import load_paper
    from training.compare.report import amortised_costs, markdown, not_played, report
    from training.compare.results import joined, read_results
    from training.compare.session import dump
    from training.compare.table import reproduced
    from training.files import write_atomically

    config = load_compare(find_config(args.config))
    asked = config if args.only is None else config.only(args.only)
    paper = load_paper(found(config.paper))
    costs = amortised_costs(config)
    file = found(config.results)
    if args.save_results and not file.parent.is_dir():
        raise ArgumentError(
            f"--save-results: {file.parent}: no such folder; run it from where {args.config} names it from"
        )
    printed = args.from_results is not None and not args.save_results
    committed = None if printed else _committed(file, args.save_results)
    merged = [read_results(path) for path in args.merge]
    for path, of in zip(args.merge, merged, strict=True):
        check_belongs(of, config, str(path))
    out = args.out or Path("compare") / config.name
    if args.from_results is not None:
        source = Path(args.from_results) if args.from_results else file
        results = read_results(source)
        check_belongs(results, config, str(source))
    else:
        plan = _Plan(config, asked, committed, file, merged, out)
        played, source = _played(args, plan), out / "results.json"
        if played is None:
            print("stopped; run the same command again to continue from here", file=sys.stderr)
            return EXIT_INTERRUPTED
        results = played
    results = joined([results, *merged], [str(source), *map(str, args.merge)])
    document = report(results, config, paper, costs, not_played(results, asked))
    if args.from_results is None and committed is not None:
        document["reproduces"] = reproduced(results, committed)
    if args.from_results is None or args.out is not None:
        texts = (json.dumps(document, indent=1) + "\n", markdown(document), render(document))
        for name, text in zip(REPORT, texts, strict=True):
            write_atomically(out / name, text.encode())
        print(f"reports: {out / REPORT[1]} and {out / REPORT[2]}", file=sys.stderr)
    if args.save_results:
        if committed is not None:
            check_replaces(results, committed, str(file))
        write_atomically(file, dump(results.model_dump(mode="json", exclude_none=False)))
        print(f"results kept in {file}", file=sys.stderr)
    print(json.dumps(document) if args.json else markdown(document) if args.markdown else _plain(document))
    return 0


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be played: the whole comparison, the part asked for, and where it is kept.

    Attributes:
        config: the comparison.
        asked: its entries that were asked for.
        committed: its committed results, of ``file``; None where there are none.
        file: the file of committed results.
        merged: results that are joined with what is played.
        out: folder of scores.
    """

    config: CompareConfig
    asked: CompareConfig
    committed: Results | None
    file: Path
    merged: list[Results]
    out: Path


def _committed(file: Path, needed: bool) -> Results | None:
    """The committed results; None where there are none, or, unless they are needed, where they cannot be used."""
    from training.compare.config import CompareError
    from training.compare.results import read_results

    if not file.exists():
        return None
    try:
        return read_results(file)
    except CompareError as error:
        if needed:
            raise
        print(f"{error}; nothing is compared with it", file=sys.stderr)
        return None


def _played(args: argparse.Namespace, plan: _Plan) -> Results | None:
    """Play what is missing; None where it was interrupted."""
    from training.compare.committed import check_replaceable, check_same_networks
    from training.compare.results import parse_results
    from training.compare.session import Session, default_workers

    plays, left_out = plan.asked.playable(args.only or ())
    for entry in left_out:
        print(entry, file=sys.stderr)
    session, committed, file = Session(plays, plan.out, args.data), plan.committed, str(plan.file)
    check = None
    if args.save_results and committed is not None:
        check_replaceable(committed, file, plan.config, plays, session.protocol, plan.merged)
        check = partial(check_same_networks, committed, file)
    with session.locked():
        document = session.run(args.workers or default_workers(), check)
    return None if document is None else parse_results(document, str(plan.out / "results.json"))


def _plain(document: dict[str, Any]) -> str:
    """The tables as text."""
    from training.compare.config import NotPlayed
    from training.compare.report import cost_text, groups, latency_text, shows_text, signed, with_interval

    lines = []
    for heading, of in groups(document):
        lines.append(f"{heading}; difference to {document['reference']}")
        for row in of:
            against = row["difference"]
            shows = "" if against is None else shows_text(against)
            difference = "reference" if row["entry"] == document["reference"] else signed(against)
            lines.append(
                f"  {row['entry']:<22} {row['bits']:<6} {with_interval(row['mean'], row['ci95']):<17} {difference:<27} "
                f"{shows:<22} {row['size']['paper_mib']:6.2f} MiB  {latency_text(row['latency']):<22} "
                f"{cost_text(row['cost'])}"
            )
    for pair in document["pairs"]:
        where = f"{pair['task']}, {pair['seeds']}"
        lines.append(f"{pair['first']} - {pair['second']} ({where}): {signed(pair)}, {shows_text(pair)}")
    for claim in document["claims"]:
        lines.append(f"claim {claim['verdict']}: {claim['text']} {signed(claim['difference'])}")
    lines += [str(NotPlayed(**entry)) for entry in document["not_played"]]
    costs = document["amortised"]
    if costs is not None:
        needed = [f"{costs[unit]['break_even'] or 'never'} ({unit})" for unit in ("steps", "hours")]
        lines.append(f"one supernet costs no more than one training per device from: {', '.join(needed)} devices")
    again = document.get("reproduces") or []
    if again:
        compared = [row for row in again if row["differs"] is None]
        within = sum(row["within"] for row in compared)
        lines.append(f"{within} of {len(compared)} means lie within the committed intervals")
        others = dict.fromkeys(f"{row['entry']} ({row['differs']})" for row in again if row["differs"] is not None)
        if others:
            lines.append(f"not compared with the committed table, of which they differ: {', '.join(others)}")
    return "\n".join(lines)
