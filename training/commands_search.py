"""``dcqfa search``: the subnets of a supernet that a device's budgets allow, by distance to the teacher."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands_sampler import DEFAULT_RUN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training.conditions import Condition, Conditions
    from training.config import TrainConfig
    from training.search.cache import DistanceCache
    from training.search.run import Outcome, Plan
    from training.search.session import SearchSession
    from training.subnet import Subnet
    from training.supernet_checkpoint import TrainedSupernet

PROPOSALS = 24  # networks of the configuration sampler in the first generation
FIRST_SEED = 300_000  # neither the published seeds nor those of the tables: choosing must not spoil what is reported
RESULT, PICTURE, PAGE = "result.json", "front.png", "front.html"


def search(subparsers: Any) -> None:
    """Register ``dcqfa search``."""
    parser = subparsers.add_parser(
        "search",
        help="find the subnets of a supernet that fit a device",
        description="Search a trained supernet for one device with NSGA-II: small distance to the full-precision "
        "teacher, latency and memory, within budgets. Nothing is trained. Distances are kept in OUT and serve every "
        "later search of the same supernet; a search of a further device predicts them and measures the most promising "
        "networks only. Ctrl-C loses nothing: the same command goes on. Random search with as many distances runs "
        "beside it.",
        epilog="example: dcqfa search --device cpu_1_thread --latency-ms 3 --json",
    )
    parser.add_argument(
        "run", type=Path, nargs="?", default=DEFAULT_RUN, help="run folder or checkpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        required=True,
        help="look-up table: a file, or the name (or its beginning) of one that the run was trained with",
    )
    parser.add_argument("--latency-ms", type=float, metavar="MS", help="most milliseconds per chunk (default: any)")
    parser.add_argument("--memory-mb", type=float, metavar="MB", help="most megabytes (default: any)")
    parser.add_argument("--data", help="path of the demonstrations (default: where the run read them)")
    parser.add_argument("--out", type=Path, help="folder of distances and results (default: searches/NAME)")
    parser.add_argument(
        "--population", type=int, default=64, metavar="N", help="of a generation (default: %(default)s)"
    )
    parser.add_argument("--generations", type=int, default=50, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="held-out windows (default: %(default)s)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--verify",
        type=int,
        metavar="N",
        help="search on predicted distances and measure N networks (default: 50 where OUT holds the result of another "
        "search of this supernet)",
    )
    group.add_argument("--full", action="store_true", help="measure every network, whatever is known")
    parser.add_argument("--no-random", action="store_true", help="leave the random search out")
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="networks ranked by closed-loop score (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="episodes of each (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that measure (default: one per core)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_search)


def _search(args: argparse.Namespace) -> int:
    _check(args)
    from training.checkpoint_engine import refuse_images
    from training.commands import data_section
    from training.config import override
    from training.lut import load_table
    from training.search.session import search_session
    from training.supernet_checkpoint import load_supernet
    from training.tables_at_hand import device_table

    started = time.monotonic()
    supernet = load_supernet(args.run)
    if args.top:
        refuse_images(supernet.meaning, supernet.path)
    config = override(supernet.meaning.config, data=data_section(args.data))
    file = device_table(args.device, config)
    table = load_table(file)
    conditions = _conditions(supernet, config, file)
    condition = _condition(conditions, file.stem, args.latency_ms, args.memory_mb)
    out = args.out or Path("searches") / config.name
    with search_session(supernet, config, out, args.samples, args.workers) as session:
        plan = _plan(args, out, file.stem, session.cache, condition)
        proposals = _proposals(supernet, conditions, condition, args.seed)
        outcome = _run(session, condition, plan, proposals)
    seconds = time.monotonic() - started
    ranked = _ranked(args, supernet, outcome, out)
    folder = out / file.stem
    facts = {
        "run": str(args.run),
        "step": supernet.meaning.step,
        "device": file.stem,
        "table": str(file),
        "modelled": table.modelled,
        **_budget_facts(condition),
        "population": args.population,
        "generations": args.generations,
        "seed": args.seed,
        "samples": args.samples,
        "verify": plan.verify,
        "distances": session.cache.path.name,
        **outcome.document(supernet.space),
        "ranked": ranked,
        "workers": session.workers,
        "seconds": round(seconds, 1),
        "result": str(folder / RESULT),
    }
    _write(folder, facts, outcome, condition, table.modelled)
    if args.json:
        print(json.dumps(facts))
    else:
        _print(facts)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers out of range.

    Raises:
        ArgumentError: naming the option.
    """
    from training.commands import ArgumentError

    for option, least in (
        ("population", 4),
        ("generations", 1),
        ("samples", 1),
        ("verify", 1),
        ("top", 0),
        ("seeds", 1),
        ("first_seed", 0),
        ("workers", 1),
        ("seed", 0),
    ):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ArgumentError(f"--{option.replace('_', '-')}: expected at least {least}, got {value}")
    for option in ("latency_ms", "memory_mb"):
        value = getattr(args, option)
        if value is not None and not (math.isfinite(value) and value > 0.0):
            raise ArgumentError(f"--{option.replace('_', '-')}: expected a number above 0, got {value}")


