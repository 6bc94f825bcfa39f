from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcqfa_ros.errors import UserError
from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from training.checkpoint_engine import VariantError, open_checkpoint
from training.conditions import BudgetError
from training.config import ConfigError, TrainConfig
from training.draws import Phase
from training.locks import only_user
from training.losses.sqil import sqil_loss, state_saliency
from training.lut import TableError, load_table, save_table
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.run import TrainingError
from training.sandwich import HELD_OUT_SUBNETS, Member, search_space
from training.schedules import step_seed
from training.subnet import Precision, SpaceError, Subnet
from training.supernet import SupernetTrainer
from training.supernet_checkpoint import load_supernet
from training.trained import load_trained
from training.warm_start import WarmStartError

Config = Callable[..., TrainConfig]
Start = Callable[[Path], SupernetTrainer]
SANDWICH = {"largest_batch": 4, "low_batch": 8, "smallest_batch": 8, "sampled_batch": 6, "sampled": 2}


def assert_equal(first: Any, second: Any, where: str = "") -> None:
    """Compare nested checkpoints bit for bit."""
    if isinstance(first, Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}.{key}")
    else:
        assert first == second, where


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A nested state with tensors of its own."""
    return {
        k: v.clone() if isinstance(v, Tensor) else copied(v) if isinstance(v, dict) else v for k, v in state.items()
    }


def at_step(trainer: SupernetTrainer, step: int) -> tuple[list[Member], str]:
    """The members that the trainer, as it is, would train at ``step``."""
    trainer.step = step
    return trainer.members(torch.Generator().manual_seed(step_seed(trainer.config.run.seed, step)))


@pytest.fixture(scope="module")
def untrained(supernet_config: Config, tmp_path_factory: pytest.TempPathFactory) -> SupernetTrainer:
    """A trainer before its first step, with everything in its folder; not to be trained."""
    trainer = SupernetTrainer(supernet_config(), tmp_path_factory.mktemp("untrained") / "run")
    trainer.save()
    trainer.saliency()
    return trainer


@pytest.fixture
def start(supernet_config: Config, untrained: SupernetTrainer) -> Callable[[Path], SupernetTrainer]:
    """Return a function that makes a trainer before its first step in a new folder, without calibrating again."""

    def make(folder: Path) -> SupernetTrainer:
        shutil.copytree(untrained.folder, folder)
        return SupernetTrainer(supernet_config(), folder)

    return make


@pytest.fixture(scope="module")
def finished(supernet_config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """The folder and the log of a run that went to its end without interruption; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    records: list[dict[str, float]] = []
    assert SupernetTrainer(supernet_config(), folder).run(records.append)
    return folder, records


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    supernet_config: Config, start: Start, finished: tuple[Path, Any], tmp_path: Path, stop: int
) -> None:
    first = start(tmp_path / "run")
    for _ in range(stop):
        first.train_step()
    first.save()
    torch.rand(stop)  # what else draws from the global generator does not matter
    second = SupernetTrainer(supernet_config(), tmp_path / "run")
    assert second.step == stop
    assert_equal(second.payload(), first.payload())
    assert second.run()
    one, other = load_checkpoint(finished[0] / "checkpoint.pt"), load_checkpoint(second.checkpoint_path)
    assert [entry["step"] for entry in one.pop("history")] == [0]
    assert [entry["step"] for entry in other.pop("history")] == [stop]
    assert {"model", "ema", "optimizer", "sampler"} <= one.keys()
    assert_equal(one, other)


def test_a_run_in_bf16_resumes_bit_for_bit(supernet_config: Config, tmp_path: Path) -> None:
    whole = SupernetTrainer(supernet_config(run={"precision": "bf16"}), tmp_path)
    for step in range(4):
        if step == 2:
            whole.save()
        whole.train_step()
    second = SupernetTrainer(whole.config, tmp_path)
    assert second.step == 2
    for _ in range(2):
        second.train_step()
    assert_equal(second.payload(), whole.payload())


