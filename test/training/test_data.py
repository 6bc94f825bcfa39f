from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dcqfa_ros.bundle.schema import NormalizerKind, NormalizerSpec
from dcqfa_ros.sim.tee import key_points
from training.commands import data_section
from training.config import DataConfig, TrainConfig, load_config, override
from training.data.episodes import DataError, Demonstrations, read_demonstrations, split_episodes
from training.data.normalizer import concatenate_normalizers, fit_normalizer, normalize
from training.data.sequences import window_rows

ROOT = Path(__file__).parents[2]
Config = Callable[..., TrainConfig]
ZARR = int(zarr.__version__.split(".")[0])  # Python 3.10 ends at zarr 2, which knows format 2 only


def published_zarr(path: Path, arrays: dict[str, np.ndarray], zarr_format: int = 2) -> DataConfig:
    """Write the replay-buffer layout (``data/*``, ``meta/episode_ends``) and return its description."""
    group: Any = zarr.open_group(str(path), mode="w", **({"zarr_format": zarr_format} if ZARR >= 3 else {}))
    for name, array in arrays.items():
        where = "meta/episode_ends" if name == "episode_ends" else f"data/{name}"
        (group.create_array if ZARR >= 3 else group.create_dataset)(where, data=array)
    document: dict[str, Any] = {
        "path": str(path),
        "format": "zarr",
        "episode_ends": "meta/episode_ends",
        "rate_hz": 10.0,
        "observations": {
            "keypoints": {"array": "data/keypoint", "units": "px", "frame": "table"},
            "agent_position": {"array": "data/state", "columns": [0, 1], "units": "px", "frame": "table"},
        },
        "action": {
            "array": "data/action",
            "space": "planar_position",
            "names": ["x", "y"],
            "units": ["px", "px"],
            "frame": "table",
            "minimum": [0.0, 0.0],
            "maximum": [512.0, 512.0],
        },
    }
    return DataConfig.model_validate(document)


@pytest.mark.parametrize("zarr_format", [2, 3] if ZARR >= 3 else [2])
def test_the_published_zarr_layout_reads_like_the_npz(
    tmp_path: Path, arrays: dict[str, np.ndarray], tiny_config: Config, zarr_format: int
) -> None:
    from_npz = read_demonstrations(tiny_config().data)
    from_zarr = read_demonstrations(published_zarr(tmp_path / "replay.zarr", arrays, zarr_format))
    for name in ("observation", "action", "starts", "ends"):
        np.testing.assert_array_equal(getattr(from_npz, name), getattr(from_zarr, name))
    assert from_npz.shapes == from_zarr.shapes == {"keypoints": (9, 2), "agent_position": (2,)}
    np.testing.assert_array_equal(from_npz.observation[:, :18], arrays["keypoint"].reshape(-1, 18))
    np.testing.assert_array_equal(from_npz.observation[:, 18:], arrays["state"][:, :2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("keypoint"), "keypoint"),
        (lambda a: a.update(action=a["action"][:-1]), "'action' has 171 rows, expected 172"),
        (lambda a: a["action"].__setitem__((5, 0), np.nan), "row 5"),
        (lambda a: a["state"].__setitem__((7, 1), np.inf), "row 7"),
        (lambda a: a.update(episode_ends=a["episode_ends"][::-1]), "episode_ends"),
        (lambda a: a.update(episode_ends=np.zeros(0, np.int64)), "episode_ends"),
        (lambda a: a.update(state=a["state"][:, :1]), "columns"),
        (lambda a: a.update(action=a["action"].astype(str)), "'action' .*expected numbers"),
        (lambda a: a.update(action=a["action"].astype(complex)), "'action' .*expected numbers"),
        (lambda a: a.update(action=np.float32(1.0)), "'action' .*a single value"),
        (lambda a: a.update(episode_ends=a["episode_ends"].astype(str)), "'episode_ends' must hold whole numbers"),
    ],
)
def test_damaged_arrays_are_refused_by_name(
    npz: Path, arrays: dict[str, np.ndarray], tiny_config: Config, change: Callable[[Any], None], message: str
) -> None:
    change(arrays)
    np.savez(npz, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        read_demonstrations(tiny_config().data)
    assert npz.name in str(caught.value)


def test_missing_and_unreadable_files_are_refused_by_name(tmp_path: Path, tiny_config: Config) -> None:
    config = tiny_config()
    for name, contents in (("absent.npz", None), ("text.npz", b"not a zip")):
        if contents:
            (tmp_path / name).write_bytes(contents)
        with pytest.raises(DataError, match=name):
            read_demonstrations(override(config, data={"path": str(tmp_path / name)}).data)
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "text.zip").write_bytes(b"not a zip")
    for name in ("absent.zarr", "empty.zarr", "text.zip"):
        with pytest.raises(DataError, match=name):
            read_demonstrations(override(config, data={"path": str(tmp_path / name), "format": "zarr"}).data)


