from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.compare.config import CompareError
from training.compare.store import CellStore, differing

KEY = {"identity": {"weights": "a", "seed": 0}, "protocol": {"simulator": {"pymunk": "6"}, "stress": {"noise": 0.0}}}


def kept(path: Path) -> dict[int, float]:
    store = CellStore(path, KEY)
    return {seed: store[seed][0] for seed in range(100) if seed in store}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), blocks=st.integers(1, 4))
def test_whatever_happens_to_the_file_only_whole_unaltered_blocks_are_read(data: Any, blocks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells/standard/full.jsonl"
        store = CellStore(path, KEY)
        for block in range(blocks):
            seeds = [10 * block, 10 * block + 1]
            store.add(seeds, [block / 10, 0.5], [300, 20], 1.0)
        whole, content = kept(path), bytearray(path.read_bytes())
        head = content.index(b"\n") + 1
        if data.draw(st.booleans()):
            del content[data.draw(st.integers(head, len(content))) :]  # a kill while writing
        else:
            place = data.draw(st.integers(head, len(content) - 1))
            content[place] ^= 1 << data.draw(st.integers(0, 6))
        path.write_bytes(content)
        left = kept(path)
        assert left.items() <= whole.items()
        assert len(whole) - len(left) in range(0, 2 * blocks + 1, 2)  # whole blocks
        CellStore(path, KEY).add([98], [1.0], [5], 1.0)  # the file still grows
        assert kept(path) == left | {98: 1.0}


@pytest.mark.parametrize(
    ("section", "field", "value", "named"),
    [
        ("identity", "weights", "b", "identity.weights"),
        ("identity", "seed", 1, "identity.seed"),
        ("protocol", "simulator", {"pymunk": "7"}, "protocol.simulator.pymunk"),
        ("protocol", "stress", {"noise": 4.0}, "protocol.stress.noise"),
    ],
)
def test_results_of_something_else_are_refused_by_field_and_left_alone(
    tmp_path: Path, section: str, field: str, value: Any, named: str
) -> None:
    path = tmp_path / "full.jsonl"
    CellStore(path, KEY).add([1], [0.5], [9], 1.0)
    before = path.read_bytes()
    other = KEY | {section: {**KEY[section], field: value}}
    with pytest.raises(CompareError, match=named):
        CellStore(path, other)
    assert path.read_bytes() == before


def test_a_score_out_of_range_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = CellStore(tmp_path / "a.jsonl", KEY)
    for scores in ([1.5], [float("nan")]):
        with pytest.raises(ValueError, match="score"):
            store.add([1], scores, [9], 1.0)
    with pytest.raises(ValueError, match="seeds"):
        store.add([1, 2], [0.5], [9], 1.0)
    assert not store.path.exists()


def test_an_empty_file_takes_blocks_as_if_there_was_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    store = CellStore(path, KEY)
    store.add([1], [0.5], [9], 1.0)
    store.add([2], [0.25], [9], 1.0)
    assert kept(path) == {1: 0.5, 2: 0.25}


def test_versions_of_engines_are_kept_block_by_block(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for seed, engines in ((1, {"onnxruntime": "1"}), (2, {"onnxruntime": "2", "torch": "3"}), (3, None), (4, None)):
        CellStore(path, KEY).add([seed], [0.5], [9], 1.0, engines)
    store = CellStore(path, KEY)
    assert store.engines([1]) == {"onnxruntime": ["1"]}
    assert store.engines([1, 2]) == {"onnxruntime": ["1", "2"], "torch": ["not recorded", "3"]}
    assert store.engines([1, 3]) == {"onnxruntime": ["1", "not recorded"]}
    assert store.engines([3, 4]) is None
    store.add([1], [0.5], [9], 1.0)  # played again
    assert store.engines([1]) is None


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("hello\n")
    with pytest.raises(CompareError, match="not a file of scores"):
        CellStore(path, KEY)


def test_differing_names_every_field() -> None:
    there, here = {"a": 1, "b": {"c": [1, 2]}}, {"b": {"c": [1, 3]}, "d": None}
    assert [field for field, _, _ in differing(there, here)] == ["a", "b.c"]
