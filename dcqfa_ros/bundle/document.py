"""Strict reading and exact writing of a YAML document described by a ``StrictModel``.

YAML is read as if it were JSON: mappings with distinct text keys, sequences and plain scalars. What YAML has beyond
that (repeated keys, anchors, tags, dates) reads differently in other tools or hides a slip, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from dcqfa_ros.bundle.strict import StrictModel

Model = TypeVar("Model", bound=StrictModel)

# The C parser is 10 times faster and part of every PyYAML wheel; distributions may ship PyYAML without it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_TEXT = "tag:yaml.org,2002:str"
_MAX_DEPTH = 32  # no document comes near; the C parser overflows the stack of the process on tens of thousands
_GOT = 60  # characters of a wrong value that are shown


class DocumentError(ValueError):
    """A document that does not fit its model.

    Attributes:
        issues: (field, message) pairs; field is None where the document as a whole is meant.
    """

    def __init__(self, issues: list[tuple[str | None, str]]) -> None:
        """Hold ``issues``, at least one."""
        self.issues = tuple(issues)
        super().__init__("; ".join(f"{field}: {message}" if field else message for field, message in issues))


def parse_document(data: bytes, model: type[Model]) -> Model:
    """Return the document in ``data`` (UTF-8 YAML) as an instance of ``model``.

    Raises:
        DocumentError: not UTF-8, not YAML, or a field that is unknown, missing, repeated, ill-typed or out of range.
    """
    document = _read_plain(data)
    try:
        parsed = model.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        entries = error.errors(include_url=False)
        # A sequence whose items were refused is counted as too short as well: that is no news.
        news = [entry for entry in entries if entry["type"] != "too_short"] or entries
        raise DocumentError([_describe(document, entry) for entry in news]) from error
    coerced = list(_coerced(document, parsed.model_dump(mode="json"), ""))
    if coerced:
        raise DocumentError(coerced)
    return parsed


def dump_document(spec: StrictModel) -> bytes:
    """Return ``spec`` as UTF-8 YAML from which ``parse_document`` restores it exactly, floats bit for bit."""
    text: str = yaml.dump(
        spec.model_dump(mode="json"),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=120,
        default_flow_style=None,
    )
    return text.encode("utf-8")


def _read_plain(data: bytes) -> Any:
    """Return the document as plain dictionaries, lists and scalars."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError([(None, f"not UTF-8 text (byte {error.start})")]) from error
    try:
        _check_depth(text)
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                raise DocumentError([(None, "the document is empty")])
            issues = list(_not_plain(root, "", set()))
            if issues:
                raise DocumentError(list(issues))
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise DocumentError([(None, f"not valid YAML{where}: {problem}")]) from error
    except DocumentError:
        raise
    except ValueError as error:  # a number too long for Python, a date that does not exist
        raise DocumentError([(None, f"a value cannot be read ({error})")]) from error


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the tree is built, which recurses."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise DocumentError([(None, f"nested more than {_MAX_DEPTH} levels deep")])
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _not_plain(node: Any, field: str, seen: set[int]) -> Iterator[tuple[str | None, str]]:
    """Yield what makes the composed YAML tree at ``node`` more than plain data; recursion stops at an alias."""
    where = f"line {node.start_mark.line + 1}"
    if id(node) in seen:
        yield field or None, f"anchors and aliases are not allowed ({where}); write the value out"
        return
    seen.add(id(node))
    if node.tag not in _PLAIN:
        kind = node.tag.rpartition(":")[2]
        yield field or None, f"YAML type {kind!r} is not allowed ({where}); quote it if text is meant"
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _not_plain(value, f"{field}[{index}]", seen)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if key.tag != _TEXT:
                yield field or None, f"a key is not text (line {key.start_mark.line + 1}); quote it"
                continue
            name = _join(field, key.value)
            if key.value in keys:
                yield name, f"stands twice (line {key.start_mark.line + 1}); keep one"
            keys.add(key.value)
            yield from _not_plain(value, name, seen)


def _coerced(written: Any, parsed: Any, field: str) -> Iterator[tuple[str | None, str]]:
    """Yield where a value was taken for one of another type: pydantic's literals accept ``true`` and 1.0 for 1."""
    if isinstance(written, dict):
        for key, value in written.items():
            yield from _coerced(value, parsed[key], _join(field, key))
    elif isinstance(written, list):
        for index, (value, other) in enumerate(zip(written, parsed, strict=True)):
            yield from _coerced(value, other, f"{field}[{index}]")
    elif type(written) is not type(parsed) and (type(written), type(parsed)) != (int, float):
        yield field, f"expected {json.dumps(parsed)}, got {json.dumps(written)}"


def _describe(document: Any, entry: Any) -> tuple[str | None, str]:
    """Turn one pydantic error into (field as it stands in the document, message)."""
    kind: str = entry["type"]
    field = ""
    here = document
    location = entry["loc"]
    for position, part in enumerate(location):
        if isinstance(here, dict) and part in here:
            here, field = here[part], _join(field, str(part))
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here, field = here[part], f"{field}[{part}]"
        elif kind == "missing" and position == len(location) - 1:
            field = _join(field, str(part))
        # Any other part is pydantic's own (the tag of a union, "[key]") and does not stand in the document.
    if kind == "missing":
        return field, "this field is missing"
    if kind == "extra_forbidden":
        return field, "unknown field"
    message = entry["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return field or None, message
    got = json.dumps(here, ensure_ascii=False)
    return field or None, f"{message}, got {got if len(got) <= _GOT else got[:_GOT] + '...'}"


def _join(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name