def test_a_zipped_replay_buffer_reads_like_its_folder(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    folder = published_zarr(tmp_path / "replay.zarr", arrays)
    archive = shutil.make_archive(str(tmp_path / "replay"), "zip", tmp_path / "replay.zarr")
    zipped = read_demonstrations(folder.model_copy(update={"path": archive}))
    np.testing.assert_array_equal(zipped.observation, read_demonstrations(folder).observation)


def test_a_zarr_without_an_array_names_it(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    del arrays["action"]
    with pytest.raises(DataError, match="data/action"):
        read_demonstrations(published_zarr(tmp_path / "replay.zarr", arrays))


def test_the_published_split_holds_out_four_of_206_episodes() -> None:
    train, held_out = split_episodes(206, 0.02, 42, None)
    assert (len(train), len(held_out)) == (202, 4)
    assert sorted([*train, *held_out]) == list(range(206))
    limited, same = split_episodes(206, 0.02, 42, 90)
    assert len(limited) == 90
    assert set(limited) <= set(train)
    np.testing.assert_array_equal(same, held_out)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), horizon=st.integers(2, 8), data=st.data())
def test_windows_stay_in_their_episode_and_repeat_only_its_ends(
    lengths: list[int], horizon: int, data: st.DataObject
) -> None:
    before, after = data.draw(st.integers(0, horizon - 1)), data.draw(st.integers(0, horizon - 1))
    ends = np.cumsum(lengths)
    empty = np.zeros((int(ends[-1]), 1), np.float32)
    demonstrations = Demonstrations(empty, empty, {}, ends - lengths, ends)
    for episode, length in enumerate(lengths):
        rows = window_rows(demonstrations, np.array([episode]), horizon, before, after)
        assert len(rows) == max(0, length - horizon + 1 + before + after)
        for window in rows:
            steps = np.diff(window)
            assert set(steps) <= {0, 1}
            assert window.min() >= demonstrations.starts[episode]
            assert window.max() < demonstrations.ends[episode]
            at_end = (window[:-1] == demonstrations.starts[episode]) | (window[:-1] == demonstrations.ends[episode] - 1)
            assert at_end[steps == 0].all()


finite = hnp.arrays(
    np.float32, st.tuples(st.integers(2, 30), st.integers(1, 4)), elements=st.floats(-1000, 1000, width=32)
)


@settings(deadline=None)
@given(data=finite)
def test_min_max_normalisation_fills_minus_one_to_one(data: np.ndarray) -> None:
    spec = fit_normalizer(data, NormalizerKind.MIN_MAX)
    normalised = normalize(data, spec)
    moving = np.ptp(data.astype(np.float64), axis=0) > 1e-2
    assert np.all(np.abs(normalised) <= 1.0 + 1e-3)
    np.testing.assert_allclose(normalised[:, moving].max(axis=0), 1.0, atol=1e-3)
    np.testing.assert_allclose(normalised[:, moving].min(axis=0), -1.0, atol=1e-3)


