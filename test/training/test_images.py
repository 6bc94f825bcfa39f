"""Training of policies that read images: data, resuming, supernet, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr

from test.training.conftest import TINY_SPACE, demonstration_arrays, tiny_document, write_teacher
from training.checkpoint_engine import VariantError, find_variant
from training.config import ConfigError, TrainConfig, load_config, override
from training.data.episodes import DataError, read_demonstrations
from training.data.images import ImageWindows
from training.data.policy_data import PolicyData
from training.export.bundle import ExportError, ExportOptions, export_bundle
from training.identity import identity
from training.losses.sqil import patch_perturbation
from training.stored_saliency import run_perturbation
from training.supernet import SupernetTrainer
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SIDE, CROP = 36, 33
ZARR = int(zarr.__version__.split(".")[0])
Document = dict[str, Any]


@pytest.fixture
def image_document(tmp_path: Path) -> Document:
    """A tiny configuration with images in a file beside the demonstrations."""
    arrays = demonstration_arrays()
    rows = len(arrays["action"])
    np.savez(tmp_path / "low.npz", **arrays)
    images = np.random.default_rng(1).integers(0, 256, (rows, SIDE, SIDE, 3), np.uint8)
    np.savez(tmp_path / "images.npz", img=images)
    document = tiny_document(tmp_path / "low.npz", steps=4, batch=4, checkpoint_every=2)
    document["policy"].update(observation_dim=2, horizon=10)
    document["policy"]["image"] = {
        "height": SIDE,
        "width": SIDE,
        "crop": CROP,
        "channels": 16,
        "keypoints": 4,
        "features": 8,
    }
    del document["data"]["observations"]["keypoints"]
    document["data"]["image"] = {"array": "img", "file": "images.npz", "frame": "camera"}
    return document


def parse(document: Document) -> TrainConfig:
    return TrainConfig.model_validate(document, strict=False)


def test_training_crops_at_random_by_seed_and_validation_in_the_middle(image_document: Document) -> None:
    data = PolicyData(parse(image_document))
    windows = data.windows.observation
    assert isinstance(windows, ImageWindows) and windows.images.dtype == torch.uint8
    assert windows.images is not None and windows.low.shape[-1] == 2
    held_out = data.held_out.observation
    assert isinstance(held_out, ImageWindows) and held_out.images.data_ptr() == windows.images.data_ptr()
    one, two, three = (data.draw(data.windows, seed, 16) for seed in (3, 3, 4))
    assert torch.equal(one.observation, two.observation) and not torch.equal(one.observation, three.observation)
    assert one.observation.shape == (16, 2, 2 + 3 * CROP * CROP)
    assert not torch.equal(one.observation, windows[one.index])
    places = set()
    for window, observation in zip(one.index, one.observation, strict=True):
        for step, row in enumerate(windows.rows[window]):
            image = windows.images[row].permute(2, 0, 1).float() / 127.5 - 1.0
            seen = observation[step, 2:].reshape(3, CROP, CROP)
            fits = [
                (y, x)
                for y in range(SIDE - CROP + 1)
                for x in range(SIDE - CROP + 1)
                if torch.allclose(image[:, y : y + CROP, x : x + CROP], seen, atol=1e-6)
            ]
            assert len(fits) == 1
            places.add(fits[0])
    assert len(places) > 8
    drawn = data.draw(data.held_out, 3, 5)
    assert torch.equal(drawn.observation, held_out[drawn.index])
    first = windows.images[windows.rows[0, 0]].permute(2, 0, 1).float() / 127.5 - 1.0
    torch.testing.assert_close(windows[:1][0, 0, 2:].reshape(3, CROP, CROP), first[:, 1 : 1 + CROP, 1 : 1 + CROP])
    assert torch.equal(windows.every(1, 3)[:2], windows[torch.tensor([1, 4])])


def test_a_zarr_of_floats_reads_like_the_npz(image_document: Document, tmp_path: Path) -> None:
    config = parse(image_document).data
    reference = read_demonstrations(config)
    assert reference.images is not None
    group: Any = zarr.open_group(str(tmp_path / "replay.zarr"), mode="w")
    arrays = {**demonstration_arrays(), "img": reference.images.astype(np.float32)}
    for name, array in arrays.items():
        where = "meta/episode_ends" if name == "episode_ends" else f"data/{name}"
        (group.create_array if ZARR >= 3 else group.create_dataset)(where, data=array)
    moved = config.model_copy(update={"path": str(tmp_path / "replay.zarr"), "format": "auto"})
    read = read_demonstrations(moved)
    assert read.images is not None and read.images.dtype == np.uint8
    assert read.sha256() == reference.sha256()
    without = read_demonstrations(config.model_copy(update={"image": None}))
    assert without.images is None and without.sha256() != reference.sha256()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((172, SIDE, SIDE, 3), 0.5, np.float32), "row 0 .*whole numbers from 0 to 255"),
        (np.zeros((171, SIDE, SIDE, 3), np.uint8), r"expected \(172, height, width, 3\)"),
        (np.zeros((172, 40, SIDE, 3), np.uint8), "40 x 36 pixels, the policy declares 36 x 36"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    image_document: Document, tmp_path: Path, images: np.ndarray, message: str
) -> None:
    np.savez(tmp_path / "images.npz", img=images)
    with pytest.raises(DataError, match=message):
        PolicyData(parse(image_document))


def test_images_are_declared_on_both_sides(image_document: Document, tmp_path: Path) -> None:
    for section, other in (("policy", "data"), ("data", "policy")):
        document = copy.deepcopy(image_document)
        del document[section]["image"]
        path = tmp_path / "one_side.yaml"
        path.write_text(yaml.safe_dump(document))
        with pytest.raises(ConfigError, match=rf"{other}\.image is given but {section}\.image is missing"):
            load_config(path)


def test_a_run_on_images_resumes_bit_for_bit_and_is_not_exported(image_document: Document, tmp_path: Path) -> None:
    config = parse(image_document)
    whole = Trainer(config, tmp_path / "whole")
    assert whole.run()
    half = Trainer(config, tmp_path / "half")
    for _ in range(2):
        half.train_step()
    half.save()
    resumed = Trainer(config, tmp_path / "half")
    assert resumed.step == 2 and resumed.run()
    for name, tensor in whole.payload()["ema"].items():
        assert torch.equal(tensor, resumed.payload()["ema"][name]), name
    with pytest.raises(VariantError, match="reads images"):
        find_variant(tmp_path / "whole", None)
    with pytest.raises(ExportError, match="reads images"):
        export_bundle(tmp_path / "whole", tmp_path / "bundle", ExportOptions())
    assert not (tmp_path / "bundle").exists()


def test_a_supernet_on_images_trains_with_saliency_of_patches_and_resumes(
    image_document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = parse(image_document)
    write_teacher(tmp_path / "teacher", teacher)
    document = image_document | {
        "supernet": {
            "warm_start": str(tmp_path / "teacher"),
            "space": TINY_SPACE | {"head_ratios": [0.5, 1.0]},
            "synthetic": 4,
            "sandwich": {"largest_batch": 2, "low_batch": 2, "smallest_batch": 2, "sampled_batch": 2, "sampled": 1},
            "sampler": {"batch": 4, "hidden": 8, "fit_every": 1},
            "calibration": 2,
        }
    }
    document["data"]["max_train_episodes"] = 1
    write_teacher(tmp_path / "teacher", override(teacher, data={"max_train_episodes": 1}))
    config = parse(document)
    monkeypatch.setattr("training.data.images.patch_perturbation", lambda: patch_perturbation(2))
    whole = SupernetTrainer(config, tmp_path / "whole")
    rows = run_perturbation(whole)(whole.windows.observation[:2])
    assert rows.shape == (2, 4, 2, 2 + 3 * CROP * CROP)
    assert torch.equal(rows[:, 0, :, :2], whole.windows.observation[:2][..., :2])
    assert whole.run()
    half = SupernetTrainer(config, tmp_path / "half")
    for _ in range(2):
        half.train_step()
    half.save()
    resumed = SupernetTrainer(config, tmp_path / "half")
    assert resumed.run()
    for name, tensor in whole.payload()["ema"].items():
        assert torch.equal(tensor, resumed.payload()["ema"][name]), name
    with pytest.raises(VariantError, match="reads images"):
        find_variant(tmp_path / "whole", "w4a4")


def test_a_configuration_without_images_is_the_run_that_it_was(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config()
    stored = config.model_dump(mode="json")
    for section in ("policy", "data"):
        del stored[section]["image"]  # as checkpoints of older versions have it
    assert identity(TrainConfig.model_validate(stored, strict=False)) == identity(config)


def test_the_shipped_configurations_describe_the_published_policy() -> None:
    plain = load_config(ROOT / "config/training/pusht_image.yaml")
    supernet = load_config(ROOT / "config/training/pusht_image_supernet.yaml")
    assert plain.policy == supernet.policy
    assert (plain.policy.horizon, plain.policy.attention_dropout, plain.run.batch) == (10, 0.3, 64)
    assert plain.optimizer.weight_decay == 1e-3
