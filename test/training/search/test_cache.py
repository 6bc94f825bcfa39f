from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.search.cache import CacheError, DistanceCache

KEY = {"network": "a", "samples": 8}


def filled(folder: Path) -> Path:
    cache = DistanceCache(folder, KEY)
    for number in range(5):
        cache.add(f"net{number}", 0.1 * number)
    cache.close()
    return cache.path


def test_distances_are_there_again_in_their_order(tmp_path: Path) -> None:
    filled(tmp_path)
    cache = DistanceCache(tmp_path, KEY)
    assert cache.items() == [(f"net{number}", 0.1 * number) for number in range(5)]
    assert cache.dropped == 0 and "net3" in cache and cache["net3"] == pytest.approx(0.3)
    assert "net9" not in cache and len(cache) == 5


def test_distances_of_other_networks_or_samples_are_kept_apart(tmp_path: Path) -> None:
    path = filled(tmp_path)
    other = DistanceCache(tmp_path, KEY | {"network": "b"})
    assert len(other) == 0
    other.close()
    other.path.write_bytes(path.read_bytes())  # a file under a wrong name
    assert len(DistanceCache(tmp_path, KEY | {"network": "b"})) == 0
    assert len(DistanceCache(tmp_path, KEY, "scores")) == 0
    assert len(DistanceCache(tmp_path, KEY)) == 5


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_lines_are_dropped_and_never_trusted(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = filled(tmp_path_factory.mktemp("cache"))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    cache = DistanceCache(path.parent, KEY)
    good = {f"net{number}": 0.1 * number for number in range(5)}
    assert all(good[name] == value for name, value in cache.items())
    assert len(cache) >= 3  # a byte spoils at most two lines
    cache.add("later", 1.0)
    cache.close()
    again = DistanceCache(path.parent, KEY)
    assert again.dropped == 0 and dict(again.items()) == dict(cache.items())


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_file_that_ends_within_a_line_is_mended(tmp_path: Path, cut: int) -> None:
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    cache = DistanceCache(tmp_path, KEY)
    cache.add("later", 1.0)
    cache.close()
    names = [name for name, _ in DistanceCache(tmp_path, KEY).items()]
    assert names == [f"net{number}" for number in range(5 if cut == 1 else 4)] + ["later"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_is_no_distance_is_refused_and_not_kept(tmp_path: Path, value: float) -> None:
    cache = DistanceCache(tmp_path, KEY)
    with pytest.raises(ValueError, match="distance of net: expected a finite number from 0 on"):
        cache.add("net", value)
    cache.close()
    assert len(DistanceCache(tmp_path, KEY)) == 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"file/distances-.*give another --out"):
        DistanceCache(tmp_path / "file", KEY)


def test_the_file_says_what_it_belongs_to(tmp_path: Path) -> None:
    assert json.loads(filled(tmp_path).read_text().splitlines()[0])["key"] == KEY


def test_two_searches_cannot_use_one_file_at_once(tmp_path: Path) -> None:
    first = DistanceCache(tmp_path, KEY)
    with pytest.raises(CacheError, match="another search is using it; wait for its end, or give another --out"):
        DistanceCache(tmp_path, KEY)
    first.add("net", 1)
    first.close()
    assert DistanceCache(tmp_path, KEY).items() == [("net", 1.0)]


def test_a_full_disk_is_told_and_what_was_kept_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DistanceCache(tmp_path, KEY)
    cache.add("net", 1.0)
    monkeypatch.setattr(cache, "_file", Path("/dev/full").open("w"))  # noqa: SIM115
    with pytest.raises(CacheError, match=r"cannot be kept .*make room"):
        cache.add("other", 2.0)
    with pytest.raises(CacheError, match=r"cannot be kept .*make room"):
        cache.close()
    assert DistanceCache(tmp_path, KEY).items() == [("net", 1.0)]
