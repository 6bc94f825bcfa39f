"""Tiny data sets, configurations and trained policies."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dcqfa_ros.sim.tee import key_points
from training.config import TrainConfig, load_config
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


@pytest.fixture
def dcqfa() -> list[str]:
    """The command line with the commands of training, whether or not the package is installed."""
    code = (
        "import sys; from importlib.metadata import EntryPoint; from dcqfa_ros import cli; "
        "cli.entry_points = lambda group: [EntryPoint(name, f'training.commands:{name}', group) "
        "for name in ('train', 'eval', 'export')]; sys.exit(cli.main())"
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
