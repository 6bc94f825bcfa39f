"""What a graph needs to know of a linear layer: weights as they are stored, and how the layer rounds what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from ml_dtypes import float8_e4m3fn, int4
from numpy.typing import NDArray
from torch import nn

from training.nn.elastic import Arithmetic, Bits, ElasticLinear, InputQuantizer
from training.quant.fp8 import fp8_codes
from training.quant.linear import QuantizedLinear
from training.quant.lsq import lsq_codes
from training.quant.quantizer import code_range, mse_scale, quantize

INT8_CODES = (-128, 127)
STORED_BITS = {"float32": 32, "float16": 16, "float8_e4m3fn": 8, "int8": 8, "int4": 4}


class Rounding(Enum):
    """The format that an input is rounded to."""

    HALF = "float16"
    FP8 = "float8_e4m3fn"
    INTEGER = "int8"


@dataclass(frozen=True, slots=True)
class InputGrid:
    """Static rounding of an input: ``scale`` is a float32 scalar, None for float16.

    ``low`` and ``high`` are the least and greatest code of an integer; a range narrower than INT8's holds 4 bits.
    """

    rounding: Rounding
    scale: NDArray[np.float32] | None = None
    low: int = INT8_CODES[0]
    high: int = INT8_CODES[1]

    @property
    def bits(self) -> int:
        """Bits of the codes."""
        if self.rounding is Rounding.HALF:
            return 16
        return (self.high - self.low).bit_length()

    def key(self) -> tuple[object, ...]:
        """Equal for equal roundings."""
        return self.rounding, b"" if self.scale is None else self.scale.tobytes(), self.low, self.high


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """A linear layer as ONNX holds it: ``weight`` (in, out) in the type it is stored in.

    Attributes:
        weight: float32 or float16 values, or int8, int4 or float8 codes.
        bias: (out,).
        weight_scale: (out,), for codes.
        grid: how the layer rounds its input; None for a layer that reads it as it is.
    """

    weight: NDArray[Any]
    bias: NDArray[np.float32]
    weight_scale: NDArray[np.float32] | None = None
    grid: InputGrid | None = None

    @property
    def stored_bits(self) -> int:
        """Bits of one stored weight."""
        return STORED_BITS[self.weight.dtype.name]

    def values(self) -> NDArray[np.float32]:
        """The weight (in, out) that is multiplied, float32."""
        values = self.weight.astype(np.float32)
        return values if self.weight_scale is None else values * self.weight_scale

    @classmethod
    def of(cls, module: nn.Module) -> LinearWeights:
        """Read a full-precision linear layer or a post-training quantized one.

        Raises:
            ValueError: another kind of module, or other than 8 bits, which only elastic layers have.
        """
        if isinstance(module, QuantizedLinear):
            if (module.bits.weight, module.bits.activation) != (8, 8):
                raise ValueError(f"export of {module.bits} is not defined; only 8-bit weights and activations are")
            return cls(
                np.ascontiguousarray(module.codes.t().numpy().astype(np.int8)),
                module.bias.numpy(),
                module.weight_scale.numpy(),
                InputGrid(Rounding.INTEGER, module.input_scale.numpy()),
            )
        if isinstance(module, nn.Linear):
            weight = np.ascontiguousarray(module.weight.detach().t().numpy())
            bias = np.zeros(weight.shape[1], np.float32) if module.bias is None else module.bias.detach().numpy()
            return cls(weight, bias)
        raise ValueError(f"expected a linear layer, got {type(module).__name__}")

    def times(self, factor: float) -> LinearWeights:
        """The layer with its output multiplied by ``factor``; codes stay as they are.

        Raises:
            ValueError: float16 weights, which would be rounded anew.
        """
        if self.weight.dtype == np.float16:
            raise ValueError("float16 weights cannot be scaled without rounding them again")
        bias = self.bias * np.float32(factor)
        if self.weight_scale is None:
            return LinearWeights(self.weight * np.float32(factor), bias, None, self.grid)
        return LinearWeights(self.weight, bias, self.weight_scale * np.float32(factor), self.grid)


def elastic_weights(
    module: ElasticLinear, quantizer: InputQuantizer, arithmetic: Arithmetic, bits: Bits
) -> LinearWeights:
    """Read a layer of an extracted subnet in the arithmetic it runs in; its own steps, ranges and codes."""
    bias = module.bias.detach().numpy()
    if arithmetic is Arithmetic.FLOAT:
        return LinearWeights.of(module)
    if arithmetic is Arithmetic.HALF:
        weight = np.ascontiguousarray(module.weight.detach().t().numpy().astype(np.float16))
        return LinearWeights(weight, bias, None, InputGrid(Rounding.HALF))
    if arithmetic is Arithmetic.FP8:
        steps = module.fp8_row_steps(module.out_features)
        codes = fp8_codes(module.weight.detach(), steps[:, None]).t().numpy().astype(float8_e4m3fn)
        grid = InputGrid(Rounding.FP8, quantizer.fp8_scale.numpy())
        return LinearWeights(np.ascontiguousarray(codes), bias, steps.numpy(), grid)
    log_step = (bits.weight[:, None] * module.log_step.detach()).sum(0)
    levels = lsq_codes(module.weight.detach(), log_step[:, None], bits.weight_low, bits.weight_high).t()
    dtype = int4 if bits.weight_high <= code_range(4)[1] else np.int8
    chosen = bits.activation
    scale, low, high = (
        (chosen * tensor.detach()).sum() for tensor in (quantizer.log_step, quantizer.low, quantizer.high)
    )
    grid = InputGrid(Rounding.INTEGER, scale.exp().numpy(), int(low), int(high))
    if grid.low < INT8_CODES[0] or grid.high > INT8_CODES[1]:
        raise ValueError(f"codes from {grid.low} to {grid.high} with zero point 0 do not fit INT8")
    weight = np.ascontiguousarray(levels.numpy().astype(np.int8)).astype(dtype)
    return LinearWeights(weight, bias, log_step.exp().numpy(), grid)


def stored_in_8_bits(layer: LinearWeights) -> LinearWeights:
    """A full-precision layer with its weights in 8-bit codes, one scale per output; it reads its input as it is."""
    import torch

    weight = torch.from_numpy(layer.weight)
    scale = mse_scale(weight, 8, dim=0)  # (1, out)
    codes = quantize(weight, scale, 8).numpy().astype(np.int8)
    return LinearWeights(codes, layer.bias, scale[0].numpy(), layer.grid)


def stored_in_half(layer: LinearWeights) -> LinearWeights:
    """A full-precision layer with its weights rounded to float16; it reads its input as it is."""
    return LinearWeights(layer.weight.astype(np.float16), layer.bias, None, layer.grid)


def concatenate(parts: Sequence[LinearWeights]) -> LinearWeights:
    """One layer with the outputs of all ``parts`` side by side; lossless, because weight scales are per output channel.

    Raises:
        ValueError: the parts do not round their input alike, or store their weights in different types.
    """
    if not alike(parts):
        raise ValueError("linears that are merged must share one input quantizer and the type of their weights")
    weight = np.concatenate([part.weight for part in parts], axis=1)
    bias = np.concatenate([part.bias for part in parts])
    scales = [part.weight_scale for part in parts if part.weight_scale is not None]
    return LinearWeights(weight, bias, np.concatenate(scales) if scales else None, parts[0].grid)


def alike(parts: Sequence[LinearWeights]) -> bool:
    """Whether :func:`concatenate` takes ``parts``."""
    return len({(p.weight.dtype.name, p.weight_scale is None, p.grid and p.grid.key()) for p in parts}) == 1
