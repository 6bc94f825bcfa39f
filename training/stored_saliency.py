"""Saliency of the training windows of a run: computed once, kept in the run folder, continued where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from training.data.images import image_patch_perturbation
from training.losses.sqil import Denoiser, Perturbation, dimension_perturbation, saliency_timesteps, state_saliency
from training.messages import warn

if TYPE_CHECKING:
    from training.run import TrainingRun

SALIENCY, PART = "saliency.pt", "saliency.part.pt"
SAVE_EVERY_S = 60.0  # what a kill may lose


class StoredSaliency:
    """Saliency (N,) float32 of a run's training windows in a folder.

    ``saliency.pt`` holds all values; ``saliency.part.pt`` those of a computation that was stopped.
    """

    def __init__(self, folder: Path, key: str, count: int, *, speaks: bool = True) -> None:
        """Take the folder and what the values depend on.

        Args:
            folder: where they are kept.
            key: what they depend on.
            count: how many they are.
            speaks: warn of damaged files.
        """
        self.folder, self.key, self.count, self._speaks = folder, key, count, speaks

    def read(self) -> Tensor | None:
        """All values; None where the folder has none that belong to the key, or a damaged file."""
        values = self._read(self.folder / SALIENCY)
        return values if values is not None and values.isfinite().all() else None

    def read_part(self) -> Tensor:
        """What a computation found before it was stopped, NaN elsewhere."""
        values = self._read(self.folder / PART)
        return torch.full((self.count,), float("nan")) if values is None else values

    def write(self, values: Tensor) -> None:
        """Keep values; those that are not known yet are NaN."""
        whole = not values.isnan().any()
        save_checkpoint(self.folder / (SALIENCY if whole else PART), {"key": self.key, "saliency": values})
        if whole:
            (self.folder / PART).unlink(missing_ok=True)

    def _read(self, path: Path) -> Tensor | None:
        if not path.exists():
            return None
        try:
            payload = load_checkpoint(path)
        except CheckpointError as error:
            damage = str(error).partition(";")[0]
        else:
            if payload.get("key") != self.key:
                return None
            values = payload.get("saliency")
            if isinstance(values, Tensor) and values.shape == (self.count,) and values.dtype == torch.float32:
                return values
            damage = f"{path}: holds no saliency of {self.count} windows"
        if self._speaks:
            warn(f"{damage}; it is computed again")
        return None


class _StopError(Exception):
    """The work is to end here."""


def compute_saliency(
    run: TrainingRun, teacher: Denoiser, store: StoredSaliency, stopped: Callable[[], bool]
) -> Tensor | None:
    """Saliency (N,) of the run's training windows, each process computing its share; ``store`` gets it.

    Args:
        run: whose windows they are.
        teacher: the frozen full-precision policy.
        store: where it is kept, and what a stopped computation has left.
        stopped: asked after every call of the network; where it says yes, what was done is kept.

    Returns:
        The values; None where any process was stopped.

    Raises:
        SaliencyError: a value is not finite.
    """
    rank, size, total, since = run.world.rank, run.world.size, len(run.windows), time.monotonic()
    states = run.windows.observation
    observations = states[rank::size] if isinstance(states, Tensor) else states.every(rank, size)
    known = store.read_part()
    mine = known[rank::size].clone()
    done = int(known.isfinite().sum())
    with tqdm(total=total, initial=done, desc="saliency", mininterval=2.0, disable=not run.world.first) as bar:

        def progress(count: int) -> None:
            nonlocal since
            bar.update(min(count * size, total - bar.n))
            if stopped():
                raise _StopError
            if run.world.first and time.monotonic() - since > SAVE_EVERY_S:
                known[rank::size] = mine
                store.write(known)
                since = time.monotonic()

        with suppress(_StopError):
            state_saliency(
                teacher,
                observations.to(run.device),
                run.windows.action[rank::size].to(run.device),
                signal=run.signal,
                sigma=run.sigma,
                timesteps=saliency_timesteps(run.config.diffusion.train_timesteps),
                generator=torch.Generator().manual_seed(run.config.run.seed),
                perturbation=run_perturbation(run),
                autocast=run.config.run.precision == "bf16",
                progress=progress,
                into=mine,
            )
    values = run.world.gather_rows(mine, total)
    if run.world.first:
        store.write(values)
    return None if values.isnan().any() else values


def run_perturbation(run: TrainingRun) -> Perturbation:
    """What saliency perturbs: patches of the images where the policy sees any, else one dimension at a time."""
    observation = run.windows.observation  # of all processes
    if isinstance(observation, Tensor):
        return dimension_perturbation(observation)
    return image_patch_perturbation(observation)
