"""What a loaded bundle gives and how missing parts are named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros.bundle import BundleError, load_bundle, verify_bundle
from test.conftest import make_files


def test_a_file_is_read_as_it_was_written(tiny_bundle: Any) -> None:
    bundle = load_bundle(tiny_bundle())
    assert bundle.read("w8a8", "denoiser") == make_files()["variants/w8a8/denoiser.onnx"]
    assert bundle.file("w8a8", "denoiser") == bundle.folder / "variants/w8a8/denoiser.onnx"


def test_a_file_damaged_after_loading_is_refused_when_it_is_read(tiny_bundle: Any) -> None:
    bundle = load_bundle(tiny_bundle())
    bundle.file("fp32", "encoder").write_bytes(b"x" * 32)
    with pytest.raises(BundleError, match=r"variants/fp32/encoder\.onnx: variants\[0\]\.files\.encoder\.sha256"):
        bundle.read("fp32", "encoder")
    assert bundle.read("fp32", "timestep")


def test_loading_without_verification_still_checks_bundle_yaml(tiny_bundle: Any) -> None:
    folder = tiny_bundle()
    (folder / "variants/fp32/encoder.onnx").unlink()
    assert load_bundle(folder, verify=False).spec.name == "tiny"
    (folder / "bundle.yaml").write_text((folder / "bundle.yaml").read_text().replace("Push-T", "Push-U"))
    with pytest.raises(BundleError, match=r"bundle\.yaml: sha256"):
        load_bundle(folder, verify=False)


@pytest.mark.parametrize(("variant", "role"), [("int4", "encoder"), ("fp32", "decoder")])
def test_an_unknown_variant_or_role_is_refused_with_those_there_are(tiny_bundle: Any, variant: str, role: str) -> None:
    bundle = load_bundle(tiny_bundle())
    for method in (bundle.read, bundle.file):
        with pytest.raises(BundleError, match=r"there is (fp32, w8a8|encoder, timestep, denoiser)"):
            method(variant, role)


@pytest.mark.parametrize("name", ["bundle.yaml", "bundle.yaml.sha256", "variants/w8a8/timestep.onnx"])
def test_a_missing_file_is_named(tiny_bundle: Any, name: str) -> None:
    folder = tiny_bundle()
    (folder / name).unlink()
    with pytest.raises(BundleError, match="no such file") as caught:
        load_bundle(folder)
    assert caught.value.file == str(folder / name)


@pytest.mark.parametrize("name", ["bundle.yaml", "bundle.yaml.sha256", "variants/w8a8/timestep.onnx"])
def test_a_pipe_or_folder_in_the_place_of_a_file_is_refused_without_waiting(tiny_bundle: Any, name: str) -> None:
    folder = tiny_bundle()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BundleError, match="not a regular file"):
        load_bundle(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(BundleError):
        load_bundle(folder)


def test_a_linked_file_is_followed(tiny_bundle: Any, tmp_path: Path) -> None:
    folder = tiny_bundle()
    moved = (folder / "variants/fp32/encoder.onnx").rename(tmp_path / "elsewhere.onnx")
    (folder / "variants/fp32/encoder.onnx").symlink_to(moved)
    assert load_bundle(folder).read("fp32", "encoder") == moved.read_bytes()


def test_all_errors_are_collected_and_files_nobody_lists_are_only_mentioned(tiny_bundle: Any) -> None:
    folder = tiny_bundle()
    (folder / "variants/fp32/encoder.onnx").unlink()
    (folder / "variants/w8a8/denoiser.onnx").write_bytes(b"")
    (folder / "notes.txt").write_text("hello")
    report = verify_bundle(folder)
    assert [issue.file for issue in report.errors] == ["variants/fp32/encoder.onnx", "variants/w8a8/denoiser.onnx"]
    assert report.unlisted == ("notes.txt",)


def test_an_error_in_one_line_names_the_first_problems_and_counts_the_rest(tiny_bundle: Any) -> None:
    folder = tiny_bundle()
    for name in make_files():
        (folder / name).unlink()
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    assert len(caught.value.issues) == len(make_files())
    assert "and 3 more, listed by: dcqfa bundle verify" in str(caught.value)
    assert "\n" not in str(caught.value)
