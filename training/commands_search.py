"""``dcqfa search``: the subnets of a supernet that a device's budgets allow, by distance to the teacher."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.search.options import add_search_options, check_search_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training.conditions import Condition, Conditions
    from training.config import TrainConfig
    from training.lut import LookUpTable
    from training.search.budgets import Budgets
    from training.search.cache import DistanceCache
    from training.search.run import Outcome, Plan
    from training.search.session import SearchSession
    from training.space import SearchSpace
    from training.subnet import Subnet
    from training.supernet_checkpoint import TrainedSupernet

PROPOSALS = 24  # networks of the configuration sampler in the first generation
PLAN = "plan.json"
ASKED = ("population", "generations", "seed", "samples", "full", "verify")


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
    add_search_options(parser, population=64, generations=50, seeds=20)
    parser.add_argument(
        "--device",
        required=True,
        help="look-up table: a file, the name (or its beginning) of one that the run was trained with, or here for the "
        "one that was measured on this machine",
    )
    parser.add_argument("--latency-ms", type=float, metavar="MS", help="most milliseconds per chunk (default: any)")
    parser.add_argument("--memory-mb", type=float, metavar="MB", help="most megabytes (default: any)")
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
    parser.set_defaults(func=_search)


def _search(args: argparse.Namespace) -> int:
    _check(args)
    from training.commands import data_section
    from training.config import override
    from training.search.budgets import MEGA, Budgets, closest_network, condition, infeasible
    from training.search.options import chosen_executor
    from training.search.plots import check_plotting
    from training.search.report import RESULT, chosen, print_result
    from training.search.session import check_closed_loop, search_session
    from training.search.tables import search_table
    from training.supernet_checkpoint import load_supernet

    started = time.monotonic()
    check_plotting()
    executor = chosen_executor(args)
    supernet = load_supernet(args.run)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    if args.top:
        check_closed_loop(supernet, seeds)
    config = override(supernet.meaning.config, data=data_section(args.data))
    file, table = search_table(args.device, config)
    conditions = _conditions(supernet, config, file.stem, table)
    budgets = Budgets(args.latency_ms, None if args.memory_mb is None else args.memory_mb * MEGA)
    wanted = condition(conditions, file.stem, budgets)
    out = args.out or Path("searches") / config.name
    if args.verify is not None and not any(out.glob("distances-*.jsonl")):
        raise _nothing_known(out)
    closest = closest_network(wanted)
    if not wanted.fits(closest):
        raise infeasible(wanted, closest)
    proposals = [closest, *_proposals(supernet, conditions, wanted, args.seed)]
    with search_session(supernet, config, out, args.samples, executor) as session:
        asked = {
            "device": file.stem,
            "table_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "space_sha256": supernet.space.config.sha256(),
            "latency_budget_ms": args.latency_ms,
            "memory_budget_mb": args.memory_mb,
            **{name: getattr(args, name) for name in ASKED},
            "random": not args.no_random,
            "distances": session.cache.path.name,
        }
        folder = out / _folder_name(asked)
        plan = _plan(args, folder, session.cache, supernet.space)
        outcome = _run(session, wanted, plan, proposals)
    facts = {
        "run": str(args.run),
        "step": supernet.meaning.step,
        "table": str(file),
        "fingerprint": table.device.fingerprint,
        "modelled": table.modelled,
        **asked,
        "predicted_from": None if plan.known is None else len(plan.known),
        **outcome.document(supernet.space),
        "ranked": [],
        "executor": executor.name,
        "workers": session.workers,
        "seconds": round(time.monotonic() - started, 1),
        "closed_loop_seconds": None,
        "result": str(folder / RESULT),
    }
    facts["chosen"] = chosen(facts)
    _draw(folder, facts, outcome, budgets)
    _write(folder, facts, supernet, table)
    if args.top:
        started = time.monotonic()
        facts["ranked"] = _ranked(args.top, seeds, supernet, outcome, out)
        facts["closed_loop_seconds"] = round(time.monotonic() - started, 1)
        facts["chosen"] = chosen(facts)
        _write(folder, facts, supernet, table)
    if args.json:
        print(json.dumps(facts))
    else:
        print_result(facts)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers out of range.

    Raises:
        ArgumentError: naming the option.
    """
    from training.commands import ArgumentError

    check_search_options(args, verify=1, top=0, seeds=1)
    for option in ("latency_ms", "memory_mb"):
        value = getattr(args, option)
        if value is not None and not (math.isfinite(value) and value > 0.0):
            raise ArgumentError(f"--{option.replace('_', '-')}: expected a number above 0, got {value}")


def _conditions(supernet: TrainedSupernet, config: TrainConfig, device: str, table: LookUpTable) -> Conditions:
    """The one device, as the sampler's conditions."""
    from training.conditions import Conditions
    from training.cost import cost_tensors

    return Conditions(supernet.space, {device: cost_tensors(table, supernet.space, config.diffusion.steps)}, [])


