"""What the package ships is found from any folder."""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

import pytest

from training.checkpoint import CheckpointError
from training.config import load_config, override
from training.search.options import add_search_options, check_search_options
from training.shipped import DEFAULT_RUN, default_run, policy_at_hand
from training.supernet import SupernetTrainer

ROOT = Path(__file__).parents[2]
TABLES = ("cpu_1_thread", "cpu_2_threads", "orin_nx_16gb")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DCQFA_MODELS", raising=False)


def test_the_default_run_is_the_one_trained_here_or_else_the_shipped_one_which_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert default_run().samefile(ROOT / "models" / DEFAULT_RUN.name)
    assert capsys.readouterr().err.startswith(f"{DEFAULT_RUN}: no such run; taking the shipped supernet ")
    DEFAULT_RUN.mkdir(parents=True)
    assert default_run() != DEFAULT_RUN  # a folder without a checkpoint is no run
    capsys.readouterr()
    (DEFAULT_RUN / "checkpoint.pt").touch()
    assert (default_run(), capsys.readouterr().err) == (DEFAULT_RUN, "")


def test_a_search_takes_the_default_run_only_where_none_is_given() -> None:
    parser = argparse.ArgumentParser()
    add_search_options(parser, population=8, generations=2, seeds=1)
    none, given = parser.parse_args([]), parser.parse_args(["runs/mine"])
    for args in (none, given):
        check_search_options(args)
    assert none.run.samefile(ROOT / "models" / DEFAULT_RUN.name)
    assert given.run == Path("runs/mine")


def test_a_policy_is_found_as_written_or_among_the_bundles_where_it_is_written_as_one(tmp_path: Path) -> None:
    assert policy_at_hand("models/pusht_keypoints").samefile(ROOT / "models/pusht_keypoints")
    assert policy_at_hand("runs/pusht_keypoints") == Path("runs/pusht_keypoints")  # another policy of that name
    assert policy_at_hand("models/absent") == Path("models/absent")
    Path("models/pusht_keypoints").mkdir(parents=True)
    assert policy_at_hand("models/pusht_keypoints") == Path("models/pusht_keypoints")


def test_the_shipped_configuration_goes_on_from_a_copy_of_the_shipped_supernet_in_any_folder(
    published_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "models" / DEFAULT_RUN.name, tmp_path / "copy")
    config = override(
        load_config(ROOT / "config/training/pusht_keypoints_supernet.yaml"),
        data={"path": str(published_data)},
        run={"steps": 15_001, "compile": False},
    )
    with pytest.raises(CheckpointError, match="--change-length permits another"):
        SupernetTrainer(config, tmp_path / "copy")
    trainer = SupernetTrainer(config, tmp_path / "copy", change=["run.steps", "supernet.tables"])
    assert trainer.step == 15_000
    files = [(ROOT / "config/tables" / f"{name}.json").read_bytes() for name in TABLES]
    assert trainer.payload()["tables_sha256"] == hashlib.sha256(b"".join(files)).hexdigest()
    assert list(trainer.payload()["table_files"]) == list(TABLES)
