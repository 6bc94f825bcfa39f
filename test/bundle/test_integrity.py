"""Every byte and every field of a bundle is protected, and checking changes nothing on disk."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dcqfa_ros.bundle import BundleError, load_bundle, verify_bundle, write_bundle
from test.conftest import make_files, make_spec

SPEC = make_spec(make_files())
WHERE = st.data()


@pytest.fixture(scope="module")
def bundle() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "tiny"
        write_bundle(folder, SPEC, make_files())
        yield folder


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Return modification time and contents of everything below ``root``."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(root.rglob("*"))
    }


def refusal(folder: Path) -> BundleError:
    """Return the error of loading ``folder``; check that nothing on disk changed and that verify agrees."""
    before = snapshot(folder.parent)
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    report = verify_bundle(folder)
    assert snapshot(folder.parent) == before
    assert not report.ok
    assert report.errors == caught.value.issues
    return caught.value


def seal(folder: Path, document: Any) -> None:
    """Write ``document`` as bundle.yaml with a hash that fits, so that only the schema can refuse it."""
    data = yaml.safe_dump(document, sort_keys=False).encode()
    (folder / "bundle.yaml").write_bytes(data)
    (folder / "bundle.yaml.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  bundle.yaml\n")


def models(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], BaseModel]]:
    """Yield (path, model) for every model inside ``value``."""
    if isinstance(value, BaseModel):
        yield path, value
        for name in type(value).model_fields:
            yield from models(getattr(value, name), (*path, name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from models(item, (*path, key))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from models(item, (*path, index))


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield (path, scalar) for every scalar of a document."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def at(document: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        document = document[part]
    return document


def field_name(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


DOCUMENT = SPEC.model_dump(mode="json")
MODELS = list(models(SPEC))
REQUIRED = [
    (*path, name) for path, model in MODELS for name, info in type(model).model_fields.items() if info.is_required()
]
LEAVES = list(leaves(DOCUMENT))
WRONG_TYPES: dict[type, list[Any]] = {
    str: [7, 1.5, True, ["x"], {"x": 1}, None],
    int: ["7", 1.5, True, [7], {"x": 7}, None],
    float: ["1.5", "nan", float("nan"), float("inf"), True, [1.5], {"x": 1.5}, None],
    type(None): ["x", True, ["x"], {"x": 1}],
}
OPTIONAL_TEXTS = ("searched_for",)  # where any text is right


def test_an_untouched_bundle_is_accepted_and_left_as_it_is(bundle: Path) -> None:
    before = snapshot(bundle.parent)
    loaded = load_bundle(bundle)
    report = verify_bundle(bundle)
    assert snapshot(bundle.parent) == before
    assert loaded.spec == SPEC
    assert report.ok
    assert report.files == len(make_files()) + 2
    assert report.bytes == sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


@settings(max_examples=200, deadline=None)
@given(data=WHERE, change=st.integers(1, 255))
def test_any_single_changed_byte_is_refused_by_name(bundle: Path, data: st.DataObject, change: int) -> None:
    names = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from(names))
    path = bundle / name
    original = path.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    path.write_bytes(original[:position] + bytes([original[position] ^ change]) + original[position + 1 :])
    try:
        error = refusal(bundle)
    finally:
        path.write_bytes(original)
    named = {issue.file for issue in error.issues}
    assert named & ({"bundle.yaml", "bundle.yaml.sha256"} if name.startswith("bundle.yaml") else {name})
    assert name.startswith("bundle.yaml") or named == {name}
    assert any(issue.field for issue in error.issues)


@settings(max_examples=60, deadline=None)
@given(data=WHERE, added=st.binary(max_size=3), removed=st.integers(0, 3))
def test_any_changed_length_is_refused_by_name(bundle: Path, data: st.DataObject, added: bytes, removed: int) -> None:
    path = bundle / data.draw(st.sampled_from(sorted(make_files())))
    original = path.read_bytes()
    changed = original[: len(original) - removed] + added
    if changed == original:
        return
    path.write_bytes(changed)
    try:
        error = refusal(bundle)
    finally:
        path.write_bytes(original)
    assert error.file == str(path)
    assert (error.field or "").startswith("variants[")


@settings(max_examples=100, deadline=None)
@given(
    place=st.sampled_from([path for path, _ in MODELS]),
    name=st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
    value=st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
)
def test_any_unknown_field_is_refused_by_name(
    bundle: Path, place: tuple[str | int, ...], name: str, value: object
) -> None:
    document = copy.deepcopy(DOCUMENT)
    model = dict(MODELS)[place]
    if name in type(model).model_fields:
        return
    at(document, place)[name] = value
    seal(bundle, document)
    error = refusal(bundle)
    assert (error.file, error.field) == (str(bundle / "bundle.yaml"), field_name((*place, name)))
    assert "unknown" in error.message


@pytest.mark.parametrize("path", REQUIRED, ids=field_name)
def test_any_missing_field_is_refused_by_name(bundle: Path, path: tuple[str | int, ...]) -> None:
    document = copy.deepcopy(DOCUMENT)
    del at(document, path[:-1])[path[-1]]
    seal(bundle, document)
    error = refusal(bundle)
    assert error.file == str(bundle / "bundle.yaml")
    # Where the missing field says what kind of thing this is (type), the thing itself is named.
    assert error.field in (field_name(path), field_name(path[:-1]))


@settings(max_examples=150, deadline=None)
@given(data=WHERE)
def test_any_ill_typed_field_is_refused_by_name(bundle: Path, data: st.DataObject) -> None:
    path, value = data.draw(st.sampled_from(LEAVES))
    wrong = data.draw(st.sampled_from(WRONG_TYPES[type(value)]))
    if path[-1] in OPTIONAL_TEXTS and isinstance(wrong, str):
        return
    document = copy.deepcopy(DOCUMENT)
    at(document, path[:-1])[path[-1]] = wrong
    seal(bundle, document)
    error = refusal(bundle)
    assert error.file == str(bundle / "bundle.yaml")
    assert error.field
    # The place itself, what it stands in (a choice between types), or what is wrong inside the value put there.
    named, meant = error.field, field_name(path)
    assert meant.startswith(named) or named.startswith((f"{meant}.", f"{meant}["))


@pytest.mark.parametrize(
    ("old", "new", "field", "reason"),
    [
        ("task: Push-T\n", "task: Push-T\ntask: Push-T\n", "task", "twice"),
        ("name: tiny\n", "name: &anchor tiny\n", None, None),
        ("task: Push-T\n", "task: *anchor\n", None, "not valid YAML"),
        ("task: Push-T\n", "task: 2024-01-01\n", "task", "timestamp"),
        ("task: Push-T\n", "task: !!binary AAAA\n", "task", "binary"),
        ("task: Push-T\n", "task: !!python/object:os.system x\n", "task", "not allowed"),
        ("task: Push-T\n", "task: Push-T\n7: x\n", None, "not text"),
        ("schema_version: 1\n", "schema_version: 1.0\n", "schema_version", "1.0"),
        ("schema_version: 1\n", "schema_version: true\n", "schema_version", "true"),
        ("schema_version: 1\n", "schema_version: 2\n", "schema_version", "2"),
        ("task: Push-T\n", "task: Push-T\n---\n", None, "not valid YAML"),
        ("task: Push-T\n", "task: Push-T\n<<: {a: 1}\n", None, "not text"),
        ("task: Push-T\n", f"task: {'[' * 30000}\n", None, "nested more than 32"),
        ("task: Push-T\n", f"task: {'9' * 6000}\n", None, "cannot be read"),
        ("name: tiny\n", "name: ../tiny\n", "name", "pattern"),
        ("variants/fp32/encoder.onnx", "../encoder.onnx", "variants[0].files.encoder.path", "pattern"),
        ("variants/fp32/encoder.onnx", "/etc/passwd", "variants[0].files.encoder.path", "pattern"),
    ],
)
def test_yaml_that_is_more_than_plain_data_or_leaves_the_folder_is_refused(
    tiny_bundle: Any, old: str, new: str, field: str | None, reason: str | None
) -> None:
    folder = tiny_bundle()
    data = (folder / "bundle.yaml").read_text().replace(old, new, 1).encode()
    (folder / "bundle.yaml").write_bytes(data)
    (folder / "bundle.yaml.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  bundle.yaml\n")
    if reason is None:  # an anchor that nobody uses changes nothing
        assert load_bundle(folder).spec.name == "tiny"
        return
    error = refusal(folder)
    assert error.field == field
    assert reason in error.message


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_as_bundle_yaml_end_in_a_bundle_error(bundle: Path, data: bytes) -> None:
    (bundle / "bundle.yaml").write_bytes(data)
    (bundle / "bundle.yaml.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  bundle.yaml\n")
    assert refusal(bundle).file == str(bundle / "bundle.yaml")
