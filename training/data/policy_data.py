"""Demonstrations as a policy's training reads them: split, normalised, cut into windows, drawn by seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcqfa_ros.bundle.schema import NormalizerKind
from training.config import ConfigError, TrainConfig
from training.data.episodes import DataError, read_demonstrations, split_episodes
from training.data.normalizer import concatenate_normalizers, fit_normalizer, normalize
from training.data.sequences import WindowSet, episode_rows, fit_observation_normalizers


@dataclass(frozen=True, slots=True)
class Batch:
    """One draw: observations (B, To, Do), actions (B, H, Da), time steps (B,), noise (B, H, Da), windows (B,).

    ``prefix`` (B,) is the number of leading action tokens that are already known; None where the policy takes none.
    """

    observation: Tensor
    action: Tensor
    timesteps: Tensor
    noise: Tensor
    index: Tensor
    prefix: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with every tensor changed."""
        return Batch(
            change(self.observation),
            change(self.action),
            change(self.timesteps),
            change(self.noise),
            change(self.index),
            None if self.prefix is None else change(self.prefix),
        )

    def first(self, count: int) -> Batch:
        """The first ``count`` samples, as views."""
        return self.map(lambda values: values[:count])

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        return self.map(lambda values: values.to(device))


class PolicyData:
    """The windows of a data set with their normalisers.

    Attributes:
        shapes: per observation key, one time step, in concatenation order.
        sha256: of the demonstrations as read.
        train_episodes: number of episodes that are trained on.
        observation_norms, action_norm: fitted on the training episodes.
        windows, held_out: training and held-out windows.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Read, check, split and normalise the demonstrations of ``config``.

        Raises:
            DataError: the data set cannot be used or does not fit the policy.
            ConfigError: the action normaliser leaves the range that the sampler keeps.
        """
        self.config = config
        demonstrations = read_demonstrations(config.data)
        self.shapes = demonstrations.shapes
        self.sha256 = demonstrations.sha256()
        for label, have, want in (
            ("observation_dim", demonstrations.observation.shape[1], config.policy.observation_dim),
            ("action_dim", demonstrations.action.shape[1], config.policy.action_dim),
        ):
            if have != want:
                raise DataError(f"{config.data.path}: the data gives {label} {have}, the policy declares {want}")
        image, images = config.policy.image, demonstrations.images
        if image is not None and images is not None and images.shape[1:3] != (image.height, image.width):
            raise DataError(
                f"{config.data.path}: the images (data.image) have {images.shape[1]} x {images.shape[2]} pixels, the "
                f"policy declares {image.height} x {image.width} (policy.image.height, policy.image.width)"
            )
        data = config.data
        train, held_out = split_episodes(
            demonstrations.episodes, data.validation_ratio, data.split_seed, data.max_train_episodes
        )
        self.train_episodes = len(train)
        rows = episode_rows(demonstrations, train)
        self.observation_norms = fit_observation_normalizers(demonstrations, rows, config)
        self.action_norm = fit_normalizer(demonstrations.action[rows], data.action.normalizer)
        _check_action_range(normalize(demonstrations.action[rows], self.action_norm), config)
        norm = concatenate_normalizers(self.observation_norms, self.shapes)
        self.windows = WindowSet(demonstrations, train, config, norm, self.action_norm, random_crop=True)
        self.held_out = WindowSet(demonstrations, held_out, config, norm, self.action_norm)
        if not len(self.windows):
            raise DataError(f"{data.path}: no training window of {config.policy.horizon} steps; episodes are too short")

    def facts(self) -> dict[str, Any]:
        """What follows from the data, as a checkpoint holds it."""
        return {
            "data_sha256": self.sha256,
            "train_episodes": self.train_episodes,
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "observation_norms": {k: v.model_dump(mode="json") for k, v in self.observation_norms.items()},
            "action_norm": self.action_norm.model_dump(mode="json"),
        }

    def draw(self, windows: WindowSet, seed: int, batch: int) -> Batch:
        """Draw windows, time steps, noise, crops of images and lengths of known prefixes from ``seed``, on the CPU.

        Lengths are uniform over 0 to ``policy.prefix``. They come last, so policies with and without see equal windows.
        """
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(windows), (batch,), generator=generator)
        timesteps = torch.randint(self.config.diffusion.levels, (batch,), generator=generator)
        action = windows.action[index]
        noise = torch.randn(action.shape, generator=generator)
        observation = windows.observations(index, generator)  # after these: random crops change no other draw
        longest = self.config.policy.prefix
        prefix = torch.randint(longest + 1, (batch,), generator=generator) if longest else None
        return Batch(observation, action, timesteps, noise, index, prefix)


def _check_action_range(normalised: NDArray[np.float32], config: TrainConfig) -> None:
    """Refuse actions (N, Da) that the sampler, which clips to ``diffusion.clip_sample``, could never produce.

    Quantile normalisation cuts its outliers on purpose, and min_max fills -1 to 1.
    """
    kind, limit = config.data.action.normalizer, config.diffusion.clip_sample
    if kind not in (NormalizerKind.MEAN_STD, NormalizerKind.IDENTITY):
        return
    reach = float(np.abs(normalised).max())
    if reach > limit:
        raise ConfigError(
            f"training configuration {config.name!r}: data.action.normalizer {kind.value} leaves actions up to "
            f"{reach:.3g}, but diffusion.clip_sample cuts at {limit:g}; use min_max or raise diffusion.clip_sample"
        )
