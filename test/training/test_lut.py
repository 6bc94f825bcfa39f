"""Look-up tables as files: exact round trips, and errors that say what is missing and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.files import WriteError
from training.lut import LookUpTable, TableError, load_table, merged, parse_table, save_table, table_json
from training.modelled_tables import ORIN_NX_16GB, modelled_table
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.subnet import Layer, Precision

CONFIG = SpaceConfig(min_depth={"decoder": 2}, head_ratios=(0.5, 1.0), mlp_ratios=(0.5, 1.0))


def space(tokens: int, **changes: Any) -> SearchSpace:
    shape = diffusion_policy_t_shape(DiffusionPolicyTConfig(), tokens)
    return SearchSpace(shape, CONFIG.model_copy(update=changes))


@pytest.fixture
def table() -> LookUpTable:
    return modelled_table(ORIN_NX_16GB, space(9))


def test_a_table_survives_its_file_exactly(tmp_path: Path, table: LookUpTable) -> None:
    file = tmp_path / "tables" / "orin.json"
    save_table(file, table)
    assert load_table(file) == table
    assert file.read_bytes() == table_json(table)


def test_a_failed_write_leaves_the_old_table(
    tmp_path: Path, table: LookUpTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "table.json"
    save_table(file, table)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dcqfa_ros.atomic.os.fsync", full)
    with pytest.raises(WriteError, match=r"table\.json: cannot be written \(No space left on device\)"):
        save_table(file, table.model_copy(update={"threads": 2}))
    assert load_table(file) == table
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"absent\.json: cannot be read .*dcqfa profile"):
        load_table(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("threads",), 0, "t: threads: Input should be greater than or equal to 1"),
        (("blocks", 0, "step_ms"), -1.0, r"t: blocks\.0\.step_ms: "),
        (("blocks", 0, "step_ms"), "1", r"t: blocks\.0\.step_ms: "),
        (("forms", 0, "stored_bits"), 5, r"t: forms\.0\.stored_bits: "),
        (("colour",), "red", "t: colour: Extra inputs are not permitted"),
        (("schema_version",), 1, "t: schema_version: "),
    ],
)
def test_a_wrong_field_is_named(table: LookUpTable, path: tuple[Any, ...], value: object, message: str) -> None:
    document = json.loads(table_json(table))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(TableError, match=message):
        parse_table(json.dumps(document).encode(), "t")


def test_what_is_no_json_and_what_is_there_twice_is_refused(table: LookUpTable) -> None:
    with pytest.raises(TableError, match="t: "):
        parse_table(b"\xff{", "t")
    doubled = table.model_copy(update={"blocks": (*table.blocks, table.blocks[0])})
    with pytest.raises(TableError, match="t: blocks: an entry is there twice"):
        parse_table(table_json(doubled), "t")


def test_a_table_without_an_entry_of_the_space_says_which_and_what_to_do(table: LookUpTable) -> None:
    table.check(space(9))
    with pytest.raises(TableError, match=r"orin_nx_16gb: no fixed parts of 'diffusion_policy_t'.*8 tokens.*--model"):
        table.check(space(8))
    wider = space(9, head_ratios=(0.25, 1.0))
    with pytest.raises(TableError, match=r"no entry for block type 'decoder'.*9 tokens.*with 1 heads and 512 hidden"):
        table.check(wider)
    measured = table.model_copy(update={"modelled": False, "threads": 2})
    with pytest.raises(TableError, match="dcqfa profile --config CONFIG --threads 2"):
        measured.check(wider)
    no_bits = table.model_copy(update={"forms": tuple(form for form in table.forms if form.w != 4)})
    with pytest.raises(TableError, match="no precision w4a4"):
        no_bits.check(space(9))
    no_fp8 = table.model_copy(update={"forms": tuple(form for form in table.forms if form.precision != "fp8")})
    with pytest.raises(TableError, match="no precision fp8"):
        no_fp8.form(Precision.FP8, Layer(4, 1024, 8, 8))


def test_tables_of_one_device_merge(table: LookUpTable) -> None:
    both = merged([table, modelled_table(ORIN_NX_16GB, space(16))])
    both.check(space(9))
    both.check(space(16))
    assert both.forms == table.forms
    with pytest.raises(TableError, match="threads differs"):
        merged([table, both.model_copy(update={"threads": 4})])
    with pytest.raises(TableError, match="there twice"):
        merged([table, table])
