"""Windows of images and low-dimensional observations, put together when they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from training.losses.sqil import Perturbation, patch_perturbation
from training.nn.vision import CHANNELS

IMAGE_SCALE, IMAGE_OFFSET = 1.0 / 127.5, -1.0  # intensities 0 to 255 fill -1 to 1


class ImageWindows:
    """Observation windows (N, To, Do) of low-dimensional scalars and then a cropped image, channels before rows.

    Only row numbers and the scalars are held per window; all windows share one array of uint8 images. Indexing crops in
    the middle and normalises.

    Attributes:
        low: (N, To, scalars) float32, normalised.
        images: (rows, height, width, 3) uint8.
        rows: (N, To) int64, image of every time step.
        crop: side of the crop.
        device: where observations are put.
    """

    def __init__(
        self, low: Tensor, images: Tensor, rows: Tensor, crop: int, device: torch.device | None = None
    ) -> None:
        """See the attributes."""
        self.low, self.images, self.rows, self.crop = low, images, rows, crop
        self.device = torch.device("cpu") if device is None else device

    def __len__(self) -> int:
        return len(self.low)

    def to(self, device: torch.device) -> ImageWindows:
        """The same with observations put on ``device``; the images stay where they are."""
        return ImageWindows(self.low, self.images, self.rows, self.crop, device)

    def every(self, first: int, step: int) -> ImageWindows:
        """The windows ``[first :: step]``; the images are shared."""
        return ImageWindows(self.low[first::step], self.images, self.rows[first::step], self.crop, self.device)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Observations (B, To, Do) float32 with crops in the middle."""
        rows = self.rows[index]
        middle = [(side - self.crop) // 2 for side in self.images.shape[1:3]]
        corners = torch.tensor(middle).expand(*rows.shape, 2)
        return self._observations(index, rows, corners)

    def cropped_at_random(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Observations (B, To, Do) float32, every image with a crop of its own from ``generator``."""
        rows = self.rows[index]
        corners = [
            torch.randint(side - self.crop + 1, rows.shape, generator=generator) for side in self.images.shape[1:3]
        ]
        return self._observations(index, rows, torch.stack(corners, dim=-1))

    def _observations(self, index: Tensor | slice, rows: Tensor, corners: Tensor) -> Tensor:
        """Crop at ``corners`` (B, To, 2), normalise, and join with the scalars."""
        span = torch.arange(self.crop)
        down = (corners[..., 0, None] + span)[..., :, None]
        right = (corners[..., 1, None] + span)[..., None, :]
        cropped = self.images[rows[..., None, None], down, right].movedim(-1, -3).to(self.device)
        images = (cropped.to(torch.float32) * IMAGE_SCALE + IMAGE_OFFSET).flatten(-3)
        return torch.cat([self.low[index].to(self.device), images], dim=-1)


def image_patch_perturbation(windows: ImageWindows) -> Perturbation:
    """Perturb one patch of the images at a time (:func:`patch_perturbation`); the scalars stay as they are.

    Returns:
        Function from observations (B, To, Do) to (B, patches, To, Do).
    """
    low, side, patches = windows.low.shape[-1], windows.crop, patch_perturbation()

    def perturb(batch: Tensor) -> Tensor:
        varied = patches(batch[..., low:].unflatten(-1, (CHANNELS, side, side))).flatten(-3)
        scalars = batch[:, None, :, :low].expand(-1, varied.shape[1], -1, -1)
        return torch.cat([scalars, varied], dim=-1)

    return perturb
