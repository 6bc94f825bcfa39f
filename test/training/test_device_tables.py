"""Tables of a training configuration are found, judged and told apart before the first step."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.checkpoint import load_checkpoint
from training.config import TrainConfig
from training.lut import LookUpTable, TableError, load_table, save_table
from training.sandwich import search_space
from training.subnet import Precision
from training.supernet import SupernetTrainer
from training.tables_at_hand import DeviceTables, device_tables

Config = Callable[..., TrainConfig]


def read(config: TrainConfig) -> DeviceTables:
    return device_tables(config, search_space(config))


@pytest.fixture
def table(supernet_files: Any) -> LookUpTable:
    return load_table(supernet_files.tables[0])


@pytest.fixture
def with_table(supernet_config: Config, tmp_path: Path) -> Callable[[LookUpTable], TrainConfig]:
    """Return a factory of configurations of one device, ``tmp_path/device.json``."""

    def make(table: LookUpTable) -> TrainConfig:
        save_table(tmp_path / "device.json", table)
        return supernet_config(supernet={"tables": [str(tmp_path / "device.json")]})

    return make


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.FP8])
@pytest.mark.parametrize("part", ["forms", "fixed"])
def test_a_table_without_a_precision_of_the_space_is_refused_by_file(
    table: LookUpTable, with_table: Any, tmp_path: Path, part: str, precision: Precision
) -> None:
    kept = tuple(entry for entry in getattr(table, part) if entry.precision is not precision)
    config = with_table(table.model_copy(update={part: kept}))
    with pytest.raises(
        TableError, match=rf"{tmp_path / 'device.json'}: table orin.*: .*{precision.value}.*dcqfa profile"
    ):
        SupernetTrainer(config, tmp_path / "run")


def test_a_table_without_a_block_is_refused_by_file(table: LookUpTable, with_table: Any, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"device\.json: table orin.*: no entry for block type"):
        read(with_table(table.model_copy(update={"blocks": table.blocks[1:]})))


def test_a_table_whose_networks_take_no_time_is_refused_by_file_and_field(
    table: LookUpTable, with_table: Any, tmp_path: Path
) -> None:
    idle = {"step_ms": 0.0, "kv_ms": 0.0}
    blocks = tuple(entry.model_copy(update=idle) for entry in table.blocks)
    fixed = tuple(entry.model_copy(update={"encoder_ms": 0.0, "step_fixed_ms": 0.0}) for entry in table.fixed)
    read(with_table(table.model_copy(update={"blocks": blocks})))  # what lies outside the blocks takes time
    with pytest.raises(
        TableError, match=r"device\.json: blocks\.step_ms, .*takes 0 ms per chunk, expected more than 0"
    ):
        read(with_table(table.model_copy(update={"blocks": blocks, "fixed": fixed})))


def test_the_hash_of_the_tables_does_not_depend_on_where_they_lie(
    supernet_config: Config, supernet_files: Any, tmp_path: Path
) -> None:
    before = read(supernet_config())
    together = b"".join(path.read_bytes() for path in sorted(supernet_files.tables))
    assert before.sha256 == hashlib.sha256(together).hexdigest()
    moved = []
    for folder, path in zip(("z", "a"), sorted(supernet_files.tables), strict=True):
        (tmp_path / folder).mkdir()
        moved.append(shutil.copy(path, tmp_path / folder / path.name))
    after = read(supernet_config(supernet={"tables": [str(path) for path in reversed(moved)]}))
    assert after.sha256 == before.sha256 and list(after.costs) == list(before.costs) == ["orin", "slower"]


def test_a_checkpoint_tells_which_table_was_measured_anew(
    supernet_config: Config, supernet_files: Any, supernet_run: Path, tmp_path: Path
) -> None:
    tables = [shutil.copy(path, tmp_path / path.name) for path in supernet_files.tables]
    slower = load_table(tables[1])
    save_table(tables[1], slower.model_copy(update={"workspace_bytes": slower.workspace_bytes + 1}))
    payload = load_checkpoint(supernet_run / "checkpoint.pt")
    assert read(supernet_config()).as_in(payload) == {"orin": True, "slower": True}
    anew = read(supernet_config(supernet={"tables": [str(path) for path in tables]}))
    assert anew.as_in(payload) == {"orin": True, "slower": False}
    assert anew.as_in({"tables_sha256": "other"}) == {"orin": None, "slower": None}
    assert anew.as_in({}) == {"orin": True, "slower": True}  # of a version that kept no hash


def test_drawn_networks_of_one_step_are_logged_by_their_mean(supernet_config: Config, tmp_path: Path) -> None:
    trainer = SupernetTrainer(
        supernet_config(supernet={"sampler": {"stratified_share": 0.0, "batch": 8, "hidden": 16}}), tmp_path
    )
    losses: list[tuple[float, float]] = []
    original = trainer._member_step

    def member_step(member: Any, *rest: Any) -> tuple[float, float, float]:
        row = original(member, *rest)
        if member.label == "sampled":
            losses.append(row[:2])
        return row

    trainer._member_step = member_step  # type: ignore[method-assign]
    record = trainer.train_step()
    (total, task), (other_total, other_task) = losses
    assert total != other_total
    assert record["loss/sampled"] == pytest.approx((total + other_total) / 2)
    assert record["task/sampled"] == pytest.approx((task + other_task) / 2)
    (device,) = (value for name, value in record.items() if name.startswith("device_loss/"))
    assert device == record["loss/sampled"]
