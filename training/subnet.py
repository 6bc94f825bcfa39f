"""One network of a search space: what is kept of every block, at which bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from dcqfa_ros.errors import UserError


class SpaceError(UserError, ValueError):
    """A search space that fits no policy, or a subnet that is not in its space; the message names the field."""


class Precision(str, Enum):
    """Arithmetic of the whole network; ``int`` means integer codes at each layer's own weight and activation bits."""

    FP32 = "fp32"
    FP16 = "fp16"
    FP8 = "fp8"
    INT = "int"

    def __str__(self) -> str:
        return self.value


# Bits of a layer where the precision is that of the whole network.
FLOAT_BITS: Mapping[Precision, int] = MappingProxyType({Precision.FP32: 32, Precision.FP16: 16, Precision.FP8: 8})


@dataclass(frozen=True, slots=True)
class Layer:
    """What is kept of a block: ``heads`` heads, ``mlp`` hidden channels; ``w`` weight and ``a`` activation bits."""

    heads: int
    mlp: int
    w: int
    a: int


@dataclass(frozen=True, slots=True)
class Subnet:
    """One network of a search space, usable as a key.

    Attributes:
        layers: one entry per block of the policy; None where the block is skipped.
        precision: arithmetic of the whole network. Layers of FP32, FP16 and FP8 carry w = a = 32, 16 and 8.
    """

    layers: tuple[Layer | None, ...]
    precision: Precision

    @property
    def depth(self) -> int:
        """Number of blocks kept."""
        return len(self.kept)

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the blocks kept."""
        return tuple(index for index, layer in enumerate(self.layers) if layer is not None)


def make_layer(widths: tuple[int, int], precision: Precision, w: int, a: int) -> Layer:
    """A layer whose bits are those of the whole network unless the precision is ``int``."""
    bits = FLOAT_BITS.get(precision)
    return Layer(*widths, w, a) if bits is None else Layer(*widths, bits, bits)
