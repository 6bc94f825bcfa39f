from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from training.checkpoint import load_checkpoint
from training.config import load_config
from training.data.policy_data import Batch
from training.digest import digest
from training.supernet import SupernetTrainer
from training.trainer import Trainer
from training.world import World, WorldError

ROOT = Path(__file__).parents[2]
STEPS = 3
# What one of the processes does. Every process writes what it saw, so that the test sees both.
PROCESS = """
import json, os, signal, sys
from pathlib import Path
import torch
from training.config import load_config, override
from training.run import TrainingError
from training.supernet import SupernetTrainer
from training.trainer import Trainer
from training.world import WorldError

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
seen = {"refused": {}}
for name, kind in (("plain", Trainer), ("supernet", SupernetTrainer)):
    config = load_config(folder / f"{name}.yaml")
    odd = {"run": {"batch": 9}} if name == "plain" else {
        "supernet": {"sandwich": config.supernet.sandwich.model_dump(mode="json") | {"low_batch": 9}}
    }
    try:
        kind(override(config, **odd), folder / "odd")
    except WorldError as error:
        seen["refused"][name] = str(error)
    trainer = kind(config, folder / "two" / name)
    drawn = seen[f"{name}_drawn"] = []
    if name == "supernet":
        def members(generator, trainer=trainer, original=trainer.members):
            result = original(generator)
            drawn.append([trainer.space.name(member.subnet) for member in result[0]] + [result[1]])
            return result
        trainer.members = members
    seen[name] = [trainer._step() for _ in range(steps)]
    seen[f"{name}_validation"] = trainer._validation()
    trainer.save()
rank = trainer.world.rank
seen["rank"], seen["size"] = rank, trainer.world.size
seen["weights"] = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
seen["sampler"] = [float(p.detach().double().sum()) for p in trainer.sampler.network.parameters()]
trainer = Trainer(override(load_config(folder / "plain.yaml"), run={"steps": 100}), folder / "stopped")
def interrupt(record):
    if rank == 1 and record["step"] == 2.0:
        os.kill(os.getpid(), signal.SIGINT)
seen["complete"] = trainer.run(interrupt)
seen["stopped_at"] = trainer.step
trainer.windows.action[rank::2] = float("nan") if rank else 0.0  # only one of the processes has bad data
try:
    trainer.train_step()
except TrainingError as error:
    seen["diverged"] = str(error)
own = folder / ("shared" if rank == 0 else "own")
Trainer(load_config(folder / "plain.yaml"), own).save()
trainer = Trainer(load_config(folder / "plain.yaml"), own)
if rank == 0:
    trainer.step = 42
else:
    with torch.no_grad():
        trainer.averaged[0].view(-1)[0] += 1e-6
try:
    trainer.run()
except WorldError as error:
    seen["different"] = str(error).removeprefix(str(own))
(folder / f"seen_{rank}.json").write_text(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def folder(supernet_files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes.

    Processes draw dropout of their own, so there is none. Adam's first steps have the size of the learning rate
    wherever a gradient is not exactly zero, so the rate is small: rounding must not turn into another network.
    """
    folder = tmp_path_factory.mktemp("world")
    document = yaml.safe_load(supernet_files.config.read_text())
    document["policy"]["attention_dropout"] = 0.0
    document["run"]["log_every"] = 1
    document["optimizer"].update(learning_rate=1e-5, warmup_steps=0)
    document["supernet"]["step_learning_rate"] = 1e-5
    (folder / "supernet.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (folder / "plain.yaml").write_text(yaml.safe_dump(document | {"supernet": None}, sort_keys=False))
    (folder / "process.py").write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(folder / "process.py"), str(folder), str(STEPS)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two processes reported."""
    first, second = (json.loads((folder / f"seen_{rank}.json").read_text()) for rank in (0, 1))
    return first, second


def test_both_processes_saw_the_same_and_hold_the_same_weights(seen: tuple[dict[str, Any], dict[str, Any]]) -> None:
    first, second = seen
    assert [first["rank"], second["rank"], first["size"]] == [0, 1, 2]
    assert len(first["supernet_drawn"]) == STEPS
    for key in first.keys() - {"rank"}:
        assert first[key] == second[key], key


def norm(state: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Euclidean distance of two states."""
    return float(torch.stack([(state[name] - other[name]).square().sum() for name in state]).sum().sqrt())


@pytest.mark.parametrize(("name", "kind"), [("plain", Trainer), ("supernet", SupernetTrainer)])
def test_two_processes_match_one_at_the_same_global_batch(
    folder: Path,
    seen: tuple[dict[str, Any], Any],
    tmp_path: Path,
    name: str,
    kind: type[Trainer] | type[SupernetTrainer],
) -> None:
    """Relative tolerances after three steps: the first loss 1e-5, later ones 2e-2 (a code near a tie may round
    the other way), averaged gradients 1e-2, and weights 5e-2 of how far they moved.
    """
    config = load_config(folder / f"{name}.yaml")
    one, two = kind(config, tmp_path), load_checkpoint(folder / "two" / name / "checkpoint.pt")
    start = {key: value.clone() for key, value in one.model.state_dict().items()}
    records = [one._step() for _ in range(STEPS)]
    for step, (mine, theirs) in enumerate(zip(records, seen[0][name], strict=True)):
        losses = [key for key in mine if key.startswith(("loss", "task", "device_loss", "lr"))]
        assert mine.keys() == theirs.keys() and losses
        for key in losses:
            assert theirs[key] == pytest.approx(mine[key], rel=2e-2 if step else 1e-5), (step, key)
    assert seen[0][f"{name}_validation"] == pytest.approx(one._validation(), rel=1e-3)
    # The bias of keys adds the same to all scores of a query: its gradient is rounding, which Adam makes steps of.
    after = {key: v for key, v in one.model.state_dict().items() if not key.endswith(("k.bias", "log_step"))}
    assert norm(after, two["model"]) < 5e-2 * norm(after, start)
    moments = [
        {str(index): state["exp_avg"] for index, state in optimizer["state"].items()}
        for optimizer in (one.optimizer.state_dict(), two["optimizer"])
    ]
    size = norm(moments[0], {key: torch.zeros_like(value) for key, value in moments[0].items()})
    assert norm(*moments) < 1e-2 * size


def test_two_processes_compute_the_saliency_of_one(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder / "supernet.yaml")
    trainer = SupernetTrainer(config, tmp_path)
    trainer.saliency()
    one = load_checkpoint(tmp_path / "saliency.pt")["saliency"]
    two = load_checkpoint(folder / "two" / "supernet" / "saliency.pt")["saliency"]
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-8)


