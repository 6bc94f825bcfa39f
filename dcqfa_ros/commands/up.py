"""``dcqfa up``: bring the graph up as supervised processes, without ROS 2's ``launch``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from dcqfa_ros.ros.bringup import OPTIONS, BringupError, BringupOptions, describe, options_from_text
from dcqfa_ros.ros.isolation import claim_namespace, isolated_environment
from dcqfa_ros.ros.supervisor import Supervisor


def register(subparsers: Any) -> None:
    """Add ``up``."""
    lines = [f"  {o.name}:={o.default or '...'}".ljust(28) + o.description for o in OPTIONS]
    parser = subparsers.add_parser(
        "up",
        help="bring up the ROS 2 graph",
        description="Bring up the ROS 2 graph and keep it up until Ctrl-C, or until a node dies: then its name is "
        "reported and its exit code returned (128 + signal if it was killed).",
        epilog="options and their defaults:\n" + "\n".join(lines) + "\n\nexample: dcqfa up cell:=pusht namespace:=a",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("options", nargs="*", metavar="NAME:=VALUE", help="deployment choices, see below")
    parser.add_argument("--restart", action="store_true", help="restart a node that dies (same as restart:=true)")
    parser.add_argument(
        "--isolated",
        action="store_true",
        help="use a free ROS domain that does not leave this host, instead of ROS_DOMAIN_ID",
    )
    parser.set_defaults(func=_up)


def parse_options(texts: Sequence[str], restart: bool = False) -> BringupOptions:
    """Return the options given as ``name:=value``.

    Raises:
        BringupError: a text has another form, a name is unknown or given twice, or a value is not possible.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition(":=")
        if not separator:
            raise BringupError(f"expected name:=value, got {text!r}")
        if name in values:
            raise BringupError(f"{name}:= is given twice")
        values[name] = value
    if restart:
        values["restart"] = "true"
    return options_from_text(values)


def _up(args: argparse.Namespace) -> int:
    options = parse_options(args.options, args.restart)
    nodes = describe(options)
    with ExitStack() as stack:
        env = dict(os.environ)
        if args.isolated:
            isolation = stack.enter_context(isolated_environment())
            env = isolation.env
            print(f"ROS_DOMAIN_ID={isolation.domain} ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST", flush=True)
        domain = _domain(env.get("ROS_DOMAIN_ID", ""))
        stack.enter_context(claim_namespace(domain, options.namespace))
        outcome = Supervisor(nodes, namespace=options.namespace, env=env, restart=options.restart).run()
    print(f"dcqfa up: down: {outcome.reason}", flush=True)
    return outcome.exit_code


def _domain(text: str) -> int:
    try:
        return int(text or "0")
    except ValueError:
        raise BringupError(f"ROS_DOMAIN_ID: expected a whole number, got {text!r}") from None
