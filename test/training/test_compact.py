"""A packed supernet computes what the whole one does, and is refused where its full-precision policy is another one."""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from test.training.conftest import SupernetFiles
from training import graph_weights
from training.checkpoint import CHECKPOINT, CheckpointError, load_checkpoint, save_checkpoint
from training.compact import COMPACT, OF_START, SQUEEZED, CompactError, _expand, averaged_state, pack, sampler_state
from training.config import override
from training.run import CHANGEABLE
from training.supernet import SupernetTrainer
from training.supernet_checkpoint import load_supernet
from training.warm_start import state_sha256


def scales_of(folder: Path) -> dict[str, torch.Tensor]:
    scales: dict[str, torch.Tensor] = _expand(load_checkpoint(folder / CHECKPOINT)[COMPACT][SQUEEZED])["scales"]
    return scales


def written(folder: Path, payload: dict[str, Any]) -> Path:
    """``payload`` as the checkpoint of ``folder``."""
    save_checkpoint(folder / CHECKPOINT, {key: value for key, value in payload.items() if key != "format"})
    return folder


SHIPPED = Path(__file__).parents[2] / "models" / "pusht_keypoints_supernet"


@pytest.fixture
def packed(supernet_run: Path, tmp_path: Path) -> Path:
    pack(supernet_run / CHECKPOINT, tmp_path / "small" / CHECKPOINT)
    return tmp_path / "small"


def test_packed_weights_differ_by_at_most_half_a_code(supernet_run: Path, packed: Path) -> None:
    whole, small = (load_supernet(path).network.state_dict() for path in (supernet_run, packed))
    scales = scales_of(packed)
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


def test_only_the_name_of_the_demonstrations_is_packed(supernet_run: Path, packed: Path) -> None:
    whole, small = (load_checkpoint(folder / CHECKPOINT)["config"]["data"] for folder in (supernet_run, packed))
    assert Path(whole["path"]).is_absolute() and Path(whole["path"]).name == small["path"]
    assert whole | {"path": ""} == small | {"path": ""}


def test_a_run_that_has_nothing_to_do_leaves_a_packed_checkpoint_alone(
    supernet_run: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, names = (packed / CHECKPOINT).read_bytes(), {file.name for file in packed.iterdir()}
    trainer = SupernetTrainer(load_supernet(supernet_run).meaning.config, packed)
    assert trainer.run()
    assert (packed / CHECKPOINT).read_bytes() == before
    assert {file.name for file in packed.iterdir()} - {".lock"} == names
    assert "packed" not in capsys.readouterr().err


def test_packing_a_plain_policy_is_refused(trained_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CompactError, match="holds no supernet"):
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


@pytest.fixture
def moved(supernet_run: Path, tmp_path: Path) -> Path:
    """A run whose weights have moved a little from those of ``supernet_run``, as a distillation's from its start."""
    payload = load_checkpoint(supernet_run / CHECKPOINT)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in payload["ema"].items():
        if tensor.ndim == 2:
            payload["ema"][name] = tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
    return written(tmp_path / "moved", payload)


def test_against_its_start_a_distillation_is_rounded_less(moved: Path, packed: Path, tmp_path: Path) -> None:
    alone, against = tmp_path / "alone", tmp_path / "against"
    pack(moved / CHECKPOINT, alone / CHECKPOINT)
    pack(moved / CHECKPOINT, against / CHECKPOINT, against=packed)
    whole, plain, small = (load_supernet(path).network.state_dict() for path in (moved, alone, against))
    scales = scales_of(against)
    for name, tensor in whole.items():
        bound = 0.5001 * scales[name][:, None] + 1e-7 if name in scales else torch.zeros(())
        assert ((tensor - small[name]).abs() <= bound).all(), name
    errors = [sum((whole[name] - other[name]).square().sum() for name in scales) for other in (plain, small)]
    assert errors[1] < 0.9 * errors[0]  # the start itself is near the policy here


def test_a_sampler_that_a_distillation_left_alone_is_read_from_its_start(
    moved: Path, packed: Path, tmp_path: Path
) -> None:
    alone, against = tmp_path / "alone" / CHECKPOINT, tmp_path / "against" / CHECKPOINT
    pack(moved / CHECKPOINT, alone)
    pack(moved / CHECKPOINT, against, against=packed)
    assert OF_START in load_checkpoint(against)["sampler"] and OF_START not in load_checkpoint(alone)["sampler"]
    one, other = (sampler_state(file, load_checkpoint(file), {}) for file in (alone, against))
    assert one.keys() == other.keys() and one["updates"] == other["updates"]
    for part in ("averaged", "predictor"):
        for name, value in one[part].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[part][name])), name
    twice = tmp_path / "twice" / CHECKPOINT
    pack(against, twice)
    assert OF_START not in load_checkpoint(twice)["sampler"]

    payload = load_checkpoint(moved / CHECKPOINT)
    payload["sampler"]["updates"] += 1
    written(moved, payload)
    pack(moved / CHECKPOINT, alone, against=packed)
    assert OF_START not in load_checkpoint(alone)["sampler"]
    written(packed, load_checkpoint(packed / CHECKPOINT) | {"sampler": payload["sampler"]})
    with pytest.raises(CompactError, match=r"sampler is that of .*small, which is missing or holds another"):
        sampler_state(against, load_checkpoint(against), {})