def test_a_batch_that_does_not_divide_is_refused_by_field(seen: tuple[dict[str, Any], Any]) -> None:
    refused = seen[0]["refused"]
    assert refused["plain"].startswith("run.batch: 9 samples do not divide among 2 processes")
    assert refused["supernet"].startswith("supernet.sandwich.low_batch: 9 samples do not divide among 2 processes")


def test_a_signal_to_one_process_stops_both_at_the_same_step_with_a_checkpoint(
    folder: Path, seen: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    first, second = seen
    assert first["complete"] is second["complete"] is False
    assert 2 <= first["stopped_at"] == second["stopped_at"] < 100
    assert load_checkpoint(folder / "stopped" / "checkpoint.pt")["step"] == first["stopped_at"]


def test_a_loss_that_one_process_finds_not_finite_stops_both(seen: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for process in seen:
        assert f"step {process['stopped_at']}: loss is nan" in process["diverged"]


def test_processes_that_start_from_different_states_are_refused_before_the_first_step(
    folder: Path, seen: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    for process in seen:
        assert process["different"].startswith(
            ": process 1 starts from another state than process 0 (step, ema, step 0 instead of 42): give all "
            "processes one folder that they share (--out)"
        )
    assert load_checkpoint(folder / "shared" / "checkpoint.pt")["step"] == 0


def made_up_world(rank: int, size: int) -> World:
    """A world that talks to nobody."""
    world = World()
    world.rank, world.size = rank, size
    return world


def test_shares_of_a_batch_are_disjoint_and_their_beginnings_are_those_of_the_batch() -> None:
    count = torch.arange(12)
    batch = Batch(count[:, None, None] * 1.0, count[:, None, None] * 2.0, count, count[:, None, None] * 3.0, count)
    shares = [made_up_world(rank, 3).share(batch) for rank in range(3)]
    assert sorted(torch.cat([share.index for share in shares]).tolist()) == list(range(12))
    beginnings = torch.cat([share.first(6 // 3).index for share in shares])
    assert sorted(beginnings.tolist()) == list(range(6))  # what a member of batch 6 sees
    for share in shares:
        assert torch.equal(share.action.flatten(), 2.0 * share.index)
        assert torch.equal(share.noise.flatten(), 3.0 * share.index)
        assert torch.equal(share.observation.flatten(), 1.0 * share.index) and torch.equal(share.timesteps, share.index)


def test_alone_everything_is_as_it_is() -> None:
    world, parameter = World(), torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    world.average_gradients([parameter])
    assert (world.rank, world.size, world.first) == (0, 1, True)
    assert parameter.grad.tolist() == [1.0, 2.0]
    assert world.mean([1.0, 2.5]) == [1.0, 2.5] and world.any(True) and not world.any(False)
    rows = torch.arange(3)
    assert world.gather_rows(rows, 3) is rows
    world.check_batch("run.batch", 7)
    world.wait()


@pytest.mark.parametrize(("batch", "size", "fits"), [(8, 4, True), (9, 3, True), (8, 3, False), (1, 2, False)])
def test_batches_must_divide(batch: int, size: int, fits: bool) -> None:
    world = made_up_world(0, size)
    if fits:
        world.check_batch("run.batch", batch)
    else:
        with pytest.raises(WorldError, match=rf"run\.batch: {batch} samples .*give a multiple of {size}"):
            world.check_batch("run.batch", batch)


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(WorldError, match=r"cuda: process 1 .*finds 1; start 1 processes here"):
        made_up_world(1, 2).device("cuda")
    assert made_up_world(1, 2).device("cpu") == torch.device("cpu")


def test_states_are_told_apart_by_every_value_and_name() -> None:
    def state(number: float = 1.0, name: str = "a", **more: Any) -> dict[str, Any]:
        return {"model": {name: torch.tensor([[number, 2.0]])}, "step": 3, "groups": [{"betas": (0.9, 0.95)}], **more}

    known = digest(state())
    assert digest(state()) == known
    half = torch.tensor([1.0], dtype=torch.bfloat16)
    others = [state(1.0 + 1e-7), state(name="b"), state(step=4), state(groups=[]), state(scale=half), state(scale=None)]
    assert len({known, *map(digest, others)}) == len(others) + 1
    assert digest({"scale": torch.tensor(1.0)}) != digest({"scale": torch.tensor(2.0)})
