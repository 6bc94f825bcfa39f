"""Finds misspelt nodes and parameters in parameter files, which ROS 2 ignores without a word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from dcqfa_ros.errors import UserError

PARAMETERS_KEY = "ros__parameters"
_OPTIONS = ("--params-file",)


class ParameterFileError(UserError, ValueError):
    """A parameter file sets what no node would take; the message names file, section and parameter."""


def check_sections(file: Path, namespace: str, names: Collection[str]) -> None:
    """Refuse a file with a section that is for none of the nodes ``names`` in ``namespace`` ("" is the root).

    Raises:
        ParameterFileError: it cannot be read, is no parameter file, or has such a section.
    """
    document = read_parameter_file(file)
    prefix = full_namespace(namespace)
    for section in dict.fromkeys(section for section, _ in _parameters(document, "")):
        if any(section_matches(section, f"{prefix}/{name}") for name in names):
            continue
        name = section.rpartition("/")[2]
        if name in names:
            hint = f"nodes run in namespace {prefix or '/'}: write /**/{name}"
        else:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean /**/{near[0]}?" if near else f"there are {', '.join(names)}"
        raise ParameterFileError(f"{file}: {section}: no node of this cell would take these parameters; {hint}")


def read_parameter_file(file: Path) -> Mapping[str, Any]:
    """Return the document of a parameter file; an empty one has no sections.

    Raises:
        ParameterFileError: it cannot be read or is no parameter file; ROS 2 would refuse it later, in every node.
    """
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ParameterFileError(f"{file}: cannot be read as a parameter file: {text}") from error
    if document is None:
        return {}
    if not isinstance(document, Mapping):
        raise ParameterFileError(f"{file}: expected sections such as /**/arm_node with {PARAMETERS_KEY}")
    for section, value in _strays(document, ""):
        raise ParameterFileError(f"{file}: {section}: expected {PARAMETERS_KEY}: with parameters below, got {value!r}")
    return document


def node_parameters(file: Path, path: str) -> dict[str, Any]:
    """Return what a parameter file sets for the node with the full name ``path``, with dotted names.

    Raises:
        ParameterFileError: see :func:`read_parameter_file`.
    """
    found: dict[str, Any] = {}
    for section, content in _sections(read_parameter_file(file), ""):
        if section_matches(section, path):
            found |= dict(_items(content, ""))
    return found


def full_namespace(namespace: str) -> str:
    """Return a namespace as it begins the full name of a node: ``/a/b``, or nothing for the root."""
    return f"/{namespace.strip('/')}".rstrip("/")


def section_matches(section: str, path: str) -> bool:
    """Whether a section is for the node with the full name ``path``; ``*`` is one part of a name, ``**`` any number."""
    wild = {"*": "/[^/]+", "**": "(/[^/]+)*"}
    parts = [wild.get(part) or re.escape(f"/{part}") for part in section.strip("/").split("/")]
    return re.fullmatch("".join(parts), path) is not None


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


def _sections(document: Any, section: str) -> Iterator[tuple[str, Any]]:
    """Yield (section, what is below its ``ros__parameters``)."""
    if isinstance(document, Mapping):
        for key, value in document.items():
            if key == PARAMETERS_KEY:
                yield section, value
            else:
                yield from _sections(value, f"{section.rstrip('/')}/{str(key).lstrip('/')}")


def _strays(document: Mapping[Any, Any], section: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of what is not below any ``ros__parameters``."""
    for key, value in document.items():
        place = f"{section.rstrip('/')}/{str(key).lstrip('/')}"
        if key == PARAMETERS_KEY:
            if not section or not (value is None or isinstance(value, Mapping)):
                yield place, value
        elif isinstance(value, Mapping):
            yield from _strays(value, place)
        elif value is not None:
            yield place, value


def _parameters(document: Any, section: str) -> Iterator[tuple[str, str]]:
    """Yield (section, dotted parameter name) of everything a parameter file sets."""
    for place, content in _sections(document, section):
        yield from ((place, name) for name, _ in _items(content, ""))


def _items(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _items(inner, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value