def test_what_a_supernet_was_packed_against_is_recognised_by_its_weights(
    moved: Path, packed: Path, tmp_path: Path
) -> None:
    against = tmp_path / "against"
    pack(moved / CHECKPOINT, against / CHECKPOINT, against=packed)
    pack(moved / CHECKPOINT, packed / CHECKPOINT)  # in the place of the other
    with pytest.raises(CompactError, match=r"packed against .*small, which holds other weights now; restore it"):
        load_supernet(against)
    (packed / CHECKPOINT).unlink()
    with pytest.raises(CompactError, match=r"packed against .*small, which is missing; restore it"):
        load_supernet(against)


def test_what_a_supernet_is_packed_against_cannot_be_replaced_by_it(moved: Path, packed: Path, tmp_path: Path) -> None:
    before = (packed / CHECKPOINT).read_bytes()
    with pytest.raises(CompactError, match="would replace what it is packed against"):
        pack(moved / CHECKPOINT, packed / CHECKPOINT, against=packed)
    chain = tmp_path / "chain"
    pack(moved / CHECKPOINT, chain / CHECKPOINT, against=packed / CHECKPOINT)
    with pytest.raises(CompactError, match="would replace what it is packed against"):
        pack(moved / CHECKPOINT, packed / CHECKPOINT, against=chain)
    assert (packed / CHECKPOINT).read_bytes() == before
    load_supernet(chain)


def test_a_supernet_is_found_beside_the_one_packed_against_it(moved: Path, packed: Path, tmp_path: Path) -> None:
    pack(moved / CHECKPOINT, tmp_path / "against" / CHECKPOINT, against=packed)
    elsewhere = tmp_path / "elsewhere"
    for name in ("against", "small"):
        shutil.move(tmp_path / name, elsewhere / name)
    load_supernet(elsewhere / "against")


def test_a_distillations_channels_are_in_the_order_of_its_start(
    moved: Path, packed: Path, supernet_files: SupernetFiles, tmp_path: Path
) -> None:
    """Its start may have been ordered by the policy before that was rounded."""
    start = load_checkpoint(packed / CHECKPOINT)
    orders = start[COMPACT]["orders"]
    orders[0]["channels"] = orders[0]["channels"].flip(0)
    written(packed, start)
    payload = load_checkpoint(moved / CHECKPOINT)
    payload["config"]["distill"] = {"start": str(packed)}
    payload["start_sha256"] = state_sha256(load_supernet(packed).network.state_dict())
    written(moved, payload)
    small = tmp_path / "distilled"
    pack(moved / CHECKPOINT, small / CHECKPOINT)
    assert torch.equal(load_checkpoint(small / CHECKPOINT)[COMPACT]["orders"][0]["channels"], orders[0]["channels"])
    orders[0]["channels"] = orders[0]["channels"].flip(0)
    written(packed, start)
    for _ in range(2):  # another one in its place, then none
        with pytest.raises(CompactError, match=r"started from \(.*small\) is missing or holds other weights"):
            pack(moved / CHECKPOINT, tmp_path / "x.pt")
        shutil.rmtree(packed, ignore_errors=True)
    moved.rename(packed)  # nor is it its own start
    with pytest.raises(CompactError, match=r"started from \(.*small\) is missing or holds other weights"):
        pack(packed / CHECKPOINT, tmp_path / "x.pt")


