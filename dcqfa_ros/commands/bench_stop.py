"""``dcqfa bench stop``: how soon a contact stops the arm."""

from __future__ import annotations

import argparse
from typing import Any

from dcqfa_ros.commands.bench_arm import add_options, show


def register(subparsers: Any) -> None:
    """Add ``stop`` to the subcommands of ``bench``."""
    text = (
        "Let an emulated FT 300-S (bytes paced at 19200 baud) report a contact while an emulated Inovo arm moves, and "
        "report the time from the last byte of the crossing frame to zero twist on the arm's socket."
    )
    parser = subparsers.add_parser(
        "stop", help="a contact on its way to zero twist", description=text, epilog="example: dcqfa bench stop --json"
    )
    add_options(parser, trials=50)
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    from dcqfa_ros.bench.stop import run_stop_bench

    return show(run_stop_bench(args.trials, args.rate), args.json)
