"""What surrounds the integer product of a plain linear: transforms of its input and activation quantizers.

Every part is rebuilt from its ``spec()`` (a JSON document) and its buffers, so that an artifact holds no code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from training.baselines.bits import BaselineError
from training.quant.fp8 import fp8_codes
from training.quant.quantizer import TINY, code_range


class Part(nn.Module):
    """A transform or quantizer of the input of a plain linear."""

    kind: str

    def spec(self) -> dict[str, Any]:
        """Kind and constructor arguments, JSON-ready."""
        return {"kind": self.kind}


class Multiply(Part):
    """``x * factor`` per channel: smoothing that could not be folded into what comes before."""

    kind = "multiply"
    factor: Tensor

    def __init__(self, features: int, factor: Tensor | None = None) -> None:
        """Multiply ``features`` channels by ``factor`` (features,), ones by default."""
        super().__init__()
        self.register_buffer("factor", torch.ones(features) if factor is None else factor.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Scale (..., features)."""
        return x * self.factor

    def spec(self) -> dict[str, Any]:
        """See :meth:`Part.spec`."""
        return {"kind": self.kind, "features": self.factor.numel()}


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix (size, size) divided by sqrt(size): symmetric and orthogonal.

    Raises:
        BaselineError: ``size`` is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise BaselineError(f"Hadamard block of {size}: expected a power of two")
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


class BlockHadamard(Part):
    """Rotates every block of ``block`` channels by the Hadamard matrix; its own inverse."""

    kind = "hadamard"
    matrix: Tensor

    def __init__(self, block: int) -> None:
        """Rotate blocks of a power of two channels."""
        super().__init__()
        self.block = block
        self.register_buffer("matrix", hadamard(block), False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate (..., features), features being a multiple of ``block``."""
        return (x.unflatten(-1, (-1, self.block)) @ self.matrix).flatten(-2)

    def spec(self) -> dict[str, Any]:
        """See :meth:`Part.spec`."""
        return {"kind": self.kind, "block": self.block}


class Unquantized(Part):
    """Activations left in floating point."""

    kind = "float"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (..., features) as it is, at scale 1."""
        return x, x.new_ones(())


class PerToken(Part):
    """Symmetric integer codes at the absolute maximum of each token: dynamic, no calibration."""

    kind = "per_token"

    def __init__(self, bits: int) -> None:
        """Quantize to ``bits`` bits, 4 or 8."""
        super().__init__()
        self.bits = bits
        self.high = code_range(bits)[1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., features) and their scales (..., 1)."""
        scale = (x.abs().amax(dim=-1, keepdim=True) / self.high).clamp_min(TINY)
        return torch.clamp(torch.round(x / scale), -self.high - 1, self.high), scale

    def spec(self) -> dict[str, Any]:
        """See :meth:`Part.spec`."""
        return {"kind": self.kind, "bits": self.bits}


class PerTensor(Part):
    """Static codes of the whole tensor: ``clamp(round(x / step + offset), low, high) - offset`` at scale ``step``.

    All four are () float32 buffers. ``offset`` is 0 for learned steps; BatchQuant shifts its codes by it.
    """

    kind = "per_tensor"
    step: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        bits: int,
        step: Tensor | float = 1.0,
        low: Tensor | float = 0.0,
        high: Tensor | float = 0.0,
        offset: Tensor | float = 0.0,
    ) -> None:
        """Quantize to ``bits`` bits; ``bits`` only says how many codes there are."""
        super().__init__()
        self.bits = bits
        for name, value in (("step", step), ("offset", offset), ("low", low), ("high", high)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32).detach().clone().reshape(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., features), less the offset, and their scale ()."""
        codes = torch.clamp(torch.round(x / self.step + self.offset), self.low, self.high)  # type: ignore[arg-type]
        return codes - self.offset, self.step

    def spec(self) -> dict[str, Any]:
        """See :meth:`Part.spec`."""
        return {"kind": self.kind, "bits": self.bits}


class PerTensorFp8(Part):
    """Saturating E4M3 codes of the whole tensor at a static scale, a () float32 buffer."""

    kind = "fp8"
    scale: Tensor

    def __init__(self, scale: Tensor | float = 1.0) -> None:
        """Quantize at ``scale``."""
        super().__init__()
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32).detach().clone().reshape(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., features) and their scale ()."""
        return fp8_codes(x.to(torch.float32), self.scale), self.scale


TRANSFORMS: dict[str, type[Part]] = {part.kind: part for part in (Multiply, BlockHadamard)}
QUANTIZERS: dict[str, type[Part]] = {part.kind: part for part in (Unquantized, PerToken, PerTensor, PerTensorFp8)}


def make_part(spec: dict[str, Any], kinds: dict[str, type[Part]]) -> Part:
    """The part that ``spec`` describes; its buffers are still to be loaded.

    Raises:
        BaselineError: there is no such kind, or it does not take these arguments.
    """
    arguments = dict(spec)
    kind = arguments.pop("kind", None)
    if kind not in kinds:
        raise BaselineError(f"kind: expected one of {', '.join(kinds)}, got {kind!r}")
    try:
        return kinds[kind](**arguments)
    except TypeError as error:
        raise BaselineError(f"{kind}: {error}") from error
