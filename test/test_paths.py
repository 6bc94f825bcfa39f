"""Models and configuration are found in every kind of installation."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros import paths
from dcqfa_ros.bundle import BundleNotFoundError
from dcqfa_ros.errors import ConfigNotFoundError, UserError


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start every test where nothing can be found, in an empty working folder."""
    for variable in ("AMENT_PREFIX_PATH", "DCQFA_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(paths, "source_root", lambda: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path / "prefix"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def ament_prefix(root: Path) -> Path:
    marker = root / "share/ament_index/resource_index/packages/dcqfa_ros"
    marker.parent.mkdir(parents=True)
    marker.touch()
    return root / "share/dcqfa_ros"


def bundle_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "bundle.yaml").touch()
    return folder


def test_the_source_tree_is_recognised_and_an_installed_copy_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    assert paths.source_root() == Path(__file__).parents[1]
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "site-packages/dcqfa_ros/paths.py"))
    assert paths.source_root() is None


def test_the_ament_share_wins_over_the_environment_and_that_over_the_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paths, "source_root", lambda: tmp_path / "source")
    assert paths.share_directory() == tmp_path / "source"
    share = tmp_path / "prefix/share/dcqfa_ros"
    share.mkdir(parents=True)
    (share / "package.xml").touch()
    assert paths.share_directory() == share
    indexed = ament_prefix(tmp_path / "overlay")
    monkeypatch.setenv("AMENT_PREFIX_PATH", os.pathsep.join([str(tmp_path / "other"), str(tmp_path / "overlay")]))
    assert paths.share_directory() == indexed


def test_an_installation_without_data_files_is_reported() -> None:
    with pytest.raises(UserError, match="without its data files"):
        paths.share_directory()


def test_names_are_looked_up_in_the_users_folders_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = bundle_at(ament_prefix(tmp_path / "ws") / "models/pusht")
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path / "ws"))
    assert paths.find_bundle("pusht") == installed
    own = bundle_at(tmp_path / "second/pusht")
    monkeypatch.setenv("DCQFA_MODELS", os.pathsep.join([str(tmp_path / "first"), "", str(tmp_path / "second")]))
    assert paths.find_bundle("pusht") == own


def test_a_path_wins_over_a_name_but_a_folder_that_is_no_bundle_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named = bundle_at(tmp_path / "models/pusht")
    monkeypatch.setenv("DCQFA_MODELS", str(tmp_path / "models"))
    Path("pusht").mkdir()  # a training run of the same name, say
    assert paths.find_bundle("pusht") == named
    Path("pusht/bundle.yaml").touch()
    assert paths.find_bundle("pusht") == Path("pusht")
    assert paths.find_bundle("./pusht") == Path("pusht")
    assert paths.find_bundle(str(named)) == named


def test_an_unknown_bundle_is_refused_with_the_places_and_the_names_there_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DCQFA_MODELS", str(tmp_path / "models"))
    with pytest.raises(BundleNotFoundError, match="no bundle was found anywhere"):
        paths.find_bundle("pusht")
    bundle_at(tmp_path / "models/pusht")
    bundle_at(tmp_path / "models/.pusht.0123")
    for wrong in ("push", "models/pusht", "", "../none"):
        with pytest.raises(BundleNotFoundError) as caught:
            paths.find_bundle(wrong)
        assert str(tmp_path / "models") in str(caught.value)
        assert "bundles there are: pusht;" in str(caught.value)


def test_a_bundle_written_by_the_writer_is_found_by_name(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Callable[..., Any]
) -> None:
    folder = tiny_bundle("mine")
    monkeypatch.setenv("DCQFA_MODELS", str(folder.parent))
    assert paths.find_bundle("mine") == folder


def test_configuration_is_found_by_path_by_name_and_without_its_suffix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paths, "source_root", lambda: tmp_path / "source")
    file = tmp_path / "source/config/training/pusht.yaml"
    file.parent.mkdir(parents=True)
    file.touch()
    assert paths.find_config("training/pusht") == file
    assert paths.find_config("training/pusht.yaml") == file
    assert paths.find_config(str(file)) == file
    for wrong in ("pusht", "", "training"):
        with pytest.raises(ConfigNotFoundError, match=r"there is training/pusht\.yaml"):
            paths.find_config(wrong)


def test_the_cache_lies_where_the_desktop_standard_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.cache_directory() == tmp_path / ".cache/dcqfa_ros"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert paths.cache_directory() == tmp_path / ".cache/dcqfa_ros"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert paths.cache_directory() == tmp_path / "cache/dcqfa_ros"