@settings(deadline=None)
@given(data=finite, kind=st.sampled_from(list(NormalizerKind)))
def test_every_normaliser_can_be_undone(data: np.ndarray, kind: NormalizerKind) -> None:
    spec = fit_normalizer(data, kind)
    if kind is NormalizerKind.IDENTITY:
        np.testing.assert_array_equal(normalize(data, spec), data)
        return
    raw = (normalize(data, spec).astype(np.float64) - spec.offset) / np.asarray(spec.scale)
    np.testing.assert_allclose(raw, data, atol=0.02)


def test_a_dimension_that_does_not_move_is_centred_and_not_blown_up() -> None:
    spec = fit_normalizer(np.full((5, 1), 7.0, np.float32), NormalizerKind.MIN_MAX)
    np.testing.assert_array_equal(normalize(np.array([[7.0], [7.5]], np.float32), spec), [[0.0], [0.5]])


def test_normalisers_of_several_keys_join_in_order() -> None:
    first = NormalizerSpec(kind=NormalizerKind.MIN_MAX, scale=(2.0, 3.0), offset=(0.0, 1.0))
    joined = concatenate_normalizers({"a": first, "b": NormalizerSpec(kind="identity")}, {"a": (2,), "b": (1,)})
    assert joined.scale == (2.0, 3.0, 1.0)
    assert joined.offset == (0.0, 1.0, 0.0)


def test_the_published_demonstrations_read_as_documented(published_data: Path) -> None:
    config = override(load_config(ROOT / "config/training/pusht_keypoints.yaml"), data={"path": str(published_data)})
    demonstrations = read_demonstrations(config.data)
    assert demonstrations.observation.shape == (25650, 20)
    assert demonstrations.episodes == 206
    with np.load(published_data) as archive:
        pose = archive["state"][1000, 2:]
    np.testing.assert_allclose(demonstrations.observation[1000, :18].reshape(9, 2), key_points(pose), atol=0.02)


@pytest.mark.parametrize("packed", [False, True])
def test_the_shipped_configuration_reads_a_published_zarr(
    tmp_path: Path, arrays: dict[str, np.ndarray], tiny_config: Config, packed: bool
) -> None:
    path = Path(published_zarr(tmp_path / "pusht.zarr", arrays).path)
    if packed:
        path = Path(shutil.make_archive(str(tmp_path / "pusht"), "zip", path))
    shipped = load_config(ROOT / "config/training/pusht_keypoints.yaml")
    config = override(shipped, data=data_section(str(path)))
    demonstrations = read_demonstrations(config.data)
    assert demonstrations.sha256() == read_demonstrations(tiny_config().data).sha256()


def test_a_path_that_tells_no_format_is_refused(tmp_path: Path, tiny_config: Config) -> None:
    (tmp_path / "demonstrations.csv").write_text("1,2")
    for name, message in (("demonstrations.csv", r"expected a \.npz file"), ("absent", "no such file or folder")):
        with pytest.raises(DataError, match=message):
            read_demonstrations(override(tiny_config(), data=data_section(str(tmp_path / name))).data)


def test_arrays_of_one_dimension_are_columns(npz: Path, arrays: dict[str, np.ndarray], tiny_config: Config) -> None:
    np.savez(npz, **arrays, force=arrays["action"][:, 0])
    config = tiny_config()
    document = config.data.model_dump(mode="json")
    document["observations"]["force"] = {"array": "force", "units": "N", "frame": "table"}
    demonstrations = read_demonstrations(override(config, data=document).data)
    assert demonstrations.shapes["force"] == (1,)
    np.testing.assert_array_equal(demonstrations.observation[:, -1], arrays["action"][:, 0])


def test_a_constant_column_keeps_its_unit_under_mean_and_deviation() -> None:
    spec = fit_normalizer(np.array([[7.0, 1.0], [7.0, 3.0]], np.float32), NormalizerKind.MEAN_STD)
    assert spec.scale == (1.0, 1.0)
    assert spec.offset == (-7.0, -2.0)
