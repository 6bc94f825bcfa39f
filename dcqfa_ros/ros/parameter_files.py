"""Finds misspelt parameters in parameter files, which ROS 2 ignores without a word."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from dcqfa_ros.errors import UserError

PARAMETERS_KEY = "ros__parameters"
_OPTIONS = ("--params-file",)


class ParameterFileError(UserError, ValueError):
    """A parameter file sets a parameter that the node does not have; the message names file, section and parameter."""


def check_parameter_files(argv: Sequence[str], node: str, known: Collection[str]) -> None:
    """Refuse unknown parameters in sections that name ``node`` in the files given by ``--params-file``.

    Sections for several nodes (``/**``) may hold parameters that only others have, and are left alone. Unreadable files
    are left to ROS 2, which refuses them.

    Raises:
        ParameterFileError: a parameter that is not in ``known``.
    """
    for name in _files(argv):
        try:
            document = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        for section, parameter in _parameters(document, ""):
            if section.rpartition("/")[2] == node and parameter not in known:
                near = difflib.get_close_matches(parameter, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
                raise ParameterFileError(f"{name}: {section}: {node} has no parameter {parameter!r}; {hint}")


def _files(argv: Sequence[str]) -> Iterator[str]:
    for option, value in pairwise(argv):
        if option in _OPTIONS:
            yield value


def _parameters(document: Any, section: str) -> Iterator[tuple[str, str]]:
    """Yield (section, dotted parameter name) of everything a parameter file sets."""
    if not isinstance(document, Mapping):
        return
    for key, value in document.items():
        if key == PARAMETERS_KEY:
            yield from ((section, name) for name in _leaves(value, ""))
        else:
            yield from _parameters(value, f"{section.rstrip('/')}/{str(key).lstrip('/')}")


def _leaves(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif name:
        yield name
