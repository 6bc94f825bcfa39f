"""Windows of observations and actions with padding at episode ends (once for all data sets)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcqfa_ros.bundle.schema import NormalizerSpec
from training.config import TrainConfig
from training.data.episodes import Demonstrations
from training.data.images import ImageWindows
from training.data.normalizer import fit_normalizer, normalize


def window_rows(
    demonstrations: Demonstrations, episodes: NDArray[np.int64], horizon: int, pad_before: int, pad_after: int
) -> NDArray[np.int64]:
    """Row indices (windows, horizon) of every window of the given episodes.

    A window may begin ``pad_before`` rows before its episode and end ``pad_after`` rows after it; rows outside are
    replaced by the episode's first or last row.
    """
    parts = []
    for episode in episodes:
        start, end = int(demonstrations.starts[episode]), int(demonstrations.ends[episode])
        first = np.arange(start - pad_before, end - horizon + pad_after + 1, dtype=np.int64)
        parts.append(np.clip(first[:, None] + np.arange(horizon), start, end - 1))
    return np.concatenate(parts) if parts else np.zeros((0, horizon), dtype=np.int64)


class WindowSet:
    """Normalised windows held in memory: observations (N, To, Do) and action chunks (N, H, Da), float32.

    Where the policy reads images, an observation is put together when it is asked for: the images stay uint8, once.

    Attributes:
        episodes: (N,), the episode of the data set that each window lies in.
    """

    observation: Tensor | ImageWindows

    def __init__(
        self,
        demonstrations: Demonstrations,
        episodes: NDArray[np.int64],
        config: TrainConfig,
        observation_norm: NormalizerSpec,
        action_norm: NormalizerSpec,
        random_crop: bool = False,
    ) -> None:
        """Normalise and cut the windows of ``episodes``; ``random_crop`` is for images that are trained on."""
        policy = config.policy
        rows = window_rows(
            demonstrations, episodes, policy.horizon, policy.observation_horizon - 1, config.executed_actions - 1
        )
        observation = normalize(demonstrations.observation, observation_norm)
        action = normalize(demonstrations.action, action_norm)
        self.episodes: NDArray[np.int64] = np.searchsorted(demonstrations.ends, rows[:, 0], side="right")
        past = rows[:, : policy.observation_horizon]
        self.observation = torch.from_numpy(observation[past])
        self.random_crop = random_crop and policy.image is not None
        if policy.image is not None:
            if demonstrations.images is None:
                raise ValueError("the policy reads images, the demonstrations were read without")
            self.observation = ImageWindows(
                self.observation, torch.from_numpy(demonstrations.images), torch.from_numpy(past), policy.image.crop
            )
        self.action = torch.from_numpy(action[rows])

    def __len__(self) -> int:
        return len(self.action)

    def observations(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Observations (B, To, Do) of the windows ``index`` (B,); ``generator`` places random crops."""
        if isinstance(self.observation, ImageWindows) and self.random_crop:
            return self.observation.cropped_at_random(index, generator)
        return self.observation[index]


def fit_observation_normalizers(
    demonstrations: Demonstrations, rows: NDArray[np.int64], config: TrainConfig
) -> dict[str, NormalizerSpec]:
    """Fit one normaliser per observation key on the given rows."""
    specs, first = {}, 0
    for key, shape in demonstrations.shapes.items():
        size = int(np.prod(shape))
        data = demonstrations.observation[rows, first : first + size]
        specs[key] = fit_normalizer(data, config.data.observations[key].normalizer)
        first += size
    return specs


def episode_rows(demonstrations: Demonstrations, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """All rows of the given episodes, in order."""
    return np.concatenate([np.arange(demonstrations.starts[e], demonstrations.ends[e]) for e in episodes])