def test_ctrl_c_ends_the_step_and_keeps_a_checkpoint_from_which_the_run_goes_on(
    supernet_config: Config, start: Start, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    trainer = start(tmp_path / "run")

    def interrupt(record: dict[str, float]) -> None:
        if record["step"] == 2.0:
            os.kill(os.getpid(), signal.SIGINT)

    assert trainer.run(interrupt) is False
    assert 2 <= trainer.step < 6
    assert load_checkpoint(trainer.checkpoint_path)["step"] == trainer.step
    continued = SupernetTrainer(supernet_config(), tmp_path / "run")
    assert continued.step == trainer.step
    assert continued.run()
    one, other = load_checkpoint(finished[0] / "checkpoint.pt"), load_checkpoint(continued.checkpoint_path)
    for key in ("model", "ema", "optimizer", "sampler"):
        assert_equal(one[key], other[key], key)


def test_saliency_is_computed_once_per_data_and_teacher(
    supernet_config: Config, untrained: SupernetTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = untrained.saliency()
    assert sorted(weights.unique().tolist()) == [1.0, 2.0]
    assert float((weights == 2.0).float().mean()) == pytest.approx(0.2, abs=0.02)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("computed again")

    monkeypatch.setattr("training.supernet.compute_saliency", refuse)
    assert torch.equal(SupernetTrainer(supernet_config(), untrained.folder).saliency(), weights)
    with pytest.raises(AssertionError, match="computed again"):
        SupernetTrainer(supernet_config(run={"seed": 7}), untrained.folder, resume=False).saliency()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_computation_of_saliency_and_the_next_start_goes_on_with_it(
    supernet_config: Config,
    start: Start,
    finished: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    trainer, calls = start(tmp_path / "run"), 0
    (tmp_path / "run" / "saliency.pt").unlink()
    forward = trainer.teacher.forward

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), number)
        return forward(*arguments)

    trainer.teacher.forward = interrupted  # type: ignore[method-assign]
    assert trainer.run() is False
    assert trainer.step == 0
    assert load_checkpoint(trainer.checkpoint_path)["step"] == 0
    assert not (tmp_path / "run" / "saliency.pt").exists()
    done = load_checkpoint(tmp_path / "run" / "saliency.part.pt")["saliency"].isfinite()
    assert 0 < int(done.sum()) < len(done)

    continued, seen = SupernetTrainer(supernet_config(), tmp_path / "run"), []

    def record(*arguments: Any, **options: Any) -> Tensor:
        options["progress"] = lambda count, before=options["progress"]: (seen.append(count), before(count))
        return state_saliency(*arguments, **options)

    monkeypatch.setattr("training.stored_saliency.state_saliency", record)
    continued.saliency()
    assert sum(seen) == int((~done).sum())
    whole = load_checkpoint(finished[0] / "saliency.pt")["saliency"]
    assert torch.equal(load_checkpoint(tmp_path / "run" / "saliency.pt")["saliency"], whole)
    assert not (tmp_path / "run" / "saliency.part.pt").exists()


@pytest.mark.parametrize("file", ["saliency.pt", "saliency.part.pt"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "of other windows"])
def test_damaged_saliency_is_told_and_computed_again(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    trainer = start(tmp_path / "run")
    path, other = tmp_path / "run" / file, tmp_path / "run" / "saliency.pt"
    before = trainer.saliency()
    kept = load_checkpoint(other)
    if path != other:
        other.rename(path)
    if damage == "of other windows":
        save_checkpoint(path, {"key": kept["key"], "saliency": kept["saliency"][1:]})
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "truncated" else b"")
    trainer._saliency = None
    capsys.readouterr()
    assert torch.equal(trainer.saliency(), before)
    errors = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(errors) == 1 and str(path) in errors[0] and errors[0].endswith("; it is computed again")
    assert torch.equal(load_checkpoint(other)["saliency"], kept["saliency"])
    assert not (tmp_path / "run" / "saliency.part.pt").exists()


def test_a_folder_takes_one_training_at_a_time(start: Start, tmp_path: Path) -> None:
    first = start(tmp_path / "run")
    second = SupernetTrainer(first.config, first.folder)
    refused = []

    def meanwhile(_record: dict[str, float]) -> None:
        with pytest.raises(
            TrainingError, match=r"run: another training is using it; wait for its end, or give"
        ) as error:
            second.run()
        refused.append(error)
        assert second.step == 0 and not second.history

    assert first.run(meanwhile)
    assert refused
    assert second.run()  # now nobody is in it


def test_what_kills_left_half_written_is_removed_at_the_next_start(start: Start, tmp_path: Path) -> None:
    trainer = start(tmp_path / "run")
    left = [".checkpoint.pt.a1_b2c3d", ".saliency.pt.abcdefgh", ".saliency.part.pt.abcdefgh", ".config.json.abcdefgh"]
    others = ["checkpoint.pt.backup", ".checkpoint.pt.mine", ".notes.abcdefgh"]
    for name in (*left, *others):
        (trainer.folder / name).touch()
    with only_user(trainer.folder, "training", TrainingError):
        with pytest.raises(TrainingError, match="another training is using it"):
            trainer.run()
        assert (trainer.folder / left[0]).exists()  # of one that is at work, for all that this one knows
    assert trainer.run()
    names = {path.name for path in trainer.folder.iterdir()}
    assert not names & set(left)
    assert set(others) <= names


# What a step trains --------------------------------------------------------------------------------------------------


def test_the_members_of_a_step_follow_from_seed_and_step_alone(
    supernet_config: Config, untrained: SupernetTrainer, tmp_path: Path
) -> None:
    one, two = untrained, SupernetTrainer(supernet_config(), tmp_path / "two")
    other_seed = SupernetTrainer(supernet_config(run={"seed": 43}), tmp_path / "three")
    drawn = {}
    for step in range(6):
        torch.manual_seed(step)
        drawn[step] = at_step(one, step)
        torch.rand(3)
        assert at_step(two, step) == drawn[step]
    assert any(at_step(other_seed, step) != drawn[step] for step in range(6))
    assert len({tuple(member.subnet for member in members) for members, _ in drawn.values()}) > 1


def test_a_step_trains_the_largest_a_low_one_the_smallest_and_drawn_ones(untrained: SupernetTrainer) -> None:
    trainer = untrained
    low = set()
    for step in range(5, 45):
        members, device = at_step(trainer, step)
        assert [member.batch for member in members] == [4, 8, 8, 6, 6]
        assert [member.dropout for member in members] == [True, False, False, False, False]
        largest, lower, smallest, *drawn = members
        assert (largest.label, largest.subnet) == ("largest", trainer.space.largest())
        assert lower.subnet == trainer.space.parse(lower.label)
        low.add(lower.label)
        assert (smallest.label, smallest.subnet) == ("smallest", trainer.space.smallest())
        for member in drawn:
            trainer.space.check(member.subnet)
            assert member.label in ("sampled", "stratified")
        assert device in ("orin", "slower") or device.startswith("synthetic_")
    assert low == {"w4a4", "w8a8", "fp8"}


@pytest.mark.parametrize(
    ("step", "phase"),
    [(0, Phase(True, False, False)), (2, Phase(True, False, False)), (3, Phase(True, True, False)), (5, Phase())],
)
def test_bits_come_first_then_widths_then_depth(untrained: SupernetTrainer, step: int, phase: Phase) -> None:
    trainer = untrained
    seen: set[Subnet] = set()
    for draw in range(60):
        trainer.step = step
        members, _ = trainer.members(torch.Generator().manual_seed(draw))
        seen.update(member.subnet for member in members if member.label not in ("largest", "w4a4", "w8a8", "fp8"))
    assert trainer.phase() == phase
    layers = [layer for subnet in seen for layer in subnet.layers]
    widths = {(layer.heads, layer.mlp) for layer in layers if layer is not None}
    assert ((4, 64) in widths) and (len(widths) > 1) == phase.width
    assert (None in layers) == phase.depth
    assert {(layer.w, layer.a) for layer in layers if layer is not None} >= {(4, 4), (8, 8), (4, 8), (8, 4)}


def test_the_losses_of_a_step_count_by_the_weights_of_the_members(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start(tmp_path / "run")
    shares: dict[str, float] = {}
    whole: list[float] = []
    weights = {"largest": 1.0, "low": 3.0, "smallest": 0.5, "sampled": 1.5}
    fields = {f"{name}_weight": weight for name, weight in weights.items()} | {"low_shares": {"w4a4": 1.0}}
    sandwich = trainer.options.sandwich.model_copy(update=fields)
    monkeypatch.setattr(trainer, "options", trainer.options.model_copy(update={"sandwich": sandwich}))
    step = SupernetTrainer._member_step

    def watched(self: SupernetTrainer, member: Member, *rest: Any) -> tuple[float, float, float]:
        first = not whole
        whole.append(rest[-1])
        shares.setdefault(member.label, rest[-1])
        if not first:
            return step(self, member, *rest)
        gradients = []
        for share in (rest[-1], 2.0 * rest[-1]):
            self.optimizer.zero_grad()
            torch.manual_seed(0)  # dropout
            rows = step(self, member, *rest[:-1], share)
            gradients.append(self.model.head.weight.grad.clone())
        torch.testing.assert_close(gradients[1], 2.0 * gradients[0])
        return rows

    monkeypatch.setattr(SupernetTrainer, "_member_step", watched)
    trainer.step = 5
    trainer.train_step()
    assert sum(whole) == pytest.approx(1.0)
    drawn = {label: share / shares["largest"] for label, share in shares.items()}
    assert drawn.pop("w4a4") == pytest.approx(3.0) and drawn.pop("smallest") == pytest.approx(0.5)
    assert drawn.pop("largest") == 1.0 and set(drawn) <= {"sampled", "stratified"}
    assert list(drawn.values()) == pytest.approx([1.5] * len(drawn)) and drawn


def test_what_the_networks_share_is_run_once_and_gets_the_gradients_of_all(
    supernet_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = SupernetTrainer(supernet_config(run={"precision": "fp32"}), tmp_path)
    found: dict[str, Tensor] = {}

    def collect() -> None:
        found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    passes: list[int] = []
    stem = ElasticDiffusionPolicyT.stem

    def count(self: ElasticDiffusionPolicyT, noisy: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        passes.append(len(noisy))
        return stem(self, noisy, *rest)

    monkeypatch.setattr(ElasticDiffusionPolicyT, "stem", count)
    monkeypatch.setattr(trainer.optimizer, "step", collect)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    members, device = at_step(trainer, 5)
    members = [replace(member, dropout=False) for member in members]
    monkeypatch.setattr(trainer, "members", lambda _generator: (members, device))
    trainer.train_step()
    assert passes == [max(member.batch for member in members)]

    drawn = trainer.data.draw(trainer.windows, step_seed(trainer.config.run.seed, 5), passes[0])
    noisy, alpha = trainer.noisy(drawn), trainer.saliency()[drawn.index]
    teacher = trainer.predict(trainer.teacher, noisy, drawn)
    trainer.model.zero_grad()
    for member in members:
        trainer.model.activate(member.subnet)
        part = drawn.first(member.batch)
        size = len(part.index)
        predicted = trainer.predict(trainer.model, noisy[:size], part)
        (sqil_loss(predicted, teacher[:size], part.noise, alpha[:size])[0] / len(members)).backward()
    wanted = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and {"memory_fc1.weight", "action_position"} <= found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_held_out_table_has_a_row_for_every_figure(finished: tuple[Path, list[dict[str, float]]]) -> None:
    _, records = finished
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    tables = [record for record in records if "held_out/teacher" in record]
    assert [record["step"] for record in tables] == [6]
    rows = {name: value for name, value in tables[0].items() if name.startswith("held_out/")}
    assert rows.keys() == {f"held_out/{name}" for name in ("teacher", *HELD_OUT_SUBNETS)}
    assert set(HELD_OUT_SUBNETS) == {"largest", "fp8", "w8a8", "w4a4", "smallest"}
    assert all(math.isfinite(value) for value in rows.values())


def test_the_log_tells_losses_by_class_and_device_and_what_the_sampler_does(
    finished: tuple[Path, list[dict[str, float]]],
) -> None:
    _, records = finished
    names = {name for record in records for name in record}
    assert {"loss", "lr", "norm", "step_norm", "loss/largest", "loss/smallest", "task/smallest"} <= names
    assert names & {"loss/w4a4", "loss/w8a8", "loss/fp8"}
    assert "loss/sampled" in names and "loss/stratified" in names
    assert names & {"device_loss/orin", "device_loss/slower", "device_loss/synthetic"}
    assert {
        "sampler/entropy",
        "sampler/latency_over_budget",
        "sampler/memory_over_budget",
        "sampler/fit_share",
    } <= names
    assert all(math.isfinite(value) for record in records for value in record.values())


def test_training_starts_from_the_teacher_ordered_by_importance(supernet_config: Config, tmp_path: Path) -> None:
    for importance in ("l1", "taylor"):
        trainer = SupernetTrainer(supernet_config(supernet={"importance": importance}), tmp_path / importance)
        ordered = trainer.model.elastic_blocks()[0].fc1.weight
        assert not torch.equal(ordered, trainer.teacher.decoder_blocks()[0].fc1.weight)
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        losses = trainer.validate(("largest", "w8a8"))
        assert losses["largest"] == pytest.approx(losses["teacher"], rel=1e-5)
        assert losses["w8a8"] == pytest.approx(losses["teacher"], rel=0.05)


def test_training_lowers_the_loss_and_leaves_the_teacher(supernet_config: Config, tmp_path: Path) -> None:
    config = supernet_config(
        run={"steps": 20, "validate_every": 1000, "checkpoint_every": 1000},
        optimizer={"learning_rate": 5e-3},
        supernet={"width_from": 0.0, "depth_from": 0.0},
    )
    trainer = SupernetTrainer(config, tmp_path)
    before, teacher = trainer.validate(("w4a4", "smallest")), copied(trainer.teacher.state_dict())
    assert trainer.run()
    after = trainer.validate(("w4a4", "smallest"))
    assert after["teacher"] == before["teacher"]
    assert_equal(trainer.teacher.state_dict(), teacher)
    assert after["w4a4"] < 0.8 * before["w4a4"] and after["smallest"] < 0.9 * before["smallest"]


# The regularizer -----------------------------------------------------------------------------------------------------


def test_the_regularizer_moves_the_sampler_and_not_the_weights(
    start: Start, untrained: SupernetTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {step: at_step(untrained, step) for step in range(4)}
    gradients: dict[float, list[Tensor]] = {}
    trainers = {}
    for lam in (0.0, 1e4):
        trainer = start(tmp_path / str(lam))
        trainer.sampler.config = trainer.sampler.config.model_copy(update={"lam": lam})
        gradients[lam] = collected = []
        monkeypatch.setattr(trainer, "members", lambda _generator, t=trainer: members[t.step])
        update = trainer.optimizer.step

        def collect(t: SupernetTrainer = trainer, into: list[Tensor] = collected, step: Any = update) -> None:
            into.extend(torch.zeros(0) if p.grad is None else p.grad.clone() for p in t.weights)
            step()

        monkeypatch.setattr(trainer.optimizer, "step", collect)
        for _ in range(4):
            trainer.train_step()
        trainers[lam] = trainer
    without, strong = trainers[0.0], trainers[1e4]
    assert len(gradients[0.0]) == 4 * len(without.weights)
    for one, other in zip(gradients[0.0], gradients[1e4], strict=True):
        assert torch.equal(one, other)
    assert_equal(without.model.state_dict(), strong.model.state_dict())
    assert_equal(without.ema.state_dict(), strong.ema.state_dict())
    networks = [trainer.sampler.state_dict()["network"] for trainer in (without, strong)]
    assert any(not torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


def test_an_update_of_the_sampler_leaves_no_gradient_on_the_weights(start: Start, tmp_path: Path) -> None:
    trainer = start(tmp_path / "run")
    trainer.train_step()
    assert all(weight.grad is None for weight in trainer.weights)
    before = copied(trainer.sampler.state_dict()["network"])
    trainer.sampler.update(torch.Generator().manual_seed(0))
    assert all(weight.grad is None for weight in trainer.weights)
    assert any(not torch.equal(value, before[k]) for k, value in trainer.sampler.state_dict()["network"].items())


# What stops a run ----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_member_and_step_and_keeps_the_checkpoint(
    supernet_config: Config, start: Start, tmp_path: Path
) -> None:
    trainer = start(tmp_path / "run")
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    kept = trainer.checkpoint_path.read_bytes()
    with torch.no_grad():
        trainer.model.elastic_blocks()[0].fc1_input.log_step.fill_(float("nan"))  # full precision never reads it
    before = copied(trainer.payload())
    member = next(member for member in at_step(trainer, 3)[0] if member.subnet.precision is Precision.INT)
    named = re.escape(f"step 3: the loss of {member.label} ({trainer.space.name(member.subnet)}) is nan")
    with pytest.raises(TrainingError, match=rf"{named}.*checkpoint\.pt, is kept"):
        trainer.run()
    assert trainer.checkpoint_path.read_bytes() == kept
    after = trainer.payload()
    del before["model"], after["model"], before["history"], after["history"]
    assert_equal(after, before)  # neither averages, nor optimizer, nor sampler have seen the step
    assert all(weight.grad is None for weight in trainer.weights)
    assert SupernetTrainer(supernet_config(), tmp_path / "run").step == 3


def test_data_that_are_not_numbers_stop_the_run_before_anything_is_updated(start: Start, tmp_path: Path) -> None:
    trainer = start(tmp_path / "run")
    trainer.saliency()
    trainer.checkpoint_path.unlink()
    trainer.windows.action[:] = float("nan")
    before = copied(trainer.model.state_dict())
    with pytest.raises(TrainingError, match=r"step 0: the loss of largest .* is nan; .* no checkpoint had been"):
        trainer.train_step()
    assert_equal(trainer.model.state_dict(), before)


def test_a_gradient_that_is_not_finite_updates_nothing(start: Start, tmp_path: Path) -> None:
    trainer = start(tmp_path / "run")
    before = copied(trainer.model.state_dict())
    weight = trainer.model.elastic_blocks()[0].fc1.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="step 0: gradient norm"):
        trainer.train_step()
    assert_equal(trainer.model.state_dict(), before)
    assert trainer.sampler.updates == 0 and all(p.grad is None for p in trainer.weights)


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"supernet": {"depth_from": 0.8}}, r"differs in supernet\.depth_from\)"),
        ({"supernet": {"sandwich": SANDWICH | {"sampled": 1}}}, r"differs in supernet\.sandwich\)"),
        ({"supernet": {"synthetic": 7}}, r"differs in supernet\.synthetic\)"),
        ({"run": {"seed": 1}}, r"differs in run\.seed\)"),
        ({"optimizer": {"learning_rate": 2e-4}}, r"differs in optimizer\.learning_rate\)"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_by_field(
    supernet_config: Config, finished: tuple[Path, Any], sections: dict[str, Any], field: str
) -> None:
    with pytest.raises(CheckpointError, match=field):
        SupernetTrainer(supernet_config(**sections), finished[0])


def test_another_teacher_or_another_table_is_refused_by_field_and_moved_files_are_not(
    supernet_config: Config, supernet_files: Any, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(supernet_files.teacher, tmp_path / "teacher")
    tables = [str(shutil.copy(path, tmp_path / path.name)) for path in supernet_files.tables]
    moved = supernet_config(supernet={"warm_start": str(tmp_path / "teacher"), "tables": tables})
    assert SupernetTrainer(moved, finished[0]).step == 6

    payload = load_checkpoint(tmp_path / "teacher" / "checkpoint.pt")
    payload["ema"]["head.bias"] += 1.0
    torch.save(payload, tmp_path / "teacher" / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: .*differs in teacher_sha256\)"):
        SupernetTrainer(moved, finished[0])

    table = load_table(Path(tables[0]))
    save_table(Path(tables[0]), table.model_copy(update={"workspace_bytes": table.workspace_bytes + 1}))
    other_table = supernet_config(supernet={"tables": tables})
    with pytest.raises(CheckpointError, match=r"differs in tables_sha256\).*--change-tables permits other supernet"):
        SupernetTrainer(other_table, finished[0])
    continued = SupernetTrainer(other_table, finished[0], change=["supernet.tables"])
    assert continued.step == 6
    assert continued.changed == ("supernet.tables names other files",)


def test_a_plain_run_is_not_continued_as_a_supernet(
    supernet_config: Config, supernet_files: Any, tmp_path: Path
) -> None:
    shutil.copytree(supernet_files.teacher, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"differs in .*supernet"):
        SupernetTrainer(supernet_config(), tmp_path / "run")


# Input that cannot be used -------------------------------------------------------------------------------------------


def without_supernet(config: TrainConfig) -> TrainConfig:
    return TrainConfig.model_validate_json(json.dumps(config.model_dump(mode="json") | {"supernet": None}))


def test_a_configuration_without_the_section_is_refused(supernet_config: Config, tmp_path: Path) -> None:
    plain = without_supernet(supernet_config())
    with pytest.raises(ConfigError, match="supernet: the section is missing"):
        SupernetTrainer(plain, tmp_path)
    with pytest.raises(ConfigError, match="supernet: the section is missing"):
        search_space(plain)


def space_with(config: TrainConfig, **fields: Any) -> dict[str, Any]:
    assert config.supernet is not None
    return config.supernet.space.model_dump(mode="json") | fields


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"space": {"min_depth": {"encoder": 1}}}, SpaceError, r"space\.min_depth\.encoder: .*has no such group"),
        ({"space": {"min_depth": {"decoder": 3}}}, SpaceError, r"space\.min_depth\.decoder: expected 1 to 2"),
        ({"space": {"head_ratios": [0.3, 1.0]}}, SpaceError, r"space\.head_ratios: 0\.3 of the 4 heads"),
        ({"warm_start": "absent"}, WarmStartError, "absent: no such run folder"),
        ({"tables": ["absent.json"]}, TableError, r"absent\.json: cannot be read"),
        ({"held_out": "absent"}, BudgetError, r"held_out: .*\(orin, slower\), got 'absent'"),
        ({"tables": [], "synthetic": 0}, BudgetError, "no device is left"),
    ],
)
def test_what_does_not_fit_is_named_before_the_first_step(
    supernet_config: Config, tmp_path: Path, fields: dict[str, Any], error: type[UserError], message: str
) -> None:
    fields = dict(fields)
    if "space" in fields:
        fields["space"] = space_with(supernet_config(), **fields["space"])
    with pytest.raises(error, match=message):
        SupernetTrainer(supernet_config(supernet=fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_table_that_lacks_an_entry_of_the_space_is_named_with_what_to_do(
    supernet_config: Config, supernet_files: Any, tmp_path: Path
) -> None:
    table = load_table(supernet_files.tables[0])
    kept = tuple(entry for entry in table.blocks if (entry.heads, entry.mlp) != (2, 32))
    save_table(tmp_path / "partial.json", table.model_copy(update={"blocks": kept}))
    config = supernet_config(supernet={"tables": [str(tmp_path / "partial.json")]})
    with pytest.raises(TableError, match=r"orin_nx_16gb: no entry for .* 2 heads and 32 hidden .*dcqfa profile"):
        SupernetTrainer(config, tmp_path / "run")


def test_a_teacher_of_another_size_is_refused_by_field(
    supernet_config: Config, trained_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(WarmStartError, match=r"another size: heads 2 \(this run: 4\)"):
        SupernetTrainer(supernet_config(supernet={"warm_start": str(trained_run)}), tmp_path)


def test_a_space_without_a_precision_of_the_sandwich_is_refused_before_the_first_step(
    supernet_config: Config, tmp_path: Path
) -> None:
    config = supernet_config()
    space = space_with(config, precisions=["fp32"])
    with pytest.raises(ConfigError, match=r"supernet\.sandwich\.low_shares: fp8"):
        SupernetTrainer(supernet_config(supernet={"space": space}), tmp_path)
    sandwich = SANDWICH | {"low_shares": {"w4a4": 1.0, "fp8": 0.0}}
    trainer = SupernetTrainer(supernet_config(supernet={"space": space, "sandwich": sandwich}), tmp_path)
    trainer.train_step()
    assert trainer.validate().keys() == {"teacher", "largest", "w8a8", "w4a4", "smallest"}
    with pytest.raises(ConfigError, match=r"supernet\.space\.precisions: .*fp32"):
        SupernetTrainer(supernet_config(supernet={"space": space_with(config, precisions=[])}), tmp_path / "none")


@pytest.mark.parametrize("fields", [{"synthetic": 0}, {"tables": []}])
def test_measured_devices_alone_or_made_up_ones_alone_suffice(
    supernet_config: Config, tmp_path: Path, fields: dict[str, Any]
) -> None:
    trainer = SupernetTrainer(supernet_config(supernet=fields), tmp_path)
    assert math.isfinite(trainer.train_step()["loss"])


def test_a_held_out_device_is_never_drawn(supernet_config: Config, tmp_path: Path) -> None:
    trainer = SupernetTrainer(supernet_config(supernet={"held_out": "slower"}), tmp_path)
    names = {at_step(trainer, step)[1] for step in range(60)}
    assert "orin" in names and "slower" not in names
    assert trainer.conditions.held_out.keys() == {"slower"}


# Reading a checkpoint ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_checkpoint_gives_every_subnet_of_the_averaged_network(
    supernet_config: Config, finished: tuple[Path, Any]
) -> None:
    folder, _ = finished
    supernet, trainer = load_supernet(folder), SupernetTrainer(supernet_config(), folder)
    generator = torch.Generator().manual_seed(0)
    noisy, observation = torch.randn(2, 16, 2, generator=generator), torch.randn(2, 2, 20, generator=generator)
    for name in (*HELD_OUT_SUBNETS, "d2-h.5-m1-w4a8", "int.4h64w4a4.1h32w8a4"):
        subnet, alone = supernet.subnet(name)
        assert subnet == trainer.space.parse(name) and not alone.training
        trainer.ema.activate(subnet)
        timesteps = torch.tensor([3, 60])
        assert torch.equal(alone(noisy, timesteps, observation), trainer.ema(noisy, timesteps, observation))
    assert supernet.meaning.step == 6
    with pytest.raises(SpaceError, match="'d9-h1-m2-w4a4'"):
        supernet.subnet("d9-h1-m2-w4a4")


def test_supernets_and_single_policies_are_told_apart(supernet_files: Any, finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    with pytest.raises(CheckpointError, match="holds a single policy, no supernet"):
        load_supernet(supernet_files.teacher)
    with pytest.raises(CheckpointError, match="holds a supernet, expected a single policy"):
        load_trained(folder)
    with pytest.raises(VariantError, match="has no variants"):
        open_checkpoint(supernet_files.teacher, "w4a4", 1)
    specification, name, _ = open_checkpoint(folder, None, 1)
    assert name == "largest" and specification.action.horizon == 16
    assert open_checkpoint(folder, "smallest", 1)[1] == "smallest"
    assert open_checkpoint(supernet_files.teacher, None, 1)[1] == "checkpoint"


def test_the_smallest_member_is_of_the_fewest_bits_in_every_phase(untrained: SupernetTrainer) -> None:
    trainer = untrained
    names = []
    for step in (0, 3, 5):
        members, _ = at_step(trainer, step)
        assert members[2].subnet.precision is Precision.INT
        names.append(trainer.space.name(members[2].subnet))
    assert names == ["d2-h1-m2-w4a4", "d2-h.25-m1-w4a4", "d1-h.25-m1-w4a4"]


def test_one_subnet_alone_is_trained_and_nothing_else(
    supernet_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = supernet_config(supernet={"only": "smallest"}, run={"steps": 2})
    trainer = SupernetTrainer(config, tmp_path / "alone")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.run()
    smallest = trainer.space.smallest()
    heads, mlp = next((layer.heads, layer.mlp) for layer in smallest.layers if layer is not None)
    after = trainer.model.state_dict()
    rows = heads * trainer.model.elastic_blocks()[0].self_attn.head_dim
    query = f"blocks.{smallest.kept[0]}.self_attn.q.weight"
    assert not torch.equal(after[query][:rows], before[query][:rows])
    outside = before[f"blocks.{smallest.kept[0]}.fc1.bias"][mlp:]
    assert torch.equal(after[f"blocks.{smallest.kept[0]}.fc1.bias"][mlp:], outside)
    assert trainer.table == ("smallest",)
    assert set(trainer.validate()) == {"teacher", "smallest"}