def test_a_folder_of_the_name_of_what_it_is_packed_against_is_read(moved: Path, packed: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / packed.name
    pack(moved / CHECKPOINT, elsewhere / CHECKPOINT, against=packed)
    assert OF_START in load_checkpoint(elsewhere / CHECKPOINT)["sampler"]
    assert load_supernet(elsewhere).sampler({})["averaged"]


def test_the_policy_that_the_result_needs_is_not_replaced(supernet_run: Path, tmp_path: Path) -> None:
    payload = load_checkpoint(supernet_run / CHECKPOINT)
    policy = tmp_path / "policy"
    shutil.copytree(payload["config"]["supernet"]["warm_start"], policy)
    payload["config"]["supernet"]["warm_start"] = str(policy)
    run = written(tmp_path / "run", payload)
    before = sorted(file.name for file in policy.iterdir())
    with pytest.raises(CompactError, match="would replace what it is packed against"):
        pack(run / CHECKPOINT, policy / CHECKPOINT)
    assert sorted(file.name for file in policy.iterdir()) == before


def test_a_sampler_of_a_whole_start_comes_without_its_moments(moved: Path, supernet_run: Path, tmp_path: Path) -> None:
    against = tmp_path / "against" / CHECKPOINT
    payload = load_checkpoint(moved / CHECKPOINT)
    pack(moved / CHECKPOINT, against, against=supernet_run)
    assert OF_START in load_checkpoint(against)["sampler"] and "optimizer" in payload["sampler"]
    assert "optimizer" not in sampler_state(against, load_checkpoint(against), {})


def test_a_supernet_of_another_policy_is_refused_to_pack_against(moved: Path, packed: Path, tmp_path: Path) -> None:
    written(packed, load_checkpoint(packed / CHECKPOINT) | {"teacher_sha256": "0" * 64})
    with pytest.raises(CompactError, match="no supernet of the same full-precision policy"):
        pack(moved / CHECKPOINT, tmp_path / "x.pt", against=packed)
    assert not (tmp_path / "x.pt").exists()


def rounded(teacher: Path, folder: Path, factor: float = 1.0) -> Path:
    payload = load_checkpoint(teacher / CHECKPOINT)
    payload["ema"] = {name: factor * tensor.half().float() for name, tensor in payload["ema"].items()}
    return written(folder, payload)


def test_a_packed_supernet_goes_over_to_the_rounded_policy(
    supernet_files: SupernetFiles, packed: Path, tmp_path: Path
) -> None:
    policy = rounded(supernet_files.teacher, tmp_path / "rounded")
    again = tmp_path / "again"
    pack(packed / CHECKPOINT, again / CHECKPOINT, policy=policy)
    before, after = load_supernet(packed), load_supernet(again)
    assert after.teacher_sha256 != before.teacher_sha256
    for name, tensor in before.network.state_dict().items():
        change = (after.network.state_dict()[name] - tensor).norm()
        assert change <= 0.01 * tensor.norm(), name


def test_another_policy_than_the_rounded_one_is_refused(
    supernet_files: SupernetFiles, packed: Path, tmp_path: Path
) -> None:
    policy = rounded(supernet_files.teacher, tmp_path / "other", factor=1.01)
    with pytest.raises(CompactError, match=r"is not that of the policy the supernet started from, rounded"):
        pack(packed / CHECKPOINT, tmp_path / "x.pt", policy=policy)
    assert not (tmp_path / "x.pt").exists()


def test_packing_twice_keeps_the_weights_within_a_code_and_the_sampler(packed: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice"
    pack(packed / CHECKPOINT, twice / CHECKPOINT)
    once, again = load_supernet(packed), load_supernet(twice)
    scales = scales_of(packed)
    for name, tensor in once.network.state_dict().items():
        change = (again.network.state_dict()[name] - tensor).abs()
        bound = 1e-3 * scales[name][:, None] + 1e-6 * tensor.abs() if name in scales else torch.zeros(())
        assert (change <= bound).all(), name
    learned = [
        sampler_state(folder / CHECKPOINT, load_checkpoint(folder / CHECKPOINT), {}) for folder in (packed, twice)
    ]
    assert learned[0].keys() == learned[1].keys()
    assert torch.equal(learned[0]["predictor"]["gram"], learned[1]["predictor"]["gram"])


def test_a_checkpoint_packed_before_parts_were_squeezed_is_read_alike(packed: Path, tmp_path: Path) -> None:
    payload = load_checkpoint(packed / CHECKPOINT)
    config = load_supernet(packed).meaning.config
    new = averaged_state(packed / CHECKPOINT, payload, config)
    content = dict(payload[COMPACT])
    codes = lzma.decompress(content["codes"]["data"].numpy().tobytes())
    content["codes"]["data"] = torch.frombuffer(bytearray(zlib.compress(codes)), dtype=torch.uint8)
    content |= _expand(content.pop(SQUEEZED))
    old = averaged_state(packed / CHECKPOINT, payload | {COMPACT: content}, config)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in new)
    plain = payload | {"sampler": _expand(payload["sampler"][SQUEEZED])}
    one, other = (sampler_state(packed / CHECKPOINT, given, {})["averaged"] for given in (plain, payload))
    assert one and all(torch.equal(one[name], other[name]) for name in one)


def test_a_network_trained_alone_can_be_packed(supernet_run: Path, tmp_path: Path) -> None:
    payload = load_checkpoint(supernet_run / CHECKPOINT)
    del payload["sampler"]
    alone, small = written(tmp_path / "alone", payload), tmp_path / "small"
    pack(alone / CHECKPOINT, small / CHECKPOINT)
    whole, packed = (load_supernet(path).network.state_dict() for path in (alone, small))
    assert all((whole[name] - packed[name]).norm() <= 0.05 * whole[name].norm() for name in whole)


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


def test_training_goes_on_from_a_packed_supernet_which_it_says_to_replace(
    supernet_run: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_supernet(supernet_run).meaning.config
    steps = config.run.steps
    longer = override(config, run={"steps": steps + 1})
    trainer = SupernetTrainer(longer, packed, change=["run.steps"])
    assert trainer.step == steps
    before = trainer.ema.state_dict()["blocks.0.fc1.weight"].clone()
    assert trainer.run()
    assert trainer.step == steps + 1
    assert not torch.equal(before, trainer.ema.state_dict()["blocks.0.fc1.weight"])
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and f"{packed / CHECKPOINT}: is packed; the next save replaces it" in warnings[0]
    assert "optimizer" in load_checkpoint(packed / CHECKPOINT) and not trainer.packed


def test_another_sandwich_is_refused_unless_asked_for_and_then_recorded(
    supernet_run: Path, packed: Path, tmp_path: Path
) -> None:
    config = load_supernet(supernet_run).meaning.config
    assert config.supernet is not None
    sandwich = config.supernet.sandwich.model_copy(update={"sampled": 1, "low_weight": 2.0})
    sampler = config.supernet.sampler.model_copy(update={"stratified_share": 0.9})
    section = config.supernet.model_copy(update={"sandwich": sandwich, "sampler": sampler})
    other = config.model_copy(update={"supernet": section})
    folder = shutil.copytree(packed, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"differs in supernet\.sampler\.stratified_share, .*--change-sandwich"):
        SupernetTrainer(other, folder)
    asked = [field for field, option in CHANGEABLE.items() if option == "--change-sandwich"]
    trainer = SupernetTrainer(other, folder, change=asked)
    assert set(trainer.changed) == {
        "supernet.sandwich.sampled 2 -> 1",
        "supernet.sandwich.low_weight 1.0 -> 2.0",
        f"supernet.sampler.stratified_share {config.supernet.sampler.stratified_share} -> 0.9",
    }
    trainer = SupernetTrainer(override(other, run={"steps": trainer.step + 1}), folder, change=tuple(CHANGEABLE))
    assert trainer.run()
    again = SupernetTrainer(trainer.config, folder)
    assert set(trainer.changed) == set(again.history[-1].changed) and not again.history[0].changed
    with pytest.raises(ValueError, match=r"change: expected some of run\.steps, .*supernet\.tables, got run\.batch"):
        SupernetTrainer(trainer.config, folder, change=["run.batch"])
    members, _ = trainer.members(torch.Generator().manual_seed(0))
    assert [member.weight for member in members] == [1.0, 2.0, 1.0, 1.0]
