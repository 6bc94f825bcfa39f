"""Image encoder of DiffusionPolicy-T: ResNet-18 with group norms, spatial softmax, one linear layer.

It is the one the published image policy has; 11,197,088 parameters at its defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dcqfa_ros.bundle.strict import StrictModel

CHANNELS = 3
GROUP = 16  # channels that are normalised together
BLOCKS_PER_STAGE = 2
STAGES = 4
SMALLEST_CROP = 32  # the network halves each side five times


class ImageConfig(StrictModel):
    """The images that a policy reads and the size of their encoder; the defaults are the published ones.

    Attributes:
        height, width: pixels of an image as recorded.
        crop: side of the square that the network sees: anywhere in training, in the middle otherwise.
        channels: of the first stage; every further one has twice as many.
        keypoints: points that the spatial softmax finds.
        features: per image, beside the low-dimensional observation.
    """

    height: int = Field(default=96, ge=SMALLEST_CROP)
    width: int = Field(default=96, ge=SMALLEST_CROP)
    crop: int = Field(default=84, ge=SMALLEST_CROP)
    channels: int = Field(default=64, ge=GROUP, multiple_of=GROUP)
    keypoints: int = Field(default=32, ge=1)
    features: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _crop_fits(self) -> ImageConfig:
        if self.crop > min(self.height, self.width):
            raise ValueError(f"crop {self.crop} exceeds the images of {self.height} x {self.width} pixels")
        return self

    @property
    def scalars(self) -> int:
        """Number of values in one image as the network reads it."""
        return CHANNELS * self.crop * self.crop


class Convolution(NamedTuple):
    """A square convolution without bias that a group norm follows, and the side of what it puts out."""

    inputs: int
    outputs: int
    kernel: int
    side: int


def convolutions(config: ImageConfig) -> Iterator[Convolution]:
    """All convolutions of the ResNet, in order."""
    side, width = _half(config.crop), config.channels
    yield Convolution(CHANNELS, width, 7, side)
    side = _half(side)  # the maximum over 3 x 3
    inputs = width
    for stage in range(STAGES):
        for block in range(BLOCKS_PER_STAGE):
            stride = 2 if stage and not block else 1
            side = _half(side) if stride == 2 else side
            yield Convolution(inputs, width, 3, side)
            yield Convolution(width, width, 3, side)
            if stride == 2:
                yield Convolution(inputs, width, 1, side)
            inputs = width
        width *= 2


def _half(side: int) -> int:
    return (side + 1) // 2


def encoder_parameters(config: ImageConfig) -> int:
    """Number of parameters of an :class:`ImageEncoder`."""
    resnet = sum(c.inputs * c.outputs * c.kernel**2 + 2 * c.outputs for c in convolutions(config))
    points = (_last_channels(config) + 1) * config.keypoints
    return resnet + points + (2 * config.keypoints + 1) * config.features


def encoder_flops(config: ImageConfig) -> int:
    """Operations on one image, two per multiplication in convolutions and linear layer; the rest is not counted."""
    layers = list(convolutions(config))
    resnet = sum(2 * c.inputs * c.outputs * c.kernel**2 * c.side**2 for c in layers)
    points = 2 * _last_channels(config) * config.keypoints * layers[-1].side ** 2
    return resnet + points + 2 * 2 * config.keypoints * config.features


def _last_channels(config: ImageConfig) -> int:
    return config.channels * 2 ** (STAGES - 1)


def spatial_softmax(features: Tensor) -> Tensor:
    """Expected positions (B, K, 2), x before y in -1 to 1, of maps (B, K, H, W) taken as log-probabilities.

    Computed in float32 whatever the maps' type: half precision would round positions to a pixel's fraction.
    """
    height, width = features.shape[-2:]
    weights = torch.softmax(features.flatten(-2).float(), dim=-1).unflatten(-1, (height, width))
    x = torch.linspace(-1.0, 1.0, width, device=features.device)
    y = torch.linspace(-1.0, 1.0, height, device=features.device)
    return torch.stack([(weights.sum(-2) * x).sum(-1), (weights.sum(-1) * y).sum(-1)], dim=-1)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with group norms beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Make the block; a ``stride`` of 2 halves the sides."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(outputs // GROUP, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(outputs // GROUP, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.GroupNorm(outputs // GROUP, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        h = nn.functional.relu(self.norm1(self.conv1(x)))
        return nn.functional.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ImageEncoder(nn.Module):
    """Features of an image: where its ResNet's maps are active, through a linear layer and ReLU."""

    def __init__(self, config: ImageConfig) -> None:
        """Make the encoder with random weights from PyTorch's global generator."""
        super().__init__()
        width = config.channels
        self.conv = nn.Conv2d(CHANNELS, width, 7, 2, padding=3, bias=False)
        self.norm = nn.GroupNorm(width // GROUP, width)
        blocks, inputs = [], width
        for stage in range(STAGES):
            for block in range(BLOCKS_PER_STAGE):
                blocks.append(ResidualBlock(inputs, width, 2 if stage and not block else 1))
                inputs = width
            width *= 2
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.points = nn.Conv2d(inputs, config.keypoints, 1)
        self.head = nn.Linear(2 * config.keypoints, config.features)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, crop, crop) in -1 to 1 to features (B, features)."""
        x = nn.functional.relu(self.norm(self.conv(images)))
        x = self.blocks(nn.functional.max_pool2d(x, 3, 2, padding=1))
        return nn.functional.relu(self.head(spatial_softmax(self.points(x)).flatten(1)))
