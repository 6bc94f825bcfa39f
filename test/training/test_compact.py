"""A packed supernet computes what the whole one does, and is refused where its full-precision policy is another one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from training import graph_weights
from training.checkpoint import CHECKPOINT, CheckpointError, load_checkpoint, save_checkpoint
from training.compact import COMPACT, CompactError, pack
from training.config import override
from training.run import CHANGEABLE
from training.supernet import SupernetTrainer
from training.supernet_checkpoint import load_supernet
from training.warm_start import state_sha256

SHIPPED = Path(__file__).parents[2] / "models" / "pusht_keypoints_supernet"


@pytest.fixture
def packed(supernet_run: Path, tmp_path: Path) -> Path:
    pack(supernet_run / CHECKPOINT, tmp_path / "small" / CHECKPOINT)
    return tmp_path / "small"


def test_packed_weights_differ_by_at_most_half_a_code(supernet_run: Path, packed: Path) -> None:
    whole, small = (load_supernet(path).network.state_dict() for path in (supernet_run, packed))
    scales = load_checkpoint(packed / CHECKPOINT)[COMPACT]["scales"]
    assert whole.keys() == small.keys()
    for name, tensor in whole.items():
        if name in scales:
            assert ((tensor - small[name]).abs() <= 0.5001 * scales[name][:, None] + 1e-7).all(), name
        else:
            assert torch.equal(tensor, small[name]), name


def test_the_whole_checkpoint_is_left_alone_and_moments_are_dropped(supernet_run: Path, packed: Path) -> None:
    assert "optimizer" in load_checkpoint(supernet_run / CHECKPOINT)
    payload = load_checkpoint(packed / CHECKPOINT)
    assert not {"model", "ema", "optimizer"} & payload.keys()
    assert (packed / CHECKPOINT).stat().st_size < 0.5 * (supernet_run / CHECKPOINT).stat().st_size


def test_packing_a_plain_policy_is_refused(trained_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CompactError, match="holds no whole supernet"):
        pack(trained_run / CHECKPOINT, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_another_full_precision_policy_is_refused(packed: Path) -> None:
    payload = load_checkpoint(packed / CHECKPOINT)
    payload.pop("format")
    save_checkpoint(packed / CHECKPOINT, payload | {"teacher_sha256": "0" * 64})
    with pytest.raises(CompactError, match="another full-precision policy"):
        load_supernet(packed)


def test_the_shipped_supernet_is_the_same_on_processors_that_solve_for_its_teacher_to_other_last_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = load_supernet(SHIPPED)
    solve = graph_weights.solve_time_position
    monkeypatch.setattr(
        graph_weights, "solve_time_position", lambda *given: torch.nextafter(solve(*given), torch.tensor(torch.inf))
    )
    elsewhere = load_supernet(SHIPPED)
    assert state_sha256(elsewhere.network.state_dict()) == state_sha256(here.network.state_dict())


def test_damaged_codes_are_refused_by_file(packed: Path) -> None:
    payload = load_checkpoint(packed / CHECKPOINT)
    payload.pop("format")
    data = payload[COMPACT]["codes"]["data"]
    data[len(data) // 2 :] = 0
    save_checkpoint(packed / CHECKPOINT, payload)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: its compact weights"):
        load_supernet(packed)


def test_the_command_reports_what_it_wrote(dcqfa: list[str], supernet_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [*dcqfa, "pack", str(supernet_run), "--out", str(out), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {
        "file": str(out / CHECKPOINT),
        "bytes": (out / CHECKPOINT).stat().st_size,
    }


def test_training_goes_on_from_a_packed_supernet(supernet_run: Path, packed: Path, tmp_path: Path) -> None:
    config = load_supernet(supernet_run).meaning.config
    steps = config.run.steps
    longer = override(config, run={"steps": steps + 1})
    trainer = SupernetTrainer(longer, packed, change=["run.steps"])
    assert trainer.step == steps
    before = trainer.ema.state_dict()["blocks.0.fc1.weight"].clone()
    assert trainer.run()
    assert trainer.step == steps + 1
    assert not torch.equal(before, trainer.ema.state_dict()["blocks.0.fc1.weight"])


def test_another_sandwich_is_refused_unless_asked_for_and_then_recorded(
    supernet_run: Path, packed: Path, tmp_path: Path
) -> None:
    config = load_supernet(supernet_run).meaning.config
    assert config.supernet is not None
    sandwich = config.supernet.sandwich.model_copy(update={"sampled": 1, "low_weight": 2.0})
    other = config.model_copy(update={"supernet": config.supernet.model_copy(update={"sandwich": sandwich})})
    folder = shutil.copytree(packed, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"differs in supernet\.sandwich\).*--change-sandwich permits another"):
        SupernetTrainer(other, folder)
    trainer = SupernetTrainer(other, folder, change=["supernet.sandwich"])
    assert set(trainer.changed) == {
        "supernet.sandwich.sampled 2 -> 1",
        "supernet.sandwich.low_weight 1.0 -> 2.0",
    }
    trainer = SupernetTrainer(override(other, run={"steps": trainer.step + 1}), folder, change=tuple(CHANGEABLE))
    assert trainer.run()
    again = SupernetTrainer(trainer.config, folder)
    assert set(trainer.changed) == set(again.history[-1].changed) and not again.history[0].changed
    with pytest.raises(ValueError, match=r"change: expected some of run\.steps, .*supernet\.tables, got run\.batch"):
        SupernetTrainer(trainer.config, folder, change=["run.batch"])
    members, _ = trainer.members(torch.Generator().manual_seed(0))
    assert [member.weight for member in members] == [1.0, 2.0, 1.0, 1.0]