def _conditions(supernet: TrainedSupernet, config: TrainConfig, file: Path) -> Conditions:
    """The one device, as the sampler's conditions."""
    from training.conditions import Conditions
    from training.cost import cost_tensors
    from training.lut import load_table

    costs = cost_tensors(load_table(file), supernet.space, config.diffusion.steps)
    return Conditions(supernet.space, {file.stem: costs}, [])


def _condition(conditions: Conditions, device: str, latency_ms: float | None, memory_mb: float | None) -> Condition:
    """Device and budgets; a budget that is not given is what the most expensive network costs.

    Raises:
        BudgetError: no network fits.
    """
    costs = conditions.measured[device]
    most_latency = costs.fixed_latency + float(costs.latency.flatten(1).amax(dim=1).sum())
    most_memory = costs.fixed_memory + float(costs.memory.flatten(1).amax(dim=1).sum())
    return conditions.condition(
        device,
        most_latency if latency_ms is None else latency_ms,
        most_memory if memory_mb is None else memory_mb * 1e6,
    )


def _budget_facts(condition: Condition) -> dict[str, float]:
    return {"latency_budget_ms": condition.latency_ms, "memory_budget_bytes": condition.memory_bytes}


def _plan(args: argparse.Namespace, out: Path, device: str, cache: DistanceCache, condition: Condition) -> Plan:
    """What to measure: everything in the first search of a supernet, little in those of further devices."""
    from training.commands import ArgumentError
    from training.search.nsga import Genetics
    from training.search.run import VERIFIED, Plan

    genetics = Genetics(args.population, args.generations, args.seed)
    verify = args.verify
    earlier = [] if args.full or verify is not None else _earlier(out, cache.path.name)
    if earlier:
        asked = {"device": device, "population": args.population, "generations": args.generations, "seed": args.seed}
        asked |= _budget_facts(condition)
        same = [facts for facts in earlier if all(facts.get(key) == value for key, value in asked.items())]
        verify = same[0].get("verify") if same else VERIFIED  # a command that is repeated repeats its result
    if verify is not None and not len(cache):
        raise ArgumentError(f"--verify: {cache.path} holds no distances to predict from; search a first device without")
    return Plan(genetics, verify, not args.no_random)


def _earlier(out: Path, distances: str) -> list[dict[str, Any]]:
    """Results of complete searches with the same distances; files that cannot be read count as none."""
    found = []
    for path in sorted(out.glob(f"*/{RESULT}")):
        try:
            facts = json.loads(path.read_text())
        except (OSError, ValueError):
            print(f"{path}: cannot be read and is left out", file=sys.stderr)
            continue
        if isinstance(facts, dict) and facts.get("distances") == distances:
            found.append(facts)
    return found


