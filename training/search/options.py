"""Options that the commands of a search share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from training.commands import ArgumentError, check_least
from training.shipped import DEFAULT_RUN, default_run

if TYPE_CHECKING:
    from training.search.executors import Executor

FIRST_SEED = 300_000  # neither the published seeds nor those of the tables: choosing must not spoil what is reported
LAST_SEED = 2**32 - 1


def add_search_options(parser: argparse.ArgumentParser, population: int, generations: int, seeds: int) -> None:
    """Add the run, its data, the size of the search and what plays, with these defaults."""
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        help=f"run folder or checkpoint (default: {DEFAULT_RUN}, or else the shipped supernet)",
    )
    parser.add_argument("--data", help="path of the demonstrations (default: where the run read them)")
    parser.add_argument("--out", type=Path, help="folder of distances and results (default: searches/NAME)")
    for name, default, text in (
        ("--population", population, "of a generation"),
        ("--generations", generations, "of the search"),
        ("--samples", 256, "held-out windows of a distance"),
        ("--seeds", seeds, "episodes of each network that plays"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that measure (default: one per core)")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="measure on a Ray cluster: auto, local, host:port or ray://host:port (requirements/ray.txt)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def check_search_options(args: argparse.Namespace, **least: int) -> None:
    """Refuse numbers out of range: those of every search, and ``least`` values of others; fill the run in.

    Raises:
        ArgumentError: naming the option.
    """
    check_least(args, population=4, generations=1, samples=1, first_seed=0, workers=1, seed=0, **least)
    if args.seed > LAST_SEED:
        raise ArgumentError(f"--seed: expected at most {LAST_SEED}, got {args.seed}")
    if args.run is None:
        args.run = default_run()


def chosen_executor(args: argparse.Namespace) -> Executor:
    """What measures distances: this machine, or the Ray cluster at ``--ray``.

    Raises:
        UserError: ray is not installed, or the address is none.
    """
    from training.search.executors import LocalExecutor
    from training.search.ray_executor import RayExecutor

    return LocalExecutor(args.workers) if args.ray is None else RayExecutor(args.ray, args.workers)
