"""``dcqfa mixed``: bits of each layer searched, against uniform and greedy allocation at equal average bits."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.search.options import add_search_options, check_search_options

if TYPE_CHECKING:
    from training.search.mixed import MixedOutcome
    from training.supernet_checkpoint import TrainedSupernet

RESULT, DISTANCES, SCORES = "mixed.json", "mixed_distance.png", "mixed_score.png"
Scores = dict[str, dict[float, tuple[float, float]]]


def mixed(subparsers: Any) -> None:
    """Register ``dcqfa mixed``."""
    parser = subparsers.add_parser(
        "mixed",
        help="mixed precision: searched bits against uniform and greedy ones",
        description="Search the weight and activation bits of every block of the whole network between 4 and 8 bits on "
        "average, and compare with uniform bits and with greedy allocation by the sensitivity of each block (QVLA, on "
        "blocks) at equal average bits: distance to the teacher, and score in simulated Push-T. Draws both figures. "
        "Ctrl-C loses nothing: the same command goes on.",
        epilog="example: dcqfa mixed runs/pusht_keypoints_supernet --seeds 50",
    )
    add_search_options(parser, population=32, generations=20, seeds=50)
    parser.set_defaults(func=_mixed)


def _mixed(args: argparse.Namespace) -> int:
    check_search_options(args, seeds=0)
    from tqdm import tqdm

    from training.commands import data_section
    from training.config import override
    from training.search.mixed import METHODS, search_bits
    from training.search.nsga import Genetics
    from training.search.options import chosen_executor
    from training.search.plots import check_plotting
    from training.search.session import KnownDistances, check_closed_loop, search_session
    from training.supernet_checkpoint import load_supernet

    started = time.monotonic()
    check_plotting()
    executor = chosen_executor(args)
    supernet = load_supernet(args.run)
    if args.seeds:
        check_closed_loop(supernet, range(args.first_seed, args.first_seed + args.seeds))
    config = override(supernet.meaning.config, data=data_section(args.data))
    out = args.out or Path("searches") / config.name
    with (
        search_session(supernet, config, out, args.samples, executor) as session,
        tqdm(total=args.population * args.generations, desc="distances", mininterval=1.0) as bar,
    ):
        distances = KnownDistances(supernet.space, session.cache, session.measure, bar.update)
        genetics = Genetics(args.population, args.generations, args.seed)
        outcome = search_bits(supernet.space, distances, genetics)
    rows, scores = _scored(args, supernet, outcome, out)
    facts = {
        "run": str(args.run),
        "step": supernet.meaning.step,
        "population": args.population,
        "generations": args.generations,
        "seed": args.seed,
        "samples": args.samples,
        "measured": outcome.measured,
        "new_distances": distances.new,
        "first_seed": args.first_seed,
        "seeds": args.seeds,
        "rows": rows,
        **{m: [asdict(a) for a in getattr(outcome, m)] for m in METHODS},
        "executor": executor.name,
        "workers": session.workers,
        "seconds": round(time.monotonic() - started, 1),
        "result": str(out / RESULT),
    }
    _write(out, facts, outcome, scores)
    if args.json:
        print(json.dumps(facts))
    else:
        _print(facts)
    return 0


def _scored(
    args: argparse.Namespace, supernet: TrainedSupernet, outcome: MixedOutcome, out: Path
) -> tuple[list[dict[str, Any]], Scores]:
    """The comparison at equal bits with scores, and the scores by method and bits."""
    from dcqfa_ros.trials.statistics import mean_interval
    from training.search.mixed import METHODS
    from training.search.session import closed_loop_scores

    rows = outcome.compared()
    if not args.seeds:
        return rows, {}
    names = sorted({row[method]["subnet"] for row in rows for method in METHODS if row[method] is not None})
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    known = dict(zip(names, closed_loop_scores(supernet, names, seeds, out), strict=True))
    scores: Scores = {method: {} for method in METHODS}
    for row in rows:
        for method in METHODS:
            if row[method] is None:
                continue
            interval = mean_interval(known[row[method]["subnet"]])
            row[method] |= {"score": interval.estimate, "ci95": interval.half_width}
            scores[method][row["bits"]] = (interval.estimate, interval.half_width or 0.0)
    return rows, scores


def _write(out: Path, facts: dict[str, Any], outcome: MixedOutcome, scores: Scores) -> None:
    from training.files import write_atomically
    from training.search.plots import plot_mixed, plot_mixed_scores

    title = f"{facts['run']}, step {facts['step']}"
    plot_mixed(outcome, title, out / DISTANCES)
    if scores:
        plot_mixed_scores(scores, f"{title}: {facts['seeds']} episodes each", out / SCORES)
    write_atomically(out / RESULT, (json.dumps(facts, indent=1) + "\n").encode())


def _print(facts: dict[str, Any]) -> None:
    from training.search.mixed import METHODS

    print("at most bits   " + "".join(f"{name:<34}" for name in METHODS))
    for row in facts["rows"]:
        cells = []
        for method in METHODS:
            found = row[method]
            text = "-" if found is None else f"{found['distance']:.5f} at {found['bits']:.2f}"
            if found is not None and "score" in found:
                text += f", score {found['score']:.3f}"
            cells.append(f"{text:<34}")
        print(f"{row['bits']:<15.1f}" + "".join(cells))
    print(f"{facts['measured']} networks, {facts['new_distances']} distances measured anew; {facts['seconds']} s")
    print(facts["result"])