def _proposals(supernet: TrainedSupernet, conditions: Conditions, condition: Condition, seed: int) -> list[Subnet]:
    """Draws of the run's own configuration sampler for this device and these budgets."""
    import torch

    from training.sampler import ConfigurationSampler

    options = supernet.meaning.config.supernet
    assert options is not None
    sampler = ConfigurationSampler(supernet.space, conditions, options.sampler)
    sampler.load_state_dict(supernet.sampler(sampler.state_dict()))
    return sampler.draw_many(condition, torch.Generator().manual_seed(seed), PROPOSALS)


def _run(session: SearchSession, condition: Condition, plan: Plan, proposals: Sequence[Subnet]) -> Outcome:
    """The search, with a bar of the distances that are measured; their number is at most the bar's total."""
    from tqdm import tqdm

    from training.search.run import DeviceSearch
    from training.search.session import KnownDistances

    space = session.supernet.space
    most = plan.verify or plan.genetics.population * plan.genetics.generations
    with tqdm(total=most * (2 if plan.random else 1), desc="distances", mininterval=1.0) as bar:
        distances = KnownDistances(space, session.cache, session.measure, bar.update)
        return DeviceSearch(space, condition, distances).run(plan, proposals)


def _ranked(args: argparse.Namespace, supernet: TrainedSupernet, outcome: Outcome, out: Path) -> list[dict[str, Any]]:
    """The networks of the front nearest to the teacher, by closed-loop score; scores are kept like distances."""
    if not args.top:
        return []
    from training.search.session import closed_loop_scores

    nearest = sorted(outcome.front, key=lambda point: point.distance)[: args.top]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    scores = closed_loop_scores(supernet, [point.subnet for point in nearest], seeds, out)
    rows = [
        {"subnet": point.subnet, "score": sum(score) / len(score), "distance": point.distance}
        for point, score in zip(nearest, scores, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["score"])


def _write(folder: Path, facts: dict[str, Any], outcome: Outcome, condition: Condition, modelled: bool) -> None:
    """Result, picture and page; the result last, since it says that the search is complete."""
    from training.lut import write_atomically
    from training.search.cache import CacheError
    from training.search.plots import plot_html, plot_png

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{folder}: cannot be made ({error}); give another --out") from error
    title = f"{facts['run']}, step {facts['step']}, on {facts['device']}{' (modelled)' if modelled else ''}"
    plot_png(outcome, title, (condition.latency_ms, condition.memory_bytes), folder / PICTURE)
    plot_html(outcome, title, folder / PAGE)
    write_atomically(folder / RESULT, (json.dumps(facts, indent=1) + "\n").encode())


def _print(facts: dict[str, Any]) -> None:
    """The front as a table, and what was compared."""
    print(f"{'subnet':<72} {'distance':>9} {'ms':>8} {'MB':>7} {'bits':>5}")
    for row in facts["front"]:
        print(
            f"{row['subnet']:<72} {row['distance']:9.5f} {row['latency_ms']:8.3f} {row['memory_bytes'] / 1e6:7.2f} "
            f"{row['mean_bits']:5.2f}"
        )
    volume = f"hypervolume {facts['hypervolume']:.3f}"
    if facts["random_hypervolume"] is not None:
        volume += f", random search {facts['random_hypervolume']:.3f}"
    predicted = ""
    if facts["rank_correlation"] is not None:
        predicted = f"; rank correlation of predictions {facts['rank_correlation']:.2f}"
    print(f"{facts['measured']} networks, {facts['new_distances']} distances measured anew{predicted}")
    print(f"{volume}; {facts['seconds']} s; {facts['result']}")
    for row in facts["ranked"]:
        print(f"closed loop  {row['score']:.3f}  {row['subnet']}")
