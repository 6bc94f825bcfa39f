"""Readers of demonstration sets: one in-memory form, whatever the file.

A data set is a dictionary of row-aligned arrays plus ``episode_ends`` (exclusive), the layout of the Diffusion Policy
replay buffer. Readers: ``.npz`` files and zarr replay buffers (directory or zip, format 2 or 3), in which an array may
also lie in the groups ``data`` and ``meta``, as published replay buffers have them.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.errors import UserError
from training.config import ActionSource, DataConfig, ImageSource, ObservationSource

IMAGE_ROWS = 256  # that are converted to uint8 at a time


class DataError(UserError, ValueError):
    """A data set that cannot be used; the message names file and array."""


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """Observations (N, observation_dim) and actions (N, action_dim), float32, raw units, and episode bounds.

    ``images``: (N, height, width, 3) uint8 RGB, where the policy reads any.
    """

    observation: NDArray[np.float32]
    action: NDArray[np.float32]
    shapes: dict[str, tuple[int, ...]]  # per observation key, one time step, in concatenation order
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]  # exclusive
    images: NDArray[np.uint8] | None = None

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self.ends)

    def sha256(self) -> str:
        """Hash of all arrays with their shapes, in hexadecimal; equal for any file form."""
        digest = hashlib.sha256()
        for array, form in ((self.observation, "<f4"), (self.action, "<f4"), (self.ends, "<i8")):
            digest.update(f"{array.shape}".encode())
            digest.update(np.ascontiguousarray(array, dtype=form).tobytes())
        if self.images is not None:
            digest.update(f"{self.images.shape}".encode())
            digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()


def _read_npz(path: Path, names: set[str]) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = sorted(names - set(archive.files))
            if missing:
                raise DataError(f"{path}: no array {missing[0]!r}; it holds {', '.join(sorted(archive.files))}")
            return {name: np.asarray(archive[name]) for name in names}
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; pass the demonstrations' path with --data") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable .npz file ({error})") from error


def _read_zarr(path: Path, names: set[str]) -> dict[str, NDArray[Any]]:
    arrays = {}
    with _zarr_group(path) as group:
        for name in names:
            place = _zarr_place(path, group, name)
            try:
                arrays[name] = np.asarray(group[place][...])
            except Exception as error:
                raise DataError(f"{path}: array {place!r} cannot be read ({error!r})") from error
    return arrays


def _zarr_place(path: Path, group: Any, name: str) -> str:
    """Where in a replay buffer an array lies.

    Raises:
        DataError: nowhere.
    """
    places = [place for place in (name, f"data/{name}", f"meta/{name}") if place in group]
    if not places:
        raise DataError(f"{path}: no array {name!r}, nor data/{name} or meta/{name}")
    return places[0]


@contextmanager
def _zarr_group(path: Path) -> Iterator[Any]:
    """The root group of a replay buffer, open for reading.

    Raises:
        DataError: there is none.
    """
    import zarr  # only needed for zarr data; listed in requirements/train.txt
    from zarr.storage import ZipStore

    if not path.exists():
        raise DataError(f"{path}: no such file or folder; pass the demonstrations' path with --data")
    with ExitStack() as opened:
        try:
            store: Any = str(path) if path.is_dir() else ZipStore(str(path), mode="r")
            group: Any = zarr.open_group(store, mode="r")
            if not path.is_dir():
                opened.callback(store.close)  # only now: closing a store that never opened fails
        except Exception as error:  # zarr raises many unrelated types
            raise DataError(f"{path}: not a readable zarr folder or zip file ({error})") from error
        yield group


def _bytes(data: NDArray[Any], where: str, first: int = 0) -> NDArray[np.uint8]:
    """Intensities as uint8.

    Raises:
        DataError: a value is no whole number from 0 to 255; ``first`` is the number of the first row.
    """
    if data.dtype == np.uint8:
        return data
    if data.dtype.kind not in "iuf":
        raise DataError(f"{where}: expected numbers, got values of type {data.dtype}")
    fits = (data >= 0) & (data <= 255) & (data == np.floor(data))
    bad = np.flatnonzero(~fits.reshape(len(data), -1).all(axis=1))
    if len(bad):
        raise DataError(
            f"{where}: row {first + bad[0]} holds something other than whole numbers from 0 to 255; store uint8"
        )
    return data.astype(np.uint8)


def _read_images(path: Path, form: str, source: ImageSource, rows: int) -> NDArray[np.uint8]:
    """Images (rows, H, W, 3) as they are stored."""
    if form == "npz":
        file = path if source.file is None else path.parent / source.file
        if source.file is not None and not file.exists():
            raise DataError(
                f"{file}: no such file; data.image.file names the .npz with the images, in the folder of data.path"
            )
        return _images_of(
            _read_npz(file, {source.array})[source.array], rows, f"{file}: array {source.array!r} (images)"
        )
    with _zarr_group(path) as group:
        name = _zarr_place(path, group, source.array)
        where = f"{path}: array {name!r} (images)"
        try:
            return _images_of(group[name], rows, where)
        except DataError:
            raise
        except Exception as error:  # zarr raises many unrelated types
            raise DataError(f"{where}: cannot be read ({error!r})") from error


def _images_of(array: Any, rows: int, where: str) -> NDArray[np.uint8]:
    """An array in memory or on disk as images; other types than uint8 are converted a part at a time.

    Raises:
        DataError: it holds no RGB images, or another number of them than ``rows``.
    """
    shape = tuple(array.shape)
    if len(shape) != 4 or shape[-1] != 3 or shape[0] != rows:
        raise DataError(f"{where} has shape {shape}, expected ({rows}, height, width, 3): RGB images, one per row")
    if isinstance(array, np.ndarray) and array.dtype == np.uint8:
        return array
    images = np.empty(shape, np.uint8)
    for first in range(0, rows, IMAGE_ROWS):
        images[first : first + IMAGE_ROWS] = _bytes(np.asarray(array[first : first + IMAGE_ROWS]), where, first)
    return images


def _format_of(path: Path) -> str:
    """Tell the format from what the path is.

    Raises:
        DataError: the path does not exist or tells nothing.
    """
    if path.is_dir() or path.suffix in (".zarr", ".zip"):
        return "zarr"
    if path.suffix == ".npz":
        return "npz"
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; pass the demonstrations' path with --data")
    raise DataError(f"{path}: expected a .npz file, or a zarr replay buffer as a folder or .zip file")


def _columns(source: ObservationSource | ActionSource, data: NDArray[Any], where: str) -> NDArray[np.float32]:
    if data.dtype.kind not in "biuf":
        raise DataError(f"{where}: expected numbers, got values of type {data.dtype}")
    if not data.ndim:
        raise DataError(f"{where}: expected one row per time step, got a single value")
    if data.ndim == 1:
        data = data[:, None]
    if source.columns is not None:
        flat = data.reshape(len(data), -1)
        if max(source.columns) >= flat.shape[1]:
            raise DataError(f"{where}: columns {list(source.columns)} exceed the array's {flat.shape[1]} columns")
        data = flat[:, list(source.columns)]
    data = np.ascontiguousarray(data, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(data.reshape(len(data), -1)).all(axis=1))
    if len(bad):
        raise DataError(f"{where}: row {bad[0]} holds NaN or infinity ({len(bad)} such rows); clean the data first")
    return data


def read_demonstrations(config: DataConfig) -> Demonstrations:
    """Read the data set that ``config`` describes.

    Raises:
        DataError: a file or array is missing, lengths disagree, values are no finite numbers, or the set is empty.
    """
    path = Path(config.path)
    names = {o.array for o in config.observations.values()} | {config.action.array, config.episode_ends}
    form = _format_of(path) if config.format == "auto" else config.format
    arrays = (_read_npz if form == "npz" else _read_zarr)(path, names)
    if arrays[config.episode_ends].dtype.kind not in "iu":
        raise DataError(f"{path}: {config.episode_ends!r} must hold whole numbers")
    ends = arrays[config.episode_ends].astype(np.int64).reshape(-1)
    if not len(ends) or (np.diff(ends) <= 0).any() or ends[0] <= 0:
        raise DataError(f"{path}: {config.episode_ends!r} must be a non-empty, strictly rising list of exclusive ends")
    rows = int(ends[-1])
    shapes: dict[str, tuple[int, ...]] = {}
    parts = []
    for key, source in config.observations.items():
        data = _columns(source, arrays[source.array], f"{path}: array {source.array!r} (observation {key!r})")
        if len(data) != rows:
            raise DataError(f"{path}: array {source.array!r} has {len(data)} rows, expected {rows} (last episode end)")
        shapes[key] = data.shape[1:]
        parts.append(data.reshape(rows, -1))
    action = _columns(config.action, arrays[config.action.array], f"{path}: array {config.action.array!r} (action)")
    if len(action) != rows:
        raise DataError(f"{path}: array {config.action.array!r} has {len(action)} rows, expected {rows}")
    images = None
    if config.image is not None:
        images = _read_images(path, form, config.image, rows)
    starts = np.concatenate([[0], ends[:-1]])
    return Demonstrations(np.concatenate(parts, axis=1), action.reshape(rows, -1), shapes, starts, ends, images)


def split_episodes(
    episodes: int, ratio: float, seed: int, limit: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split episode indices into (train, validation) as the published Push-T references do.

    Validation takes max(1, round(episodes * ratio)) episodes drawn without replacement; ``limit`` keeps at most that
    many training episodes, drawn with the same seed. ``ratio`` 0 leaves validation empty.
    """
    validation = np.zeros(episodes, dtype=bool)
    if ratio > 0.0 and episodes > 1:
        count = min(max(1, round(episodes * ratio)), episodes - 1)
        validation[np.random.default_rng(seed).choice(episodes, size=count, replace=False)] = True
    train = np.flatnonzero(~validation)
    if limit is not None and len(train) > limit:
        train = np.sort(np.random.default_rng(seed).choice(train, size=limit, replace=False))
    return train, np.flatnonzero(validation)
