"""Tiny data sets, configurations and trained policies."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dcqfa_ros import cli
from dcqfa_ros.sim.tee import key_points
from training.config import TrainConfig, load_config, override
from training.lut import save_table
from training.modelled_tables import ORIN_NX_16GB, modelled_table
from training.sandwich import search_space
from training.supernet import SupernetTrainer
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
DATA_VARIABLE = "DCQFA_PUSHT_DATA"
EPISODE_LENGTHS = (60, 17, 44, 51)


def demonstration_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Return made-up Push-T demonstrations in the layout of the published arrays."""
    generator = np.random.default_rng(seed)
    rows = sum(EPISODE_LENGTHS)
    agent = np.clip(256 + np.cumsum(generator.normal(0, 8, (rows, 2)), axis=0), 20, 490)
    pose = np.column_stack([generator.uniform(100, 400, (rows, 2)), generator.uniform(0, 6, rows)])
    return {
        "state": np.column_stack([agent, pose]).astype(np.float32),
        "action": np.clip(agent + generator.normal(0, 10, (rows, 2)), 0, 512).astype(np.float32),
        "keypoint": np.stack([key_points(p) for p in pose]),
        "n_contacts": np.zeros((rows, 1), np.float32),
        "episode_ends": np.cumsum(EPISODE_LENGTHS).astype(np.int64),
    }


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Made-up demonstrations of four short episodes."""
    return demonstration_arrays()


@pytest.fixture
def npz(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """The demonstrations as the shared ``.npz``."""
    path = tmp_path / "demonstrations.npz"
    np.savez(path, **arrays)
    return path


def tiny_document(data: Path, **run: Any) -> dict[str, Any]:
    """Return a training configuration of a network of a few thousand parameters."""
    document = yaml.safe_load((ROOT / "config/training/pusht_keypoints.yaml").read_text())
    document["policy"].update(depth=2, heads=2, dim=32, ffn_ratio=2, attention_dropout=0.1)
    document["data"]["path"] = str(data)
    document["data"]["validation_ratio"] = 0.25
    document["diffusion"]["steps"] = 4
    document["optimizer"]["warmup_steps"] = 2
    document["run"].update(
        steps=6, batch=8, threads=1, compile=False, checkpoint_every=3, log_every=2, validate_every=4
    )
    document["run"].update(run)
    return document


@pytest.fixture
def write_config(tmp_path: Path, npz: Path) -> Callable[..., Path]:
    """Return a factory of tiny training YAML files; its arguments replace fields of ``run``."""

    def write(**run: Any) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(tiny_document(npz, **run), sort_keys=False))
        return path

    return write


@pytest.fixture
def tiny_config(write_config: Callable[..., Path]) -> Callable[..., TrainConfig]:
    """Return a factory of tiny training configurations; its arguments replace fields of ``run``."""
    return lambda **run: load_config(write_config(**run))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoint of a tiny network trained for a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    data, config = folder / "demonstrations.npz", folder / "tiny.yaml"
    np.savez(data, **demonstration_arrays())
    config.write_text(yaml.safe_dump(tiny_document(data), sort_keys=False))
    trainer = Trainer(load_config(config), folder / "run")
    assert trainer.run()
    return folder / "run"


TINY_SPACE = {
    "min_depth": {"decoder": 1},
    "head_ratios": [0.25, 0.5, 1.0],
    "mlp_ratios": [0.5, 1.0],
    "weight_bits": [4, 8],
    "activation_bits": [4, 8],
    "precisions": ["fp32", "fp16", "fp8"],
}


@dataclass(frozen=True)
class SupernetFiles:
    """What a tiny supernet run reads. Shared by all tests: copy a file before changing it."""

    config: Path  # training YAML with absolute paths
    data: Path
    teacher: Path  # run folder of a policy with random weights, large enough for nonlinearities to show
    tables: tuple[Path, ...]


def write_teacher(folder: Path, config: TrainConfig, seed: int = 0) -> None:
    """Write a run folder whose averaged network has random weights of every kind."""
    trainer = Trainer(config, folder, resume=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainer.ema.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=generator))
    trainer.save()


@pytest.fixture(scope="session")
def supernet_files(tmp_path_factory: pytest.TempPathFactory) -> SupernetFiles:
    """A supernet of two blocks with four heads on 32 channels, its teacher and two modelled devices."""
    folder = tmp_path_factory.mktemp("supernet")
    data, teacher, config = folder / "demonstrations.npz", folder / "teacher", folder / "supernet.yaml"
    np.savez(data, **demonstration_arrays())
    document = tiny_document(data)
    document["policy"].update(depth=2, heads=4, ffn_ratio=2)
    write_teacher(teacher, TrainConfig.model_validate(document, strict=False))
    tables = tuple(folder / "tables" / f"{name}.json" for name in ("orin", "slower"))
    document["run"].update(log_every=1, validate_every=6)
    document["supernet"] = {
        "warm_start": str(teacher),
        "space": TINY_SPACE,
        "tables": [str(path) for path in tables],
        "synthetic": 6,
        "sandwich": {"largest_batch": 4, "low_batch": 8, "smallest_batch": 8, "sampled_batch": 6, "sampled": 2},
        "sampler": {"batch": 8, "hidden": 16, "fit_every": 1},
        "calibration": 4,
        "width_from": 0.34,
        "depth_from": 0.67,
    }
    config.write_text(yaml.safe_dump(document, sort_keys=False))
    space = search_space(load_config(config))
    slower = replace(ORIN_NX_16GB, name="slower", bandwidth=ORIN_NX_16GB.bandwidth / 50)
    for path, device in zip(tables, (ORIN_NX_16GB, slower), strict=True):
        save_table(path, modelled_table(device, space))
    return SupernetFiles(config, data, teacher, tables)


@pytest.fixture(scope="session")
def supernet_config(supernet_files: SupernetFiles) -> Callable[..., TrainConfig]:
    """Return a factory of tiny supernet configurations; its arguments replace fields of sections."""
    config = load_config(supernet_files.config)
    return lambda **sections: override(config, **sections)


@pytest.fixture(scope="session")
def supernet_run(supernet_files: SupernetFiles) -> Path:
    """A run folder with the checkpoint of the tiny supernet trained for a few steps. Not to be changed."""
    trainer = SupernetTrainer(load_config(supernet_files.config), supernet_files.config.parent / "run")
    assert trainer.run()
    return trainer.folder


@pytest.fixture
def dcqfa() -> list[str]:
    """The command line with the commands of training, whether or not the package is installed."""
    code = (
        "import sys; from importlib.metadata import EntryPoint; from dcqfa_ros import cli; "
        "own = {name: f'commands_{name}' for name in "
        "('baseline', 'compare', 'export', 'mixed', 'pack', 'profile', 'sampler', 'search', 'subnet')}; "
        "modules = dict.fromkeys(('train', 'eval'), 'commands') | own; "
        "cli.entry_points = lambda group: [EntryPoint(name, f'training.{module}:{name}', group) "
        "for name, module in modules.items()]; sys.exit(cli.main())"
    )
    return [sys.executable, "-c", code]


@pytest.fixture
def published_data() -> Path:
    """The 206 published demonstrations; a test that needs them is reported as skipped where they are absent."""
    default = ROOT.parent / "shared/data/pusht/pusht_human_demos_lowdim.npz"
    path = Path(os.environ.get(DATA_VARIABLE, default))
    if not path.is_file():
        pytest.skip(f"not exercised: no Push-T demonstrations (set {DATA_VARIABLE} to pusht_human_demos_lowdim.npz)")
    return path


@pytest.fixture
def in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[[str], Callable[..., tuple[int, str, str]]]:
    """Return a factory of commands of ``dcqfa`` run in this process, in an empty folder: exit code, output, errors."""

    def command(name: str) -> Callable[..., tuple[int, str, str]]:
        entry = EntryPoint(name, f"training.commands_{name}:{name}", cli.ENTRY_POINT_GROUP)
        monkeypatch.setattr(cli, "entry_points", lambda group: [entry])
        monkeypatch.chdir(tmp_path)

        def run(*arguments: Any) -> tuple[int, str, str]:
            capsys.readouterr()
            code = cli.main([name, *map(str, arguments)])
            return code, *capsys.readouterr()

        return run

    return command
