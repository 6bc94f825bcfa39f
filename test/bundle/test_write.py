"""A bundle is written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros.bundle import BundleError, load_bundle, verify_bundle, write, write_bundle
from dcqfa_ros.bundle.document import dump_document, parse_document
from dcqfa_ros.bundle.schema import BundleSpec
from test.conftest import make_files, make_spec


class Interrupted(BaseException):
    """Stands for Ctrl-C or a kill at a chosen place."""


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_salted(folder: Path, salt: str) -> None:
    files = make_files(salt)
    write_bundle(folder, make_spec(files), files)


def exchange_not_supported(one: Path, other: Path) -> None:
    raise OSError(errno.EINVAL, "not supported here")


def test_a_written_specification_is_read_back_exactly() -> None:
    spec = make_spec(make_files())
    odd = spec.action.model_copy(update={"minimum": (0.1 + 0.2, -1e-300), "maximum": (1e300, 5e-324)})
    spec = spec.model_copy(update={"action": odd, "task": "on: 'ü' \\ # no\n\t2024-01-01", "name": "yes"})
    assert parse_document(dump_document(spec), BundleSpec) == spec


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_bundle_is_replaced_and_files_no_longer_listed_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(write, "_exchange", exchange_not_supported)
    folder = tmp_path / "tiny"
    write_salted(folder, "old")
    files = {path: data for path, data in make_files("new").items() if "/w8a8/" not in path}
    spec = make_spec(make_files("new"))
    write_bundle(folder, spec.model_copy(update={"variants": spec.variants[:1]}), files)
    assert verify_bundle(folder).ok
    assert verify_bundle(folder).unlisted == ()
    assert load_bundle(folder).read("fp32", "encoder") == files["variants/fp32/encoder.onnx"]
    assert not (folder / "variants/w8a8").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_an_interruption_at_any_step_leaves_the_old_or_the_new_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    folder = tmp_path / "tiny"
    write_salted(folder, "old")
    old, outcomes = tree(folder), set()
    write_salted(tmp_path / "other", "new")
    new = tree(tmp_path / "other")
    for last in range(1000):
        steps = iter(range(last))
        reached_end = False
        with monkeypatch.context() as patch:

            def interrupting(function: Callable[..., Any], steps: Any = steps) -> Callable[..., Any]:
                def call(*args: Any, **kwargs: Any) -> Any:
                    if next(steps, None) is None:
                        raise Interrupted
                    return function(*args, **kwargs)

                return call

            swap = write._exchange if exchange else exchange_not_supported
            patch.setattr(write, "_exchange", interrupting(swap))
            patch.setattr(os, "fsync", interrupting(os.fsync))
            patch.setattr(Path, "mkdir", interrupting(Path.mkdir))
            try:
                write_salted(folder, "new")
                reached_end = True
            except Interrupted:
                pass
        assert tree(folder) in (old, new)
        assert verify_bundle(folder).ok
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "tiny"]
        outcomes.add(tree(folder) == new)
        if reached_end:
            break
        write_salted(folder, "old")
    assert outcomes == {False, True}


def test_when_the_second_rename_fails_the_old_bundle_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    write_salted(folder, "old")
    old = tree(folder)
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if self.name.startswith(".") and not self.name.endswith(".old"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(write, "_exchange", exchange_not_supported)
    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(BundleError, match="No space left"):
        write_salted(folder, "new")
    assert tree(folder) == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("name", ["notes.txt", ".git", "variants2"])
def test_a_folder_that_holds_other_things_is_not_replaced(tiny_bundle: Any, name: str) -> None:
    folder = tiny_bundle()
    (folder / name).mkdir()
    with pytest.raises(BundleError, match="more than a bundle"):
        write_salted(folder, "new")
    assert (folder / name).is_dir()
    assert load_bundle(folder).spec.name == "tiny"


def test_a_folder_without_bundle_yaml_and_a_file_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "variants").mkdir()
    with pytest.raises(BundleError, match=r"no bundle\.yaml"):
        write_salted(tmp_path, "new")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="not a folder"):
        write_salted(tmp_path / "file", "new")


def test_a_link_to_a_bundle_stays_a_link(tiny_bundle: Any, tmp_path: Path) -> None:
    folder = tiny_bundle()
    link = tmp_path / "link"
    link.symlink_to(folder)
    write_salted(link, "new")
    assert link.is_symlink()
    assert load_bundle(folder).read("fp32", "encoder") == make_files("new")["variants/fp32/encoder.onnx"]


def test_contents_that_do_not_fit_the_specification_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    files = make_files()
    spec = make_spec(files)
    path = "variants/fp32/encoder.onnx"
    cases = [
        ({**files, path: b"other"}, "size and SHA-256"),
        ({name: data for name, data in files.items() if name != path}, "no contents were given"),
        ({**files, "variants/extra.onnx": b"x"}, "does not list this file"),
    ]
    for wrong, reason in cases:
        with pytest.raises(BundleError, match=reason):
            write_bundle(tmp_path / "tiny", spec, wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["bundle.yaml", "encoder.onnx", "variants/fp32"])
def test_paths_that_would_collide_are_refused(tmp_path: Path, path: str) -> None:
    files = make_files()
    spec = make_spec(files)
    moved = spec.variants[1].files["encoder"].model_copy(update={"path": path})
    variant = spec.variants[1].model_copy(update={"files": {**spec.variants[1].files, "encoder": moved}})
    files[path] = files.pop("variants/w8a8/encoder.onnx")
    with pytest.raises(BundleError, match=r"below variants/|folder of"):
        write_bundle(tmp_path / "tiny", spec.model_copy(update={"variants": (spec.variants[0], variant)}), files)
    assert list(tmp_path.iterdir()) == []
