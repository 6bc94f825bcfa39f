from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.checkpoint import load_checkpoint
from training.config import load_config
from training.sandwich import HELD_OUT_SUBNETS
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
TABLE = ("teacher", *HELD_OUT_SUBNETS)


def start(dcqfa: list[str], *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*dcqfa, *map(str, arguments)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_ctrl_c_keeps_a_checkpoint_from_which_the_run_goes_on_bit_for_bit(
    dcqfa: list[str], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(steps=100_000, checkpoint_every=5)
    process = start(dcqfa, "train", "--config", config, "--out", tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoint.pt"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "run the same command again" in errors
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))

    continued = Trainer(load_config(config), tmp_path / "run")
    stopped_at = continued.step
    assert stopped_at == load_checkpoint(checkpoint)["step"] >= 5
    whole = Trainer(load_config(config), tmp_path / "whole")
    while whole.step < stopped_at + 2:
        whole.train_step()
    while continued.step < stopped_at + 2:
        continued.train_step()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, continued.model.state_dict()[name]), name


def test_a_finished_run_reports_and_a_second_start_has_nothing_left_to_do(
    dcqfa: list[str], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    arguments = ("train", "--config", write_config(), "--out", tmp_path / "run", "--json")
    for _ in range(2):
        process = start(dcqfa, *arguments)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        outcome = json.loads(output)
        assert outcome["complete"]
        assert outcome["step"] == 6


def test_a_wrong_data_path_is_one_line_and_exit_code_2(
    dcqfa: list[str], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    process = start(dcqfa, "train", "--config", write_config(), "--data", "absent.npz", "--out", tmp_path / "run")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("\n") == 1
    assert "absent.npz" in errors
    assert not (tmp_path / "run").exists()


def test_resuming_under_other_conditions_or_with_another_length_is_told(
    dcqfa: list[str], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run = ("train", "--config", write_config(), "--out", tmp_path / "run", "--threads")
    assert start(dcqfa, *run, 1).wait(timeout=60) == 0
    _, errors = (process := start(dcqfa, *run, 2)).communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "not bit for bit as before: threads 1 -> 2" in errors
    _, errors = (process := start(dcqfa, *run, 1, "--steps", 7)).communicate(timeout=60)
    assert process.returncode == 2
    assert "--change-length" in errors
    _, errors = (process := start(dcqfa, *run, 1, "--steps", 7, "--change-length")).communicate(timeout=60)
    assert process.returncode == 0, errors
    payload = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert (payload["step"], payload["config_file"]) == (7, "tiny.yaml")
    document = yaml.safe_load(run[2].read_text())
    document["optimizer"]["learning_rate"] = 1e-5
    run[2].write_text(yaml.safe_dump(document, sort_keys=False))
    run = (*run, 1, "--steps", 8, "--change-length")
    _, errors = (process := start(dcqfa, *run)).communicate(timeout=60)
    assert process.returncode == 2
    assert "--change-optimizer permits another optimizer.learning_rate" in errors
    _, errors = (process := start(dcqfa, *run, "--change-optimizer")).communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "not bit for bit as before: optimizer.learning_rate 0.0003 -> 1e-05" in errors
    history = load_checkpoint(tmp_path / "run/checkpoint.pt")["history"]
    assert history[-1]["changed"] == ["optimizer.learning_rate 0.0003 -> 1e-05"]


def test_another_seed_is_another_run(dcqfa: list[str], write_config: Callable[..., Path], tmp_path: Path) -> None:
    run = ("train", "--config", write_config(), "--out", tmp_path / "run", "--threads", 1, "--seed")
    assert start(dcqfa, *run, 7).wait(timeout=60) == 0
    file = tmp_path / "run/checkpoint.pt"
    assert load_checkpoint(file)["config"]["run"]["seed"] == 7
    before = file.read_bytes()
    _, errors = (process := start(dcqfa, *run, 8)).communicate(timeout=60)
    assert process.returncode == 2 and "run.seed" in errors
    _, errors = (process := start(dcqfa, *run, -1)).communicate(timeout=60)
    assert process.returncode == 2 and "command line: run.seed: " in errors
    assert file.read_bytes() == before


def test_a_full_disk_is_one_line_with_what_to_do_and_exit_code_2(
    dcqfa: list[str], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 40; exec "$@"', "limited", *dcqfa]
    process = start(limited, "train", "--config", write_config(), "--out", tmp_path / "run")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("dcqfa: error: ")]
    assert "checkpoint.pt: cannot be written (File too large); free " in line and line.endswith(
        " MB and run the same command again"
    )
    assert "Traceback" not in errors
    assert not [path for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]


def scalars(folder: Path) -> set[str]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_a_supernet_is_trained_and_its_held_out_table_printed(
    dcqfa: list[str], supernet_files: Any, tmp_path: Path
) -> None:
    data = shutil.copy(supernet_files.data, tmp_path / "moved.npz")
    arguments = ("train", "--config", supernet_files.config, "--data", data, "--out", tmp_path / "run")
    output, errors = (process := start(dcqfa, *arguments)).communicate(timeout=60)
    assert process.returncode == 0, errors
    assert [line.split()[0] for line in output.splitlines()[2:]] == list(TABLE)
    output, errors = (process := start(dcqfa, *arguments, "--json")).communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "continuing" in errors
    outcome = json.loads(output)
    assert list(outcome["held_out"]) == list(TABLE)
    assert outcome["validation_loss"] == outcome["held_out"]["largest"]
    names = scalars(tmp_path / "run")
    assert {"train/loss", "train/lr", "loss/largest", "held_out/w4a4"} <= names
    assert any(name.startswith("sampler/") for name in names)
    assert not any(name.count("/") > 1 for name in names)


@pytest.mark.slow
def test_processes_of_torchrun_train_together_and_one_of_them_speaks(
    dcqfa: list[str], supernet_files: Any, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", *dcqfa]
    arguments = ("train", "--config", supernet_files.config, "--out", tmp_path / "run", "--steps", 3, "--json")
    output, errors = (process := start(torchrun, *arguments)).communicate(timeout=100)
    assert process.returncode == 0, errors
    (line,) = output.splitlines()
    outcome = json.loads(line)
    assert (outcome["step"], list(outcome["held_out"])) == (3, list(TABLE))
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1


def test_held_out_losses_are_told_by_the_number_of_known_actions(
    dcqfa: list[str], write_config: Callable[..., Path], trained_run: Path, tmp_path: Path
) -> None:
    path = write_config(steps=2)
    document = yaml.safe_load(path.read_text())
    document["policy"]["prefix"] = 3
    path.write_text(yaml.safe_dump(document | {"warm_start": str(trained_run)}, sort_keys=False))
    process = start(dcqfa, "train", "--config", path, "--out", tmp_path / "run", "--json")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    outcome = json.loads(output)
    assert set(outcome["held_out"]) == {"prefix 0", "prefix 1", "prefix 3"}
    assert 0.0 < outcome["validation_loss"] < 2.0
