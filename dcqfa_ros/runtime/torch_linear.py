"""Linear layers of the torch engine: float32, half, integer and FP8 products on the device.

Integer and FP8 products use two private functions of torch, because it has no public ones that return unscaled sums:
``torch._int_mm`` (int8 x int8 -> int32, exact) and ``torch._scaled_mm`` (FP8 E4M3 x FP8 E4M3 -> float32). On CUDA both
want the second matrix column by column, and sizes that are multiples of 8 (of 16 for FP8); ``_int_mm`` also more than
16 rows. Codes are therefore written into a zeroed buffer of padded size that every call reuses: zeros add nothing, and
the copy into it is the conversion that is needed anyway. Scales and bias follow in one operation in float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dcqfa_ros.runtime.capability import MINIMUM_CAPABILITY, dotted
from dcqfa_ros.runtime.errors import EngineError, first_line
from dcqfa_ros.runtime.torch_nodes import FLOAT, FP8, HALF, INTEGER, LinearLayer

_FP8_LARGEST = 448.0
_INTEGER_ROWS, _INTEGER_MULTIPLE, _FP8_MULTIPLE = 17, 8, 16


class Linear(Protocol):
    """A layer whose weights are on the device; shapes differ between calls of :meth:`at` only."""

    def at(self, shape: Sequence[int], /) -> Callable[[Tensor], Tensor]:
        """Return the layer for inputs (..., in) of exactly this shape; it gives (..., out)."""
        ...


def make_linear(layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> Linear:
    """Put a layer on the device; ``dtype`` is that of activations between layers.

    Raises:
        EngineError: a float32 weight does not fit ``dtype``.
    """
    if layer.kind == INTEGER:
        return IntegerLinear(layer, dtype, device)
    if layer.kind == FP8:
        return Fp8Linear(layer, dtype, device)
    return FloatLinear(layer, dtype, device)


class FloatLinear:
    """A product in float32 or half; a layer in half rounds its input to half and gives back ``dtype``."""

    def __init__(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        """Hold the weight as (out, in), as ``functional.linear`` reads it."""
        assert layer.kind in (FLOAT, HALF)
        self._inner = torch.float16 if layer.kind == HALF else dtype
        self._outer = dtype
        self._weight = fitting(layer.weight.T, self._inner, device, layer.weight_name)
        bias_name = f"bias of {layer.weight_name}"
        self._bias = None if layer.bias is None else fitting(layer.bias, self._inner, device, bias_name)

    def at(self, _: Sequence[int], /) -> Callable[[Tensor], Tensor]:
        """See :class:`Linear`."""
        inner, outer, weight, bias = self._inner, self._outer, self._weight, self._bias
        if inner == outer:
            return lambda x: functional.linear(x, weight, bias)
        return lambda x: functional.linear(x.to(inner), weight, bias).to(outer)


class _CodedLinear(ABC):
    """What integer and FP8 layers share: codes of the input in a padded buffer, a product, scales and bias.

    Attributes:
        inputs, outputs: sizes of the layer.
    """

    def __init__(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device, multiple: int) -> None:
        assert layer.weight_scale is not None and layer.input_scale is not None
        self.inputs, self.outputs = layer.weight.shape
        self._dtype, self._device = dtype, device
        self._padded_inputs = _up(self.inputs, multiple)
        weight = np.zeros((_up(self.outputs, multiple), self._padded_inputs), layer.weight.dtype)
        weight[: self.outputs, : self.inputs] = layer.weight.T
        self._weight = torch.from_numpy(weight).to(device)  # (out, in): transposed, the columns lie one after another
        self._scale = torch.from_numpy(layer.input_scale * layer.weight_scale).to(device)
        self._bias = None if layer.bias is None else torch.from_numpy(layer.bias).to(device)
        # One element, not a scalar: torch divides CUDA tensors by a Python number through its reciprocal, and does not
        # promote half to float32 for a tensor without axes. Either would move codes against the trained ones.
        self._step = torch.from_numpy(np.reshape(layer.input_scale, 1)).to(device)

    def at(self, shape: Sequence[int], /) -> Callable[[Tensor], Tensor]:
        """See :class:`Linear`."""
        leading, rows = tuple(shape[:-1]), math.prod(shape[:-1])
        buffer = self._buffer(rows)

        def apply(x: Tensor) -> Tensor:
            self._write(x.reshape(rows, self.inputs), buffer[:rows, : self.inputs])
            sums = self._product(buffer)[:rows, : self.outputs]
            result = torch.empty((rows, self.outputs), dtype=self._dtype, device=self._device)
            if self._bias is None:
                torch.mul(sums, self._scale, out=result)
            else:
                torch.addcmul(self._bias, sums, self._scale, out=result)
            return result.view(*leading, self.outputs)

        return apply

    def codes(self, x: Tensor) -> Tensor:
        """Codes (rows, in) of an input (..., in), as the product reads them."""
        rows = math.prod(x.shape[:-1])
        buffer = self._buffer(rows)[:rows, : self.inputs]
        self._write(x.reshape(rows, self.inputs), buffer)
        return buffer

    @abstractmethod
    def _buffer(self, rows: int) -> Tensor:
        """A new buffer of zeros for the codes of ``rows`` rows, padded."""

    @abstractmethod
    def _write(self, x: Tensor, codes: Tensor) -> None:
        """Write the codes of an input (rows, in) into their place."""

    @abstractmethod
    def _product(self, codes: Tensor) -> Tensor:
        """Sums (rows, out) of products of codes and weights."""


class IntegerLinear(_CodedLinear):
    """int8 codes times int8 codes, summed exactly in int32."""

    def __init__(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        """Put codes and scales on the device."""
        super().__init__(layer, dtype, device, _INTEGER_MULTIPLE)
        self._low, self._high = layer.codes

    def _buffer(self, rows: int) -> Tensor:
        rows = _up(max(rows, _INTEGER_ROWS), _INTEGER_MULTIPLE)
        return torch.zeros((rows, self._padded_inputs), dtype=torch.int8, device=self._device)

    def _write(self, x: Tensor, codes: Tensor) -> None:
        # Half to even, as QuantizeLinear rounds; clamped before the conversion, which does not saturate.
        codes.copy_((x / self._step).round_().clamp_(self._low, self._high))

    def _product(self, codes: Tensor) -> Tensor:
        return integer_product(codes, self._weight)


class Fp8Linear(_CodedLinear):
    """FP8 E4M3 codes times FP8 E4M3 codes, summed in float32."""

    def __init__(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        """Put codes and scales on the device."""
        super().__init__(layer, dtype, device, _FP8_MULTIPLE)
        self._weight = self._weight.view(torch.float8_e4m3fn)
        self._one = torch.ones((), device=device)

    def _buffer(self, rows: int) -> Tensor:
        shape = (_up(rows, _FP8_MULTIPLE), self._padded_inputs)
        return torch.zeros(shape, dtype=torch.float8_e4m3fn, device=self._device)

    def _write(self, x: Tensor, codes: Tensor) -> None:
        # torch's conversion rounds half to even, but makes NaN of what is too large; QuantizeLinear saturates.
        codes.copy_((x / self._step).clamp_(-_FP8_LARGEST, _FP8_LARGEST))

    def _product(self, codes: Tensor) -> Tensor:
        one = self._one
        # use_fast_accum would add in fewer bits than float32 on Hopper.
        return torch._scaled_mm(codes, self._weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=False)


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """Multiply int8 codes (rows, in) by an int8 weight (out, in): (rows, out) int32, exact.

    On CUDA rows must be at least 17 and the other sizes multiples of 8.
    """
    return torch._int_mm(codes, weight.t())


def check_products(kinds: set[str], device: torch.device) -> None:
    """Multiply small matrices of known product by the private functions that layers of these kinds need.

    Raises:
        EngineError: this torch lacks a function, the device is too old for FP8, or a product fails or is wrong.
    """
    if FP8 in kinds and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if tuple(capability) < MINIMUM_CAPABILITY["fp8"]:
            raise EngineError(
                f"FP8 products need compute capability {dotted(MINIMUM_CAPABILITY['fp8'])}; "
                f"{torch.cuda.get_device_name(device)} has {dotted(capability)}. Choose an INT8 variant"
            )
    generator = np.random.default_rng(0)
    for kind, function in ((INTEGER, "_int_mm"), (FP8, "_scaled_mm")):
        if kind not in kinds:
            continue
        if not hasattr(torch, function):
            raise EngineError(f"torch {torch.__version__} has no torch.{function}, which {kind} layers need")
        limit = 128 if kind == INTEGER else 8  # whole numbers up to 8 are exact in FP8
        left = generator.integers(-limit, limit, (_up(_INTEGER_ROWS, 8), 32))
        right = generator.integers(-limit, limit, (48, 32))
        storage = torch.int8 if kind == INTEGER else torch.float8_e4m3fn
        a, b = (torch.from_numpy(m.astype(np.float32)).to(device).to(storage) for m in (left, right))
        one = torch.ones((), device=device)
        try:
            if kind == INTEGER:
                product = integer_product(a, b)
            else:
                product = torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32, use_fast_accum=False)
            found = product.cpu().numpy()
        except RuntimeError as error:
            reason = first_line(error)
            raise EngineError(
                f"torch {torch.__version__} cannot multiply {kind} codes on {device}: {reason}"
            ) from error
        if not np.array_equal(found, left @ right.T):
            raise EngineError(
                f"torch.{function} of torch {torch.__version__} gives wrong products on {device}; use another version "
                "of torch or another runtime"
            )


def fitting(array: np.ndarray, dtype: torch.dtype, device: torch.device, label: str) -> Tensor:
    """Put a float array on the device in ``dtype``.

    Raises:
        EngineError: a finite value does not fit.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
    if bool((~torch.isfinite(tensor)).any()) and np.isfinite(array).all():
        raise EngineError(f"{label}: values do not fit {dtype}; open the engine with float32 activations")
    return tensor.to(device)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
