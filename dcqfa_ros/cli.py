"""The command line ``dcqfa``.

Only the module of the command that runs is imported, so that a package one command needs is missed by that command
alone and start-up stays short. Other distributions add commands through the entry point group ``dcqfa.commands``:
name -> ``register(subparsers)``, which adds a parser of that name and sets ``func`` to a function from the parsed
arguments to the exit code.

Exit codes: what the command says; 2 for errors the user can mend; 130 after Ctrl-C; 1 for a defect of this software.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from dcqfa_ros import __version__
from dcqfa_ros.errors import UserError

Register = Callable[[Any], None]

COMMANDS = ("bench", "bundle", "calibrate", "demo", "devices", "emulate", "teleop", "tool-load", "up")
ENTRY_POINT_GROUP = "dcqfa.commands"
DEBUG_VARIABLE = "DCQFA_DEBUG"

EXIT_DEFECT = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dcqfa`` with ``arguments`` (those of the process if None) and return its exit code.

    Errors end in one line on standard error. With ``DCQFA_DEBUG=1`` in the environment they are raised instead.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parser = _parser(arguments)
        # argparse takes no positional arguments after an option once some came before it: put the assignments last.
        assigned = [text for text in arguments if ":=" in text and not text.startswith("-")]
        args = parser.parse_args([text for text in arguments if text not in assigned] + assigned)
        code: int = args.func(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader left (`dcqfa ... | head`). Nothing more can be said; keep the interpreter from trying at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DEFECT
    except ModuleNotFoundError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        return _complain(_missing(error), EXIT_USER_ERROR)
    except UserError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        return _complain(str(error), EXIT_USER_ERROR)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        text = f"{type(error).__name__}: {error} (a defect of dcqfa; {DEBUG_VARIABLE}=1 shows where it happened)"
        return _complain(text, EXIT_DEFECT)


def _complain(text: str, code: int) -> int:
    print(f"dcqfa: error: {' '.join(text.split())}", file=sys.stderr)
    return code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser with the one command that ``arguments`` name, or with all of them where they name none."""
    parser = argparse.ArgumentParser(
        prog="dcqfa",
        description="Learned manipulation policies from demonstrations to the robot, quantized for its computer.",
        epilog="example: dcqfa demo",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    available = _registry()
    wanted = arguments[0] if arguments else ""
    if wanted in available:
        available[wanted]()(subparsers)
        return parser
    for name, load in sorted(available.items()):
        try:
            load()(subparsers)
        except ModuleNotFoundError as error:
            subparsers.add_parser(name, help=f"(not available: {_missing(error)})")
    return parser


def _missing(error: ModuleNotFoundError) -> str:
    return (
        f"the Python package {error.name!r} is not installed; "
        "the files in requirements/ list what each part needs (pip install -r requirements/...)"
    )


def _registry() -> dict[str, Callable[[], Register]]:
    """Return what loads each command's ``register``; a built-in command wins over an entry point of its name."""
    registry: dict[str, Callable[[], Register]] = {
        entry.name: entry.load for entry in entry_points(group=ENTRY_POINT_GROUP)
    }
    registry.update({name: _built_in(name) for name in COMMANDS})
    return registry


def _built_in(name: str) -> Callable[[], Register]:
    def load() -> Register:
        register: Register = importlib.import_module(f"dcqfa_ros.commands.{name.replace('-', '_')}").register
        return register

    return load


if __name__ == "__main__":
    sys.exit(main())