def _folder_name(asked: dict[str, Any]) -> str:
    """Device and budgets for people, and what tells other searches of them apart."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:6]
    latency, memory = asked["latency_budget_ms"], asked["memory_budget_mb"]
    parts = [asked["device"]]
    if latency is not None:
        parts.append(f"{latency:g}ms")
    if memory is not None:
        parts.append(f"{memory:g}mb")
    return "-".join([*parts, digest])


def _plan(args: argparse.Namespace, folder: Path, cache: DistanceCache, space: SearchSpace) -> Plan:
    """What to measure: everything in the first search of a supernet, little in those of further devices.

    It is decided once and kept, so that a search that was interrupted goes on with the same plan.
    """
    from training.files import write_atomically
    from training.search.nsga import Genetics
    from training.search.run import LEAST_KNOWN, VERIFIED, Plan

    kept = _kept_plan(folder / PLAN)
    known: list[str] | None = None
    if kept is not None:
        known = kept["known"]
    else:
        if args.verify is not None or (not args.full and _searched(folder.parent, cache.path.name)):
            known = [name for name, _ in cache.items() if _offers(space, name)]
        if known is not None and len(known) < LEAST_KNOWN:
            if args.verify is not None:
                raise _nothing_known(cache.path)
            print(f"{cache.path}: too few distances to predict others; every network is measured", file=sys.stderr)
            known = None
        write_atomically(folder / PLAN, json.dumps({"known": known}).encode())
    return Plan(
        Genetics(args.population, args.generations, args.seed),
        None if known is None else tuple(known),
        args.verify or VERIFIED,
        not args.no_random,
    )


def _kept_plan(path: Path) -> dict[str, list[str] | None] | None:
    """What an earlier start of this search wrote down, None where there was none."""
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        known = document["known"]
        if known is None or (isinstance(known, list) and all(isinstance(name, str) for name in known)):
            return {"known": known}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    print(f"{path}: cannot be read; the search is planned anew", file=sys.stderr)
    return None


def _offers(space: SearchSpace, name: str) -> bool:
    """Whether a network is one of ``space``; the same weights may have been searched in a wider one."""
    from training.subnet import SpaceError

    try:
        space.parse(name)
    except SpaceError:
        return False
    return True


def _nothing_known(path: Path) -> Exception:
    from training.commands import ArgumentError
    from training.search.run import LEAST_KNOWN

    return ArgumentError(
        f"--verify: {path} holds fewer than {LEAST_KNOWN} distances to predict others from; search without it first"
    )


def _searched(out: Path, distances: str) -> bool:
    """Whether a search with the same distances was completed; files that cannot be read count as none."""
    from training.search.report import RESULT

    for path in sorted(out.glob(f"*/{RESULT}")):
        try:
            facts = json.loads(path.read_text())
        except (OSError, ValueError):
            print(f"{path}: cannot be read and is left out", file=sys.stderr)
            continue
        if isinstance(facts, dict) and facts.get("distances") == distances:
            return True
    return False


def _proposals(supernet: TrainedSupernet, conditions: Conditions, condition: Condition, seed: int) -> list[Subnet]:
    """Draws of the run's own configuration sampler for this device and these budgets.

    Raises:
        CheckpointError: the search space in the checkpoint is not the one that the sampler was trained with.
    """
    import torch

    from training.checkpoint import CheckpointError
    from training.predictor import AdvantageError
    from training.sampler import ConfigurationSampler

    options = supernet.meaning.config.supernet
    assert options is not None
    sampler = ConfigurationSampler(supernet.space, conditions, options.sampler)
    try:
        sampler.load_state_dict(supernet.sampler(sampler.state_dict()))
    except (AdvantageError, RuntimeError) as error:
        raise CheckpointError(
            f"{supernet.path}: supernet.space in its configuration is not the space that it was trained with "
            f"({error}); restore the checkpoint"
        ) from error
    return sampler.draw_many(condition, torch.Generator().manual_seed(seed), PROPOSALS)


def _run(session: SearchSession, condition: Condition, plan: Plan, proposals: Sequence[Subnet]) -> Outcome:
    """The search, with a bar of the distances that are measured; their number is at most the bar's total."""
    from tqdm import tqdm

    from training.search.run import DeviceSearch
    from training.search.session import KnownDistances

    space = session.supernet.space
    most = plan.genetics.population * plan.genetics.generations * (2 if plan.random else 1)
    with tqdm(total=most if plan.known is None else plan.verify, desc="distances", mininterval=1.0) as bar:
        distances = KnownDistances(space, session.cache, session.measure, bar.update)
        return DeviceSearch(space, condition, distances).run(plan, proposals)


def _ranked(top: int, seeds: range, supernet: TrainedSupernet, outcome: Outcome, out: Path) -> list[dict[str, Any]]:
    """The networks of the front nearest to the teacher, by closed-loop score; scores are kept like distances."""
    from training.search.session import closed_loop_scores

    nearest = sorted(outcome.front, key=lambda point: point.distance)[:top]
    scores = closed_loop_scores(supernet, [point.subnet for point in nearest], seeds, out)
    rows = [
        {"subnet": point.subnet, "score": sum(score) / len(score), "distance": point.distance}
        for point, score in zip(nearest, scores, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["score"])


def _draw(folder: Path, facts: dict[str, Any], outcome: Outcome, budgets: Budgets) -> None:
    from training.search.plots import plot_html, plot_png
    from training.search.report import PAGE, PICTURE

    modelled = " (modelled)" if facts["modelled"] else ""
    title = f"{facts['run']}, step {facts['step']}, on {facts['device']}{modelled}"
    plot_png(outcome, title, (budgets.latency_ms, budgets.memory_bytes), folder / PICTURE)
    plot_html(outcome, title, folder / PAGE)


def _write(folder: Path, facts: dict[str, Any], supernet: TrainedSupernet, table: LookUpTable) -> None:
    """The front for the exporter, and the result; the latter last, since it says that the search is complete."""
    from training.search.report import FRONT, RESULT, front_document, write_document
    from training.warm_start import state_sha256

    weights = state_sha256(supernet.network.state_dict())
    steps = supernet.meaning.config.diffusion.steps
    write_document(folder / FRONT, front_document(facts, table, weights, steps))
    write_document(folder / RESULT, facts)
